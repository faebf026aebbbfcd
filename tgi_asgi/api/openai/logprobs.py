"""Log-probabilities in OpenAI's two formats, released together with the text that they belong to.

A tracker receives every event of one choice and releases the entries of tokens whose text has been shown. If
a stop string cuts off text, the entries of tokens wholly inside it are dropped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from tgi_asgi.text.detokenize import Utf8Assembler
from tgi_asgi.types import PromptLogprobs, TokenEvent

if TYPE_CHECKING:  # imports a library that is not needed before the model has loaded
    from tgi_asgi.text.tokenizer import Tokenizer

_SMALLEST = -9999.0  # JSON has no infinity


class TokenNames:
    """Spelling of tokens in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def bytes_of(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id) or self._tokenizer.token_text(token_id).encode()

    def name(self, token_id: int, data: bytes) -> str:
        """Return the token as text; if it is part of a character, as `bytes:` and its escaped bytes."""
        if self._as_ids:
            return f"token_id:{token_id}"
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class JsonList:
    """A list that grows, kept as JSON: an entry with 20 alternatives takes 1.7 KB, and 9 KB as objects."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items = bytearray()  # separated by commas

    def __bool__(self) -> bool:
        return bool(self._items)

    def append(self, item: object) -> None:
        """Add an item."""
        self._separate()
        self._items += orjson.dumps(item)

    def extend(self, other: JsonList) -> None:
        """Add the items of another list."""
        if other:
            self._separate()
            self._items += other._items

    def json(self) -> orjson.Fragment:
        """Return a copy that can be part of JSON."""
        return orjson.Fragment(b"".join((b"[", self._items, b"]")))

    def _separate(self) -> None:
        if self._items:
            self._items += b","


class _Tracker:
    """Holds one choice's tokens back until their text is shown, and their entries until they are sent.

    Args:
        keeps_hidden: Whether tokens without text (EOS, stop ids, special tokens) have entries.
    """

    def __init__(self, names: TokenNames, *, keeps_hidden: bool) -> None:
        self._names = names
        self._keeps_hidden = keeps_hidden
        self._assembler = Utf8Assembler()
        self._num_decoded = 0  # characters of all tokens so far
        self._num_shown = 0
        self._held: deque[tuple[int, TokenEvent]] = deque()  # with the start of the token's text

    def _released(self, event: TokenEvent) -> Iterator[tuple[int, TokenEvent]]:
        """Receive one event; yield (first character, event) of every token that is shown now."""
        held = self._held
        if event.data or self._keeps_hidden:
            held.append((self._num_decoded, event))
        self._num_decoded += len(self._assembler.push(event.data))
        self._num_shown += len(event.text)
        is_uncut_end = event.finish is not None and not isinstance(event.stop, str)
        while held and (is_uncut_end or held[0][0] < self._num_shown):
            yield held.popleft()


class ChatLogprobs(_Tracker):
    """One choice's entries in the format of chat completions.

    Args:
        lists_none: Whether an entry without alternatives has an empty list of them.
    """

    def __init__(self, names: TokenNames, *, lists_none: bool = True) -> None:
        super().__init__(names, keeps_hidden=False)
        self._lists_none = lists_none
        self._waiting = JsonList()

    def push(self, event: TokenEvent) -> None:
        """Receive one event of the choice."""
        for _, shown in self._released(event):
            entry = self._entry(shown.token_id, shown.data, shown.logprob)
            if shown.top or self._lists_none:
                entry["top_logprobs"] = [
                    self._entry(token_id, self._names.bytes_of(token_id), logprob)
                    for token_id, logprob in shown.top or ()
                ]
            self._waiting.append(entry)

    def take(self, *, is_whole: bool = False) -> dict[str, Any] | None:
        """Return the entries that may be sent now; None if there are none, unless the answer `is_whole`."""
        if not (self._waiting or is_whole):
            return None
        return {"content": self.take_entries().json(), "refusal": None}

    def take_entries(self) -> JsonList:
        """Return the entries that may be sent now, on their own."""
        waiting, self._waiting = self._waiting, JsonList()
        return waiting

    def _entry(self, token_id: int, data: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": self._names.name(token_id, data), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionLogprobs(_Tracker):
    """One choice's entries in the format of text completions.

    Args:
        k: Number of alternatives per entry; 0: none.
        prompt: Text before the choice's own.
    """

    def __init__(self, names: TokenNames, k: int, prompt: str) -> None:
        super().__init__(names, keeps_hidden=True)
        self._k = k
        self._prompt = prompt
        self._begin()

    def _begin(self) -> None:
        # Per token: name, log-probability, alternatives' log-probabilities by name, offset in the text.
        self._tokens, self._values, self._tops, self._starts = (JsonList() for _ in range(4))

    def push_prompt(self, ids: Sequence[int], logprobs: PromptLogprobs, special_ids: frozenset[int]) -> None:
        """Receive the prompt's tokens, with which an echoed answer starts."""
        data = [self._names.bytes_of(token_id) for token_id in ids]
        offsets = self._offsets(data, [token_id in special_ids for token_id in ids])
        for token_id, own, offset, (logprob, best) in zip(ids, data, offsets, logprobs, strict=True):
            self._add(token_id, own, logprob, best, offset)

    def push(self, event: TokenEvent) -> None:
        """Receive one event of the choice."""
        for start, shown in self._released(event):
            data = shown.data or self._names.bytes_of(shown.token_id)
            self._add(shown.token_id, data, shown.logprob, shown.top, len(self._prompt) + start)

    def _offsets(self, data: Sequence[bytes], are_special: Sequence[bool]) -> list[int]:
        """Return the offset in the prompt's text at which each token begins.

        Searches from the end, because a truncated prompt has only the last tokens. The tokenizer may have
        added special tokens that are not in the text (BOS).
        """
        assembler = Utf8Assembler()
        texts = [assembler.push(own) for own in data]
        texts[-1] += assembler.flush()
        offset = len(self._prompt)
        offsets = []
        for text, is_special in zip(reversed(texts), reversed(are_special), strict=True):
            if not is_special or self._prompt.endswith(text, 0, offset):
                offset = max(offset - len(text), 0)
            offsets.append(offset)
        return offsets[::-1]

    def take(self, *, is_whole: bool = False) -> dict[str, Any] | None:
        """Return the entries that may be sent now; None if there are none, unless the answer `is_whole`."""
        if not (self._tokens or is_whole):
            return None
        taken = {
            "tokens": self._tokens.json(),
            "token_logprobs": self._values.json(),
            "top_logprobs": self._tops.json() if self._k else None,
            "text_offset": self._starts.json(),
        }
        self._begin()
        return taken

    def _add(
        self, token_id: int, data: bytes, logprob: float | None,
        best: Sequence[tuple[int, float]] | None, offset: int,
    ) -> None:  # fmt: skip
        self._tokens.append(self._names.name(token_id, data))
        self._starts.append(offset)
        self._values.append(None if logprob is None else _finite(logprob))
        if not self._k:
            return
        if logprob is None:  # a prompt's first token has none
            self._tops.append(None)
            return
        top: dict[str, float] = {}
        for other_id, other in [*(best or ()), (token_id, logprob)]:
            other_data = data if other_id == token_id else self._names.bytes_of(other_id)
            other_name = self._names.name(other_id, other_data)
            # Two ids may have the same name; clients look up the sampled token's value by its name.
            top[other_name] = max(_finite(other), top.get(other_name, -math.inf))
        self._tops.append(top)


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else _SMALLEST
