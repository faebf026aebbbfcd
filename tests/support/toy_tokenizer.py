"""A tokenizer without files or libraries, whose ids are bytes and, on request, longer tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tgi_asgi.text.chat.guard import PromptGuard

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
VOCAB_SIZE = 1024
IMAGE = VOCAB_SIZE - 1  # a special token if the model accepts images
_SPECIAL = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}


class ToyTokenizer:
    """A tokenizer with bytes as ids 0..255, special tokens as 256..259, and further ids from `id_of`.

    Args:
        marks: Further special tokens.
    """

    def __init__(
        self, *, adds_bos: bool = False, has_vision: bool = False, marks: Sequence[str] = ()
    ) -> None:
        self._special = _SPECIAL | ({IMAGE: "<image>"} if has_vision else {})
        self._special |= {IMAGE - 1 - at: mark for at, mark in enumerate(marks)}
        self.vocab_size = VOCAB_SIZE
        self.bos_id: int | None = BOS
        self.eos_id: int | None = EOS
        self.eos_ids = frozenset({EOS, IM_END})
        self.special_ids = frozenset(self._special)
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        self.adds_bos = adds_bos
        self.chat_template: str | None = None
        self.guard = PromptGuard(self._special.values())
        self.longest_token = max(map(len, self._special.values()))
        self._longer: dict[bytes, int] = {}
        self._patterns: dict[bytes, re.Pattern[bytes]] = {}  # made when they are needed

    def id_of(self, data: bytes) -> int:
        """Return the token of these bytes, allocating a new id if there is none."""
        if len(data) == 1:
            return data[0]
        for token_id, text in self._special.items():
            if text.encode() == data:
                return token_id
        return self._longer.setdefault(data, 260 + len(self._longer))

    def encode(self, text: str, *, add_special_tokens: bool, is_marked: bool = False) -> list[int]:
        tokens = self.encode_with_offsets(text, add_special_tokens=add_special_tokens, is_marked=is_marked)
        return [start[0] for start in tokens]

    def encode_inside(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def encode_cut(
        self, text: str, keep: int, *, add_special_tokens: bool, from_left: bool = False
    ) -> list[int]:
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        return ids[-keep:] if from_left else ids[:keep]

    def encode_pair(
        self, first: str, second: str, *, keep: int | None = None, from_left: bool = False
    ) -> tuple[list[int], int | None]:
        ids = self.encode(first, add_special_tokens=True)
        others = self.encode(second, add_special_tokens=False)
        num_over = 0 if keep is None else min(max(len(ids) + len(others) - keep, 0), len(others))
        return [*ids, *(others[num_over:] if from_left else others[: len(others) - num_over])], None

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool, is_marked: bool = False
    ) -> list[tuple[int, int, int]]:
        data, mark = text.encode(), self.guard.mark.encode() if is_marked else b""
        tokens = [(BOS, 0, 0)] if add_special_tokens and self.adds_bos else []
        at = skipped = 0
        for found in self._specials(mark).finditer(data):
            tokens += [(data[i], i - skipped, i - skipped + 1) for i in range(at, found.start())]
            skipped += len(mark)
            at = found.end()
            special = next(i for i, name in self._special.items() if name.encode() == found[1])
            tokens.append((special, at - skipped - len(found[1]), at - skipped))
        return tokens + [(data[i], i - skipped, i - skipped + 1) for i in range(at, len(data))]

    def _specials(self, mark: bytes) -> re.Pattern[bytes]:
        """Return what finds special tokens behind a mark; grammars need the ids of 180,000 texts."""
        if mark not in self._patterns:
            names = b"|".join(re.escape(name.encode()) for name in self._special.values())
            self._patterns[mark] = re.compile(re.escape(mark) + b"(" + names + b")")
        return self._patterns[mark]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        if token_id in self._special:
            return self._special[token_id].encode()
        return next((data for data, known in self._longer.items() if known == token_id), b"")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | None:
        return f"<{token_id}>"

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        kept = (i for i in ids if not (skip_special_tokens and i in self._special))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
