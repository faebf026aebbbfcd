"""Anthropic's messages from token events: content blocks and their events, or the whole; and its errors."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson

from tgi_asgi.api.answer import ChoiceReader
from tgi_asgi.api.call import Choices, Generation
from tgi_asgi.api.errors import Dialect, message_of, rule_of
from tgi_asgi.errors import ContextExceeded, InvalidRequest, TgiError
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent

Event = dict[str, Any]
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _envelope(error: BaseException) -> dict[str, Any]:
    status = rule_of(error).status
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = message_of(error)
    if isinstance(error, ContextExceeded):  # by these words agents know that they have to summarise
        message = f"prompt is too long: {error.num_tokens} tokens > {error.most} maximum"
    described: dict[str, Any] = {"type": kind, "message": message}
    if isinstance(error, InvalidRequest) and error.code == "thread_unsupported_request":
        described["details"] = {"error_code": error.code, "unsupported": [error.param]}
    return {"type": "error", "error": described}


ANTHROPIC = Dialect("anthropic", _envelope, names={"prompt": "messages"})


class MessageRenderer:
    """Turns the token events of one choice into content blocks and their events."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._reader = ChoiceReader(generation.jobs[0].reading)
        self._id = f"msg_{secrets.token_hex(12)}"
        self._has_begun = False
        self._num_generated = 0
        self._blocks: list[dict[str, Any]] = []
        self._inputs: list[str] = []  # by block: the text of a call's arguments
        self._kind: type[Piece] | None = None  # of the block that is open
        self._stop: tuple[str | None, str | None] = (None, None)

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the events that new tokens make."""
        # Made into bytes at once: the message changes with what is taken next.
        return self._begin() + b"".join(map(_frame, self._take(events)))

    def whole(self, parts: Sequence[Choices]) -> bytes:
        """Return the message."""
        self._take(parts[0][0])
        return orjson.dumps(self._message())

    def _begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        return _frame({"type": "message_start", "message": self._message()})

    def _take(self, events: Sequence[TokenEvent]) -> list[Event]:
        """Take new tokens; return what they make."""
        self._num_generated += len(events)
        made: list[Event] = []
        for piece in self._reader.push(events):
            made += self._add(piece)
        last = events[-1]
        if last.finish is None:
            return made
        if not self._blocks:
            made += self._open(Content(""), Content)
        made += self._close()
        self._stop = self._stop_of(last)
        reason, sequence = self._stop
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        made.append({"type": "message_delta", "delta": delta, "usage": self._usage()})
        return [*made, {"type": "message_stop"}]

    def close(self) -> bytes:
        """Return nothing: the last event says that it is the last."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the error as an event."""
        return self._begin() + _frame(_envelope(error))

    def _message(self) -> dict[str, Any]:
        """Return the message as it is now."""
        for block, text in zip(self._blocks, self._inputs, strict=True):
            if block["type"] == "tool_use":
                block["input"] = _parsed(text)
        reason, sequence = self._stop
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._generation.model,
            "content": self._blocks,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _add(self, piece: Piece) -> list[Event]:
        kind = CallStart if isinstance(piece, CallArguments) else type(piece)
        made: list[Event] = []
        if isinstance(piece, CallStart) or kind is not self._kind:
            made = [*self._close(), *self._open(piece, kind)]
        if isinstance(piece, CallStart):
            return made
        block = self._blocks[-1]
        if isinstance(piece, CallArguments):
            self._inputs[-1] += piece.text
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        else:
            name = block["type"]
            block[name] += piece.text
            delta = {"type": f"{name}_delta", name: piece.text}
        return [*made, {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}]

    def _open(self, piece: Piece, kind: type[Piece]) -> list[Event]:
        block: dict[str, Any]
        if isinstance(piece, CallStart):
            block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": piece.name}
            block["input"] = {}
        elif isinstance(piece, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self._kind = kind
        self._blocks.append(block)
        self._inputs.append("")
        index = len(self._blocks) - 1
        return [{"type": "content_block_start", "index": index, "content_block": dict(block)}]

    def _close(self) -> list[Event]:
        if self._kind is None:
            return []
        self._kind = None
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _stop_of(self, event: TokenEvent) -> tuple[str, str | None]:
        if event.finish is FinishReason.LENGTH:
            return "max_tokens", None
        if isinstance(event.stop, str):
            return "stop_sequence", event.stop
        is_call = any(block["type"] == "tool_use" for block in self._blocks)
        return ("tool_use" if is_call else "end_turn"), None

    def _usage(self) -> dict[str, Any]:
        cached = self._generation.num_cached_tokens
        return {
            "input_tokens": self._generation.num_prompt_tokens - cached,
            "output_tokens": self._num_generated,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }


def _frame(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))


def _parsed(text: str) -> Any:
    """Return a call's arguments; what `max_tokens` has cut is no JSON, and so nothing."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
