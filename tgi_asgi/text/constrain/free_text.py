"""Where an answer's text is free: before the first token of a mark, such as a tool call's, no mask is needed.

In free text the grammar forbids the same tokens at every position, so the sampler gets them once. Tokens with
incomplete characters are an exception: which of them may come depends on the token before. They are left to
the model, as in an answer without a grammar. `free_search.py` finds the parts of a grammar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FreePart:
    """One free part of an answer.

    Attributes:
        masked_ids: Tokens that the grammar does not allow in this part.
        wakes: Tokens after which the grammar decides: they begin a mark or contain one.
        following: The part after each mark that is a single token.
        otherwise: The part after any other token.
    """

    masked_ids: tuple[int, ...]
    wakes: frozenset[int]
    following: Mapping[int, int]
    otherwise: int


class FreeText:
    """The free parts of a grammar's answers; an answer begins in the first one."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[FreePart]) -> None:
        self._parts = parts

    def watch(self) -> Watch:
        """Return the state of a choice that has no token yet."""
        return Watch(self._parts)

    def constrained(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens a matcher must read: the marks before free parts, and all that is not free."""
        watch, marks = self.watch(), list[int]()
        for index, token_id in enumerate(token_ids):
            if token_id in watch.part.following:
                marks.append(token_id)
            if watch.push(token_id) and watch.is_over:
                return [*marks, *token_ids[index:]]
        return marks


class Watch:
    """The position of a choice in free text, and whether it still writes any.

    Attributes:
        part: The current part, while the text is free.
        is_over: Whether constrained text has begun, with the newest token.
    """

    __slots__ = ("_parts", "is_over", "part")

    def __init__(self, parts: Sequence[FreePart]) -> None:
        self._parts = parts
        self.part = parts[0]
        self.is_over = False

    def push(self, token_id: int) -> bool:
        """Process the next token; return whether another part, or constrained text, begins with it."""
        part = self.part
        if token_id in part.wakes:
            self.is_over = True
            return True
        self.part = self._parts[part.following.get(token_id, part.otherwise)]
        return self.part is not part
