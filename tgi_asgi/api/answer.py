"""Parses an answer while it is generated: events in; pieces of content, reasoning and tool calls out."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from tgi_asgi.text.tools import CallStart, Content, Piece, Reasoning
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.harmony import HarmonyParser
from tgi_asgi.types import TokenEvent

Choices = Sequence[Sequence[TokenEvent]]  # each choice's events, for one prompt


@dataclass(frozen=True, slots=True)
class Reading:
    """How to parse the choices of one answer.

    Attributes:
        parser: Makes a parser for one choice.
        marker_ids: The format's markers that are special tokens.
    """

    parser: Callable[[], AnswerParser | HarmonyParser]
    marker_ids: frozenset[int] = frozenset()
    shows_reasoning: bool = True


class LogprobsTracker(Protocol):
    """Collects one choice's log-probabilities, in either endpoint's shape."""

    def push(self, event: TokenEvent) -> None: ...

    def take(self, *, is_whole: bool = False) -> dict[str, Any] | None: ...


class ChoiceReader:
    """Parses one choice: events in, pieces out; without a `reading` everything is content.

    Attributes:
        num_reasoning_tokens: Number of reasoning tokens so far.
        is_reasoning: Whether the text is inside the reasoning section.
    """

    def __init__(self, reading: Reading | None) -> None:
        self._parser = None if reading is None else reading.parser()
        self._shows_reasoning = reading is None or reading.shows_reasoning
        self._num_read = 0
        self._unshown: deque[tuple[int, int, TokenEvent]] = deque()  # with start and end of their text
        self.num_reasoning_tokens = 0

    @property
    def is_reasoning(self) -> bool:
        return self._parser is not None and self._parser.is_reasoning

    def push(self, events: Sequence[TokenEvent], tracker: LogprobsTracker | None = None) -> list[Piece]:
        """Parse new events; return their pieces, with neighbours of one kind merged.

        `tracker` receives only events of content: reasoning and calls have no log-probabilities.
        """
        if self._parser is None:
            if tracker is not None:
                for event in events:
                    tracker.push(event)
            text = "".join([event.text for event in events])
            return [Content(text)] if text else []
        pieces: list[Piece] = []
        for event in events:
            begun = self._num_read
            new = self._push(self._parser, event)
            if tracker is not None:
                self._unshown.append((begun, self._num_read, event))
                self._show(new, tracker)
            pieces += new
        return list(_merged(pieces))

    def _show(self, pieces: Sequence[Piece], tracker: LogprobsTracker) -> None:
        """Pass the tokens of content to the tracker; drop those before it."""
        for piece in pieces:
            if isinstance(piece, Content):
                stop = piece.start + len(piece.text)
                while self._unshown and self._unshown[0][0] < stop:
                    _, end, event = self._unshown.popleft()
                    if end > piece.start or (not event.text and end == piece.start):
                        tracker.push(event)

    def _push(self, parser: AnswerParser | HarmonyParser, event: TokenEvent) -> list[Piece]:
        text = event.text
        was_reasoning = parser.is_reasoning
        self._num_read += len(text)
        pieces = parser.push(text) if text else []
        self.num_reasoning_tokens += was_reasoning or parser.is_reasoning
        if event.finish is not None:
            pieces += parser.finish()
        if not self._shows_reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces


def likeliest(choices: Choices, n: int = 1) -> list[int]:
    """Return the n choices with the highest mean log-probability, best first; if n is all, in given order."""

    def mean(index: int) -> float:
        values = [event.logprob for event in choices[index] if event.logprob is not None]
        return math.fsum(values) / len(values) if values else -math.inf

    every = list(range(len(choices)))
    return every if len(every) == n else sorted(every, key=mean, reverse=True)[:n]


def _merged(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield pieces with the texts of neighbours of one kind joined; each call's start stays alone."""
    for _, group in groupby(pieces, type):
        first, *others = group
        if isinstance(first, CallStart) or not others:
            yield first
            yield from others
        else:  # joined at once: 100,000 pieces, one after the other, take 12 s
            texts = [each.text for each in (first, *others) if not isinstance(each, CallStart)]
            yield dataclasses.replace(first, text="".join(texts))
