"""Where an answer's text is free: no mask is needed before the first token of a mark, as of a tool call.

What the grammar forbids there is the same whatever was written, so the sampler is given it once. Except for
pieces of characters: which of them may come depends on the token before, and they are left to the model, as
in an answer without a grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


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
            own_id = int(expression[2:-2])
            return cls(own_id, frozenset((own_id,)))
        text: bytes = json.loads(expression).encode()
        heads = tuple(text[:size] for size in range(1, len(text)))
        return cls(None, frozenset(i for i, data in texts if text in data or data.endswith(heads or text)))
