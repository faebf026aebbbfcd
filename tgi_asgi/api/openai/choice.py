"""A chat's choice that has more than text: reasoning and tool calls, as deltas or as a whole message."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson

from tgi_asgi.api.answer import TEXT_ONLY, ChoiceReader, LogprobsTracker, Reading
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent

_FINISH = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}


def finish_of(event: TokenEvent) -> str:
    """Return OpenAI's word for the end of a choice."""
    assert event.finish is not None
    return _FINISH[event.finish]


class ChatChoice:
    """One choice: its events in, deltas or a message out.

    Args:
        is_named: the client chose the function to call.
    """

    def __init__(self, reading: Reading | None, *, is_named: bool = False, is_compat: bool = False) -> None:
        self.reader = ChoiceReader(reading or TEXT_ONLY)
        self._is_named = is_named
        self._is_compat = is_compat
        self._calls: list[dict[str, Any]] = []

    def deltas(self, events: Sequence[TokenEvent], tracker: LogprobsTracker | None = None) -> list[bytes]:
        """Return what new events tell, as the `delta`s of chunks."""
        pieces = self.reader.push(events, tracker)
        return [b'"delta":' + orjson.dumps(self._delta(piece)) for piece in pieces]

    def message(self, events: Sequence[TokenEvent], tracker: LogprobsTracker | None = None) -> dict[str, Any]:
        """Return a whole answer as an assistant's message."""
        pieces = self.reader.push(events, tracker)
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        for piece in pieces:
            if isinstance(piece, CallStart):
                self._start(piece)
            elif isinstance(piece, CallArguments):
                self._calls[-1]["function"]["arguments"] += piece.text
        if self._is_compat and self._calls:
            for call in self._calls:
                call["function"] = {"description": None, **call["function"]}
            return {"role": "assistant", "tool_calls": self._calls}
        has_text = bool(content) or not (self._calls or self.reader.is_reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": content if has_text else None}
        message["refusal"] = None
        if self._calls:
            message["tool_calls"] = self._calls
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        return message

    def finish_reason(self, event: TokenEvent) -> str:
        """Return OpenAI's word for the end of the choice."""
        is_call = self._calls and event.finish is FinishReason.EOS
        return "tool_calls" if is_call and not (self._is_named or self._is_compat) else finish_of(event)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        on_top = {"role": "assistant"} if self._is_compat else {}
        if isinstance(piece, Content):
            return {**on_top, "content": piece.text}
        if isinstance(piece, Reasoning):
            return {**on_top, "reasoning_content": piece.text, "reasoning": piece.text}
        if isinstance(piece, CallStart):
            call = {"index": len(self._calls), **self._start(piece)}
        else:
            call = {"index": len(self._calls) - 1, "function": {"arguments": piece.text}}
            if self._is_compat:  # TGI repeats all but the name
                call |= {"id": self._calls[-1]["id"], "type": "function"}
                call["function"] = {"name": None, "arguments": piece.text}
        return {**on_top, "tool_calls": [call]}

    def _start(self, piece: CallStart) -> dict[str, Any]:
        call_id = "0" if self._is_compat else f"call_{secrets.token_hex(12)}"
        call = {"id": call_id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
        self._calls.append(call)
        return call
