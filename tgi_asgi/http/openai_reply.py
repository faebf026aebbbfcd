"""Answers that have more than text: reasoning and tool calls, in OpenAI's shapes, streamed and whole."""

from __future__ import annotations

import dataclasses
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from tgi_asgi.http.openai_answer import finish_of
from tgi_asgi.text.tools.reasoning import ReasoningStyle
from tgi_asgi.text.tools.reply import ReplyParser
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning, ToolFormat, ToolSpec
from tgi_asgi.types import FinishReason, TokenEvent


@dataclass(frozen=True, slots=True)
class ReplyPlan:
    """How the choices of one answer are to be read."""

    style: ReasoningStyle | None
    tools: ToolFormat | None
    is_reasoning_open: bool
    is_named: bool
    shows_reasoning: bool
    is_compat: bool
    specs: Sequence[ToolSpec] = ()  # the tools that may be called
    special_ids: frozenset[int] = frozenset()  # their text is shown by the engine, and dropped unless kept
    kept: frozenset[int] = frozenset()  # the markers among them
    must_call: bool = False

    def replies(self, n: int) -> list[ChoiceReply]:
        """Return a reader for each of n choices."""
        return [ChoiceReply(self) for _ in range(n)]


TEXT_ONLY = ReplyPlan(
    None, None, is_reasoning_open=False, is_named=False, shows_reasoning=True, is_compat=False
)


class LogprobsTracker(Protocol):
    """One choice's log-probabilities, in either endpoint's shape."""

    def push(self, event: TokenEvent) -> None: ...

    def take(self) -> dict[str, Any] | None: ...


class ChoiceReply:
    """One choice: its events in, pieces out, and what they add up to.

    Attributes:
        num_reasoning_tokens: so far; they count in `completion_tokens`, too.
    """

    def __init__(self, plan: ReplyPlan) -> None:
        self._plan = plan
        self._parser = ReplyParser(
            plan.style,
            plan.tools,
            plan.specs,
            is_reasoning_open=plan.is_reasoning_open,
            must_call=plan.must_call,
        )
        self._calls: list[dict[str, Any]] = []
        self._num_read = 0
        self._unshown: deque[tuple[int, int, TokenEvent]] = deque()  # with where their text starts and ends
        self.num_reasoning_tokens = 0

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
        if event.token_id in self._plan.special_ids and event.token_id not in self._plan.kept:
            text = text.removesuffix(event.data.decode("utf-8", "replace"))
        was_reasoning = self._parser.is_reasoning
        self._num_read += len(text)
        pieces = self._parser.push(text) if text else []
        self.num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
        if event.finish is not None:
            pieces += self._parser.finish()
        if not self._plan.shows_reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces

    def finish_reason(self, event: TokenEvent) -> str:
        """Return OpenAI's word for the end of the choice."""
        is_call = self._calls and event.finish is FinishReason.EOS
        if is_call and not self._plan.is_named and not self._plan.is_compat:
            return "tool_calls"
        return finish_of(event)

    def delta(self, piece: Piece) -> bytes:
        """Return a piece as the `delta` of a chunk, as JSON; pieces must be given in order."""
        return b'"delta":' + orjson.dumps(self._delta(piece))

    def message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a whole answer as an assistant's message."""
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        for piece in pieces:
            if isinstance(piece, CallStart):
                self._start(piece)
            elif isinstance(piece, CallArguments):
                self._calls[-1]["function"]["arguments"] += piece.text
        if self._plan.is_compat and self._calls:
            for call in self._calls:
                call["function"] = {"description": None, **call["function"]}
            return {"role": "assistant", "tool_calls": self._calls}
        has_text = bool(content) or not (self._calls or self._parser.is_reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if has_text else None,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = self._calls
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        return message

    def _delta(self, piece: Piece) -> dict[str, Any]:
        on_top = {"role": "assistant"} if self._plan.is_compat else {}
        if isinstance(piece, Content):
            return {**on_top, "content": piece.text}
        if isinstance(piece, Reasoning):
            return {**on_top, "reasoning_content": piece.text, "reasoning": piece.text}
        if isinstance(piece, CallStart):
            call = {"index": len(self._calls), **self._start(piece)}
        else:
            call = {"index": len(self._calls) - 1, "function": {"arguments": piece.text}}
            if self._plan.is_compat:  # TGI repeats all but the name
                call |= {"id": self._calls[-1]["id"], "type": "function"}
                call["function"] = {"name": None, "arguments": piece.text}
        return {**on_top, "tool_calls": [call]}

    def _start(self, piece: CallStart) -> dict[str, Any]:
        call_id = "0" if self._plan.is_compat else f"call_{secrets.token_hex(12)}"
        call = {"id": call_id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
        self._calls.append(call)
        return call


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, CallStart) or isinstance(last, CallStart) or type(last) is not type(piece):
            result.append(piece)
        else:
            result[-1] = dataclasses.replace(last, text=last.text + piece.text)
    return result
