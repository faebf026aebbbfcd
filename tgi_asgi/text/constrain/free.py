"""Where an answer's text is free: no mask is needed before the first token of a mark, as of a tool call.

What the grammar forbids there is the same whatever was written, so the sampler is given it once. Except for
pieces of characters: which of them may come depends on the token before, and they are left to the model, as
in an answer without a grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.grammar import Matcher, Vocabulary
    from tgi_asgi.text.constrain.source import GrammarSource

MAX_MASKED = 1024  # tokens that free text must not hold: more are left to masks


@dataclass(frozen=True, slots=True)
class Part:
    """One free part of an answer.

    Attributes:
        masked_ids: tokens that the grammar does not allow in it.
        wakes: tokens behind which the grammar decides: they begin a mark, or have it in them.
        following: the part behind each mark that is a token of its own.
        otherwise: the part behind any other token.
    """

    masked_ids: tuple[int, ...]
    wakes: frozenset[int]
    following: Mapping[int, int]
    otherwise: int


class FreeText:
    """The parts of a grammar's answers, of which the first is where an answer begins."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def watch(self) -> Watch:
        """Return the state of one choice that has no token yet."""
        return Watch(self._parts)

    def constrained(self, token_ids: Sequence[int]) -> list[int]:
        """Return what a matcher must read of an answer: the marks before free parts, and what is not free."""
        watch, marks = self.watch(), list[int]()
        for index, token_id in enumerate(token_ids):
            if token_id in watch.part.following:
                marks.append(token_id)
            if watch.push(token_id) and watch.is_over:
                return [*marks, *token_ids[index:]]
        return marks


class Watch:
    """Whether a choice still writes free text.

    Attributes:
        part: where it is, while it does.
        is_over: it does not, from the token pushed last on.
    """

    __slots__ = ("_parts", "is_over", "part")

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.part = parts[0]
        self.is_over = False

    def push(self, token_id: int) -> bool:
        """Take the next token; tell whether another part begins with it, or what is not free."""
        part = self.part
        if token_id in part.wakes:
            self.is_over = True
            return True
        self.part = self._parts[part.following.get(token_id, part.otherwise)]
        return self.part is not part


@dataclass(frozen=True, slots=True)
class Mark:
    """How a mark shows among tokens: as one of its own, or as the tokens that can begin or hold its text."""

    own_id: int | None
    wakes: frozenset[int]

    @classmethod
    def of(cls, expression: str, texts: Iterable[tuple[int, bytes]]) -> Mark:
        """Read a mark as grammars write it; `texts` are the tokens that are no special ones."""
        if expression.startswith("<["):
            own_id = int(expression[2 : expression.index("]")])  # text may follow it
            return cls(own_id, frozenset((own_id,)))
        text: bytes = json.loads(expression).encode()
        heads = tuple(text[:size] for size in range(1, len(text)))
        return cls(None, frozenset(i for i, data in texts if text in data or data.endswith(heads or text)))


class FreeTexts:
    """Finds what is free in grammars of one vocabulary; remembers the marks, which are a model's few."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._marks: dict[str, Mark] = {}

    def find(self, source: GrammarSource, matcher: Callable[[Sequence[int]], Matcher]) -> FreeText | None:
        """Return where answers are free; None if they are not, or what they must not hold is too much.

        Args:
            matcher: makes one of the compiled grammar, behind some tokens.
        """
        if not source.free:
            return None
        marks = [self._mark(expression) for expression in source.free]
        opening = self._mark(source.opening) if source.opening else None
        plain = self._plain([*marks, opening] if opening is not None else marks)
        if plain is None:
            return None
        parts: list[Part] = []
        path: list[int] = []  # the marks before the part
        if opening is not None:
            own = {} if opening.own_id is None else {opening.own_id: 1}
            wakes = opening.wakes.difference(own) | marks[1].wakes
            parts.append(Part(self._forbidden(matcher([])), wakes, own, 2))
            path += own
        for at, mark in enumerate(marks, start=len(parts)):
            is_last = mark is marks[-1]
            own = {} if mark.own_id is None or is_last else {mark.own_id: at + 1}
            # What is behind an optional part is where an answer without it is, too.
            before = [] if opening is not None and is_last else path
            masked_ids = self._forbidden(matcher([*before, plain]))
            parts.append(Part(masked_ids, mark.wakes.difference(own), own, at))
            path += own
        return FreeText(parts) if all(len(part.masked_ids) <= MAX_MASKED for part in parts) else None

    def _mark(self, expression: str) -> Mark:
        if expression not in self._marks:
            self._marks[expression] = Mark.of(expression, self._texts())
        return self._marks[expression]

    def _plain(self, marks: Sequence[Mark]) -> int | None:
        """Return a token that is text and nothing else."""
        for token_id, data in self._texts():
            if data.isalpha() and data.isascii() and not any(token_id in mark.wakes for mark in marks):
                return token_id
        return None

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        """Return the tokens that are no special ones."""
        tokenizer = self._tokenizer
        for token_id in range(min(tokenizer.vocab_size, self._vocab_size)):
            if token_id not in tokenizer.special_ids:
                yield token_id, tokenizer.token_bytes(token_id)

    def _forbidden(self, matcher: Matcher) -> tuple[int, ...]:
        """Return the tokens that cannot follow, pieces of characters aside."""
        mask = np.zeros(-(-self._vocab_size // 32), np.int32)
        matcher.fill_mask(mask)
        flags = np.unpackbits(mask.view(np.uint8), count=self._vocab_size, bitorder="little")
        return tuple(token_id for token_id in np.flatnonzero(flags == 0).tolist() if self._is_whole(token_id))

    def _is_whole(self, token_id: int) -> bool:
        """Tell whether a token is whole characters, or special."""
        if token_id >= self._tokenizer.vocab_size or token_id in self._tokenizer.special_ids:
            return True
        try:
            self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return False
        return True
