"""Anthropic's messages from token events, as content block events or complete; and its errors."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson

from tgi_asgi.api.answer import ChoiceReader, Choices
from tgi_asgi.api.call import Generation, Renderer
from tgi_asgi.api.errors import Dialect, message_of, rule_of
from tgi_asgi.api.thoughts import sealed
from tgi_asgi.api.tools import whole_arguments
from tgi_asgi.errors import ContextExceeded, InvalidRequest, TgiError
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent

Event = dict[str, Any]
_KINDS = {Content: "text", Reasoning: "thinking", CallStart: "tool_use", CallArguments: "tool_use"}
_ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def _envelope(error: BaseException) -> dict[str, Any]:
    status = rule_of(error).status
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = message_of(error)
    if isinstance(error, ContextExceeded):  # agents recognise from this wording that they must summarise
        message = f"prompt is too long: {error.num_tokens} tokens > {error.max_tokens} maximum"
    described: dict[str, Any] = {"type": kind, "message": message}
    if isinstance(error, InvalidRequest) and error.code == "thread_unsupported_request":
        described["details"] = {"error_code": error.code, "unsupported": [error.param]}
    return {"type": "error", "error": described}


ANTHROPIC = Dialect(
    _envelope,
    names={"prompt": "messages"},
    request_id_header=b"request-id",
    client_header=b"anthropic-version",
)


class MessageRenderer(Renderer):
    """Renders one choice's token events as content blocks and their events.

    Args:
        hides_tokens: Whether `max_tokens` was 0, so the one sampled token is not shown.
        hides_thoughts: Whether blocks of thinking have their text only in the signature.
    """

    def __init__(
        self, generation: Generation, *, hides_tokens: bool = False, hides_thoughts: bool = False
    ) -> None:
        self._generation = generation
        self._hides_tokens = hides_tokens
        self._hides_thoughts = hides_thoughts
        self._reader = ChoiceReader(generation.jobs[0].reading)
        self._id = f"msg_{secrets.token_hex(12)}"
        self._has_begun = False
        self._num_generated = 0
        self._blocks: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the open block
        self._texts: list[str] = []  # of the open block; a string would be copied for each token
        self._stop: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}

    def render(self, job_index: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the events for new tokens."""
        # Encoded at once, because later tokens change the message.
        return self._begin() + b"".join(map(_frame, self._take(events)))

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the message."""
        if self._hides_tokens:
            self._generation.num_shown = 0
        self._take(job_choices[0][0])
        return orjson.dumps(self._message())

    def fail(self, error: TgiError) -> bytes:
        """Return the error as an event."""
        [prepared] = self._generation.jobs
        return self._begin() + _frame(ANTHROPIC.body(error, prepared.request.request_id))

    def _begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        return _frame({"type": "message_start", "message": self._message()})

    def _message(self) -> dict[str, Any]:
        """Return the message so far."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._generation.model,
            # A call whose arguments were cut off is left out.
            "content": [block for block in self._blocks if block.get("input", {}) is not None],
            **self._stop,
            "usage": self._usage(),
        }

    def _take(self, events: Sequence[TokenEvent]) -> list[Event]:
        """Parse new tokens; return their events."""
        if self._hides_tokens:
            self._stop = {"stop_reason": "max_tokens", "stop_sequence": None}
            return [self._delta(), {"type": "message_stop"}]
        self._num_generated += len(events)
        made = [event for piece in self._reader.push(events) for event in self._add(piece)]
        last = events[-1]
        if last.finish is None:
            return made
        made += self._end(last)
        return [*made, self._delta(), {"type": "message_stop"}]

    def _end(self, last: TokenEvent) -> list[Event]:
        """Close the last block, after the last token."""
        made = [] if self._blocks else self._open(Content(""))
        made += self._close()
        self._stop = self._stop_of(last)
        return made

    def _delta(self) -> Event:
        return {"type": "message_delta", "delta": self._stop, "usage": self._usage()}

    def _add(self, piece: Piece) -> list[Event]:
        made = self._open(piece) if isinstance(piece, CallStart) or _KINDS[type(piece)] != self._kind else []
        if isinstance(piece, CallStart):
            return made
        self._texts.append(piece.text)
        if self._hides_thoughts and isinstance(piece, Reasoning):
            return made
        kind = _KINDS[type(piece)]
        delta = {"type": f"{kind}_delta", kind: piece.text}
        if isinstance(piece, CallArguments):
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        return [*made, {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}]

    def _open(self, piece: Piece) -> list[Event]:
        """Open the block of a piece; close the open one."""
        made = self._close()
        self._kind = kind = _KINDS[type(piece)]
        block: dict[str, Any] = {"type": kind, kind: ""}
        self._texts = []
        if isinstance(piece, CallStart):
            block = {"type": kind, "id": f"toolu_{secrets.token_hex(12)}", "name": piece.name, "input": {}}
        elif isinstance(piece, Reasoning):
            block["signature"] = ""
        self._blocks.append(block)
        start = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}
        return [*made, start]

    def _close(self) -> list[Event]:
        if self._kind is None:
            return []
        made: list[Event] = []
        block, index, text = self._blocks[-1], len(self._blocks) - 1, "".join(self._texts)
        block |= {"input": whole_arguments(text)} if self._kind == "tool_use" else {self._kind: text}
        if self._kind == "thinking":  # clients drop thoughts without a signature, or make them text
            block["signature"] = secrets.token_hex(16)
            if self._hides_thoughts:  # the next request brings them back, as from Anthropic's servers
                block |= {"thinking": "", "signature": sealed(text)}
            delta = {"type": "signature_delta", "signature": block["signature"]}
            made.append({"type": "content_block_delta", "index": index, "delta": delta})
        self._kind = None
        return [*made, {"type": "content_block_stop", "index": index}]

    def _stop_of(self, event: TokenEvent) -> dict[str, str | None]:
        reason = "tool_use" if any(block["type"] == "tool_use" for block in self._blocks) else "end_turn"
        if event.finish is FinishReason.LENGTH:
            [prepared] = self._generation.jobs
            wanted = prepared.job.max_tokens
            is_clipped = wanted is not None and prepared.request.stop.max_tokens < wanted
            reason = "model_context_window_exceeded" if is_clipped else "max_tokens"
        elif isinstance(event.stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": event.stop}
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        cached = self._generation.num_cached_tokens
        return {
            "input_tokens": self._generation.num_prompt_tokens - cached,
            "output_tokens": self._num_generated,
            "output_tokens_details": {"thinking_tokens": self._reader.num_reasoning_tokens},
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }


def _frame(event: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
