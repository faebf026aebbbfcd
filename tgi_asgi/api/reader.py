"""An answer taken apart while it is generated: content, reasoning and tool calls, in no API's words."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tgi_asgi.text.tools import CallStart, Content, Piece, Reasoning, ToolFormat, ToolSpec
from tgi_asgi.text.tools.reasoning import ReasoningStyle
from tgi_asgi.text.tools.reply import ReplyParser
from tgi_asgi.types import TokenEvent


@dataclass(frozen=True, slots=True)
class Reading:
    """How the choices of one answer are to be read."""

    style: ReasoningStyle | None = None
    tools: ToolFormat | None = None
    is_reasoning_open: bool = False
    shows_reasoning: bool = True
    specs: Sequence[ToolSpec] = ()  # the tools that may be called
    special_ids: frozenset[int] = frozenset()  # their text is shown by the engine, and dropped unless kept
    kept: frozenset[int] = frozenset()  # the markers among them
    must_call: bool = False


TEXT_ONLY = Reading()


class LogprobsTracker(Protocol):
    """One choice's log-probabilities, in either endpoint's shape."""

    def push(self, event: TokenEvent) -> None: ...

    def take(self) -> dict[str, Any] | None: ...


class ChoiceReader:
    """One choice: its events in, pieces out.

    Attributes:
        num_reasoning_tokens: so far.
        is_reasoning: the text is inside the reasoning section.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parser = ReplyParser(
            reading.style,
            reading.tools,
            reading.specs,
            is_reasoning_open=reading.is_reasoning_open,
            must_call=reading.must_call,
        )
        self._num_read = 0
        self._unshown: deque[tuple[int, int, TokenEvent]] = deque()  # with where their text starts and ends
        self.num_reasoning_tokens = 0

    @property
    def is_reasoning(self) -> bool:
        return self._parser.is_reasoning

    def push(self, events: Sequence[TokenEvent], tracker: LogprobsTracker | None = None) -> list[Piece]:
        """Take new events; return what they tell, neighbours of a kind as one piece.

        `tracker` gets the events that are not of reasoning or calls: those have no log-probabilities.
        """
        pieces: list[Piece] = []
        for event in events:
            begun = self._num_read
            new = self._push(event)
            if tracker is not None:
                self._unshown.append((begun, self._num_read, event))
                self._show(new, tracker)
            pieces += new
        return _merged(pieces)

    def _show(self, pieces: Sequence[Piece], tracker: LogprobsTracker) -> None:
        """Give the tracker the tokens that content is made of; forget those before it."""
        for piece in pieces:
            if isinstance(piece, Content):
                stop = piece.start + len(piece.text)
                while self._unshown and self._unshown[0][0] < stop:
                    _, end, event = self._unshown.popleft()
                    if end > piece.start or (not event.text and end == piece.start):
                        tracker.push(event)

    def _push(self, event: TokenEvent) -> list[Piece]:
        text = event.text
        reading = self._reading
        if event.token_id in reading.special_ids and event.token_id not in reading.kept:
            text = text.removesuffix(event.data.decode("utf-8", "replace"))
        was_reasoning = self._parser.is_reasoning
        self._num_read += len(text)
        pieces = self._parser.push(text) if text else []
        self.num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
        if event.finish is not None:
            pieces += self._parser.finish()
        if not reading.shows_reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, CallStart) or isinstance(last, CallStart) or type(last) is not type(piece):
            result.append(piece)
        else:
            result[-1] = dataclasses.replace(last, text=last.text + piece.text)
    return result
