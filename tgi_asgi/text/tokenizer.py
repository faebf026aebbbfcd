"""Text to token ids and back: one wrapper over `tokenizers` for every vocabulary format.

Built in the loading thread, then used by the HTTP layer's worker threads (`encode`) and by the engine
(`token_bytes`, on the event loop). Knows neither HTTP nor the engine.
"""

from __future__ import annotations

import functools
import re
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text import gguf_encoder_vocab, gguf_vocab, older_files
from tgi_asgi.text.chat.guard import PromptGuard
from tgi_asgi.text.inner_text import InnerText
from tgi_asgi.text.token_bytes import token_byte_table
from tgi_asgi.text.tokenizer_files import read_tokenizer

_LONGEST_WORD = 100  # characters; BERT's limit


class Tokenizer:
    """A model's tokenizer.

        tokenizer = Tokenizer.from_directory(Path("/models/llama"))
        ids = tokenizer.encode("Hello", add_special_tokens=True)
        tokenizer.decode(ids, skip_special_tokens=True)          # "Hello"

    All methods may be called from several threads at once.

    Args:
        has_token_types: Whether the model is told which segment of a pair a token belongs to.

    Attributes:
        vocab_size: Ids are in [0, vocab_size); the model's own vocabulary may be padded beyond it.
        special_tokens: "bos_token", "eos_token", "image_token" ... -> text, those that exist; for the chat
            template.
        special_ids: Control tokens, which yield no text unless a request wants them.
        bos_id, eos_id: Ids of these two tokens, or None.
        eos_ids: Every token that ends an answer.
        guard: Keeps special tokens in messages from acting as such; it makes the texts that are `is_marked`.
        longest_token: Upper bound of the characters that a token stands for.
        adds_bos: Whether `encode(..., add_special_tokens=True)` starts with the BOS token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int] = (),
        *,
        has_token_types: bool = True,
    ) -> None:
        # The tokenizer.json files of embedding models contain these; a server sets its own limits.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes = token_byte_table(backend)
        self.guard = PromptGuard(self._added[token_id] for token_id in self.special_ids)
        self._marked_backend: tokenizers.Tokenizer | None = None
        self._acting: dict[int, int] = {}  # marked backend's id of a special token -> the token's own id
        self._inner_text: InnerText | None = None
        self._lock = threading.Lock()
        self.vocab_size = len(self._bytes)
        self.longest_token = max(map(len, self._bytes), default=1)  # in bytes, so no fewer than characters
        if isinstance(backend.model, tokenizers.models.WordPiece):  # an unknown word is one token
            self.longest_token = max(self.longest_token, backend.model.max_input_chars_per_word)
        elif isinstance(backend.model, tokenizers.models.WordLevel):  # likewise, however long it is
            self.longest_token = max(self.longest_token, _LONGEST_WORD)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        known = {token_id for token_id in eos_ids if 0 <= token_id < self.vocab_size}
        self.eos_ids = frozenset(known | ({self.eos_id} if self.eos_id is not None else set()))
        self._has_token_types = has_token_types
        self.adds_bos = self.bos_id in self.encode("", add_special_tokens=True)[:1]

    @classmethod
    def from_directory(cls, directory: Path, model_directory: Path | None = None) -> Tokenizer:
        """Read the files of a directory, as `tokenizer_files.py` describes.

        Args:
            model_directory: Directory with the model's configuration, if it is another one.

        Raises:
            ModelLoadError: if there is no vocabulary, or a file is damaged.
        """
        files = read_tokenizer(directory, model_directory or directory)
        return cls(files.backend, files.special_tokens, files.eos_ids, has_token_types=files.has_token_types)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokens: Mapping[str, str] | None = None) -> Tokenizer:
        """Rebuild the tokenizer that a GGUF file's metadata describes.

        Args:
            tokens: Further special tokens by their names, which files may have as plain ones.

        Raises:
            ModelLoadError: if the vocabulary is absent, damaged, or of a kind that is not supported.
        """
        vocab = gguf_vocab.build(metadata)
        added = {"bos": vocab.adds_bos, "eos": vocab.adds_eos}
        named = {name: vocab.special_tokens.get(f"{name}_token") for name, adds in added.items() if adds}
        if vocab.is_of_encoder:
            gguf_encoder_vocab.surround(vocab.backend, named.get("bos"), named.get("eos"), vocab.separator)
        else:
            parts = {name: text for name, text in named.items() if text is not None}
            older_files.surround(vocab.backend, parts)
        tokens = tokens or {}
        known = vocab.backend.get_added_tokens_decoder()
        special = {each.content for each in known.values() if each.special}
        vocab.backend.add_special_tokens([text for text in tokens.values() if text not in special])
        return cls(vocab.backend, {**vocab.special_tokens, **tokens}, vocab.eos_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickling to another process, which rebuilds the tables."""
        state = (self._backend.to_str(), self.special_tokens, self.eos_ids, self._has_token_types)
        return _restored, state

    def encode(self, text: str, *, add_special_tokens: bool, is_marked: bool = False) -> list[int]:
        """Turn text into ids; special tokens in it act as such, but if `is_marked` only after a mark.

        Releases the GIL. Long text belongs in a worker thread: 1 ms encodes about 500 tokens.

        Raises:
            InvalidRequest: if the text has a lone surrogate, which UTF-8 cannot encode.
        """
        # `encode` holds the GIL even in a thread; the batch call does not.
        if is_marked:
            ids = self._encode(self._marked().encode_batch_fast, text, add_special_tokens).ids
            return [self._acting.get(token_id, token_id) for token_id in ids]
        return self._encode(self._backend.encode_batch_fast, text, add_special_tokens).ids

    def encode_inside(self, text: str) -> list[int]:
        """Turn text inside an answer into ids that have exactly its bytes (`inner_text.py`)."""
        with self._lock:
            if self._inner_text is None:
                self._inner_text = InnerText(self._backend, self._bytes, self.special_ids)
        return self._inner_text.encode(text)

    def encode_cut(
        self, text: str, keep: int, *, add_special_tokens: bool, from_left: bool = False
    ) -> list[int]:
        """Turn the beginning or the end of a text into at most `keep` ids; added special tokens are not cut.

        Raises:
            InvalidRequest: as `encode`.
        """
        encoding = self._encode(self._backend.encode_batch_fast, text, False)
        around = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding.truncate(max(keep - around, 0), direction="left" if from_left else "right")
        if add_special_tokens:
            encoding = self._backend.post_process(encoding, None, True)
        return encoding.ids[:keep]

    def encode_pair(
        self, first: str, second: str, *, keep: int | None = None, from_left: bool = False
    ) -> tuple[list[int], int | None]:
        """Turn two texts into the ids of one pair, with special tokens around and between them.

        Also returns the index at which the second segment begins, for models that have token types; None if
        the tokenizer marks no segments.

        Args:
            keep: Maximum number of ids; the second text is cut, at its end or its beginning, to fit. If
                cutting all of it does not suffice, there are more ids.

        Raises:
            InvalidRequest: as `encode`.
        """
        encoding = self._encode(self._backend.encode_batch_fast, (first, second), True)
        ids = encoding.ids
        types = encoding.type_ids if self._has_token_types else []
        over = 0 if keep is None else len(ids) - keep
        span = _span(encoding.sequence_ids, 1) if over > 0 else None
        if span is not None:
            begin, end = span
            cut = slice(begin, min(begin + over, end)) if from_left else slice(max(end - over, begin), end)
            del ids[cut], types[cut]
        return ids, types.index(1) if 1 in types else None

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool, is_marked: bool = False
    ) -> Iterable[tuple[int, int, int]]:
        """Turn text into (id, start, stop), where the token covers bytes [start, stop) of the text's UTF-8.

        Tokens that share a character all cover the whole of it; added special tokens cover nothing. Marks are
        removed first: offsets refer to the text without them. The tuples are made one at a time, because all
        those of a long text take several times its memory.

        Raises:
            InvalidRequest: as `encode`.
        """
        backend = self._marked() if is_marked else self._backend
        encoding = self._encode(backend.encode_batch, text, add_special_tokens)
        ids, offsets = encoding.ids, encoding.offsets
        if is_marked:
            ids = [self._acting.get(token_id, token_id) for token_id in ids]
            offsets = _without_marks(offsets, text, self.guard.mark)
            text = text.replace(self.guard.mark, "")
        if text.isascii():
            return ((token_id, *span) for token_id, span in zip(ids, offsets, strict=True))
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        at = [0, *np.cumsum(widths).tolist()]
        return ((token_id, at[start], at[stop]) for token_id, (start, stop) in zip(ids, offsets, strict=True))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for within running text (b"" for an id without a token)."""
        return self._bytes[token_id] if token_id < self.vocab_size else b""

    @functools.cached_property
    def drops_first_space(self) -> bool:
        """Whether a text loses the space of its first token's bytes, which the vocabulary has put there."""
        words = (at for at, data in enumerate(self._bytes) if data[:1] == b" " and data[1:2].isalpha())
        first = next(words, None)
        return first is not None and not self.decode([first], skip_special_tokens=True).startswith(" ")

    def token_text(self, token_id: int) -> str:
        """Return a token's text for display: a special token's name, U+FFFD for incomplete characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it (`Ġworld`); None for an id without a token."""
        return self._backend.id_to_token(token_id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Turn ids into text; unknown ids yield none. For whole texts; streams use `token_bytes`."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, including what surrounds a text, for other programs to read."""
        self._backend.save(str(path))

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _marked(self) -> tokenizers.Tokenizer:
        """Return a backend that reads special tokens as text unless the mark precedes them.

        Built when a prompt first needs it: the copy takes a quarter of a second (49,000 tokens).
        """
        with self._lock:
            if self._marked_backend is None:
                backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
                backend.encode_special_tokens = True
                known = self._backend.get_added_tokens_decoder()
                for token_id in sorted(self.special_ids):
                    token = known[token_id]
                    flags = {flag: getattr(token, flag) for flag in ("lstrip", "rstrip", "single_word")}
                    marked = self.guard.mark + token.content
                    backend.add_tokens([AddedToken(marked, normalized=False, special=False, **flags)])
                    new_id = backend.token_to_id(marked)
                    assert new_id is not None
                    self._acting[new_id] = token_id
                self._marked_backend = backend
            return self._marked_backend

    def _encode(
        self, encode_batch: Any, text: str | tuple[str, str], add_special_tokens: bool
    ) -> tokenizers.Encoding:
        try:
            encoding: tokenizers.Encoding = encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except TypeError:  # raised for a string that has no UTF-8
            raise InvalidRequest("the text holds half a surrogate pair, which is not a character") from None
        return encoding


def _restored(
    backend: str, special_tokens: Mapping[str, str], eos_ids: Iterable[int], has_token_types: bool
) -> Tokenizer:
    made = tokenizers.Tokenizer.from_str(backend)
    return Tokenizer(made, special_tokens, eos_ids, has_token_types=has_token_types)


def _span(sequence_ids: Sequence[int | None], wanted: int) -> tuple[int, int] | None:
    """Return where the wanted text begins and ends in a pair's tokens; None if it has none."""
    if wanted not in sequence_ids:
        return None
    begin = sequence_ids.index(wanted)
    return begin, begin + sequence_ids.count(wanted)


def _without_marks(offsets: list[tuple[int, int]], text: str, mark: str) -> list[tuple[int, int]]:
    """Convert character offsets in a marked text to offsets in the text without its marks."""
    at = [match.start() for match in re.finditer(mark, text)]
    size = len(mark)
    return [
        (start - size * bisect_left(at, start), stop - size * bisect_left(at, stop))
        for start, stop in offsets
    ]
