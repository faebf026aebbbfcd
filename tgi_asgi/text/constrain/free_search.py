"""The search for the parts of a grammar's answers in which text is free (`free_text.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tgi_asgi.text.constrain.free_text import FreePart, FreeText
from tgi_asgi.text.constrain.grammar import Matcher
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.text.constrain.vocabulary import Vocabulary

MAX_MASKED = 1024  # tokens forbidden in free text; a grammar with more uses masks


@dataclass(frozen=True, slots=True)
class TokenMark:
    """A mark as tokens: a single token of its own, or the tokens that can begin or contain its text."""

    own_id: int | None
    wakes: frozenset[int]

    @classmethod
    def of(cls, expression: str, texts: Iterable[tuple[int, bytes]]) -> TokenMark:
        """Read a mark's grammar expression; `texts` are the tokens that are not special."""
        if expression.startswith("<["):
            own_id = int(expression[2 : expression.index("]")])  # text may follow it
            return cls(own_id, frozenset((own_id,)))
        text: bytes = json.loads(expression).encode()
        heads = tuple(text[:size] for size in range(1, len(text)))
        return cls(None, frozenset(i for i, data in texts if text in data or data.endswith(heads or text)))


class FreeTexts:
    """A search for the free parts of grammars of one vocabulary, with a cache of the model's few marks."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._marks: dict[str, TokenMark] = {}

    def find(self, source: GrammarSource, matcher: Callable[[Sequence[int]], Matcher]) -> FreeText | None:
        """Return where answers are free; None if nowhere, or if too many tokens would have to be masked.

        Args:
            matcher: Makes a matcher of the compiled grammar, after some tokens.
        """
        if not source.free:
            return None
        marks = [self._mark(expression) for expression in source.free]
        opening = self._mark(source.opening) if source.opening else None
        others = [self._mark(expression) for expression in source.wakers]
        waking = frozenset[int]().union(*(mark.wakes for mark in others))
        plain = self._plain([*marks, *others, *([opening] if opening is not None else [])])
        if plain is None:
            return None
        parts: list[FreePart] = []
        path: list[int] = []  # the marks before the part
        if opening is not None:
            own = {} if opening.own_id is None else {opening.own_id: 1}
            wakes = opening.wakes.difference(own) | marks[1].wakes
            parts.append(FreePart(self._forbidden(matcher([])), wakes, own, 2))
            path += own
        for at, mark in enumerate(marks, start=len(parts)):
            is_last = mark is marks[-1]
            own = {} if mark.own_id is None or is_last else {mark.own_id: at + 1}
            # An answer without the optional part is in the same state as after that part.
            before = [] if opening is not None and is_last else path
            masked_ids = self._forbidden(matcher([*before, plain]))
            parts.append(FreePart(masked_ids, mark.wakes.difference(own) | waking, own, at))
            path += own
        return FreeText(parts) if all(len(part.masked_ids) <= MAX_MASKED for part in parts) else None

    def _mark(self, expression: str) -> TokenMark:
        if expression not in self._marks:
            self._marks[expression] = TokenMark.of(expression, self._texts())
        return self._marks[expression]

    def _plain(self, marks: Sequence[TokenMark]) -> int | None:
        """Return a token that is plain text and nothing else."""
        for token_id, data in self._texts():
            if data.isalpha() and data.isascii() and not any(token_id in mark.wakes for mark in marks):
                return token_id
        return None

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        """Yield the tokens that are not special."""
        tokenizer = self._tokenizer
        for token_id in range(min(tokenizer.vocab_size, self._vocab_size)):
            if token_id not in tokenizer.special_ids:
                yield token_id, tokenizer.token_bytes(token_id)

    def _forbidden(self, matcher: Matcher) -> tuple[int, ...]:
        """Return the tokens that cannot follow, except those with incomplete characters."""
        mask = np.zeros(-(-self._vocab_size // 32), np.int32)
        matcher.fill_mask(mask)
        flags = np.unpackbits(mask.view(np.uint8), count=self._vocab_size, bitorder="little")
        return tuple(token_id for token_id in np.flatnonzero(flags == 0).tolist() if self._is_whole(token_id))

    def _is_whole(self, token_id: int) -> bool:
        """Return whether a token consists of whole characters, or is special."""
        if token_id >= self._tokenizer.vocab_size or token_id in self._tokenizer.special_ids:
            return True
        try:
            self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return False
        return True
