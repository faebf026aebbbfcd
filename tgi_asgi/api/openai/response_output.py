"""The answer of `/v1/responses` as it grows: its items, and the event for each thing that happens to them.

The stream sends the events; the whole answer is what they add up to.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson

from tgi_asgi.api.tools import CUSTOM_INPUT, Tool
from tgi_asgi.errors import InvalidRequest, TgiError
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason

Event = dict[str, Any]  # `type` and what belongs to it, but for the sequence number


class ResponseBuilder:
    """One response: `begin`, then `push` as often as there is something new, then `finish` or `fail`.

    Args:
        base: the response object's constant fields.
        tools: those that may be called.
    """

    def __init__(self, base: dict[str, Any], tools: Sequence[Tool] = ()) -> None:
        self._base = base
        self._tools = {tool.name: tool for tool in tools}
        self._arguments = ""  # of the custom tool's call that is open
        self._output: list[dict[str, Any]] = []
        self._kind: type[Piece] | None = None  # of the item that is open

    def begin(self) -> list[Event]:
        """Return the events that come first."""
        response = self.response("in_progress")
        return [{"type": kind, "response": response} for kind in ("response.created", "response.in_progress")]

    def push(self, pieces: Sequence[Piece], logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Take what is new; `logprobs` are those of the content among the pieces."""
        events: list[Event] = []
        for piece in pieces:
            is_new = isinstance(piece, CallStart)
            kind = CallStart if isinstance(piece, CallArguments) else type(piece)
            if is_new or kind is not self._kind:
                events += self._close("completed")
                events += self._open(piece, kind)
            if isinstance(piece, CallArguments) and self._is_custom:
                self._arguments += piece.text
            elif not isinstance(piece, CallStart):
                own = logprobs if isinstance(piece, Content) else ()
                events.append(self._extend(piece, own))
                logprobs = logprobs if not own else ()
        return events

    def finish(self, reason: FinishReason, usage: dict[str, Any]) -> list[Event]:
        """End the response."""
        status = "incomplete" if reason is FinishReason.LENGTH else "completed"
        events: list[Event] = []
        if not self._output:
            events += self._open(Content(""), Content)
        events += self._close(status)
        return [*events, {"type": f"response.{status}", "response": self.response(status, usage)}]

    def fail(self, error: TgiError) -> Event:
        """End the response with an error."""
        response = self.response("failed")
        code = error.code if isinstance(error, InvalidRequest) and error.code else "server_error"
        response["error"] = {"code": code, "message": error.message}
        return {"type": "response.failed", "response": response}

    def response(self, status: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the response object as it is now."""
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._base,
            "status": status,
            "incomplete_details": details,
            "output": list(self._output),
            "usage": usage,
        }

    def _open(self, piece: Piece, kind: type[Piece]) -> list[Event]:
        """Begin an item for a piece."""
        index = len(self._output)
        item: dict[str, Any]
        part: dict[str, Any] | None = None
        if isinstance(piece, CallStart):
            call_id = "call_" + secrets.token_hex(12)
            tool = self._tools.get(piece.name)
            if tool is not None and tool.is_custom:
                item = {"type": "custom_tool_call", "id": _id("ctc"), "call_id": call_id, "name": piece.name}
                item["input"] = self._arguments = ""
            else:
                item = {"type": "function_call", "id": _id("fc"), "call_id": call_id, "name": piece.name}
                item["arguments"] = ""
            if tool is not None and tool.namespace is not None:
                item["namespace"] = tool.namespace
        elif isinstance(piece, Reasoning):
            item = {"type": "reasoning", "id": _id("rs"), "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": "message", "id": _id("msg"), "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["status"] = "in_progress"
        added = {"type": "response.output_item.added", "output_index": index, "item": _copy(item)}
        self._output.append(item)
        self._kind = kind
        if part is None:
            return [added]
        item["content"].append(part)
        return [added, {"type": "response.content_part.added", **self._place(), "part": _copy(part)}]

    def _extend(
        self, piece: Content | Reasoning | CallArguments, logprobs: Sequence[dict[str, Any]]
    ) -> Event:
        item = self._output[-1]
        if isinstance(piece, CallArguments):
            item["arguments"] += piece.text
            return {
                "type": "response.function_call_arguments.delta",
                "item_id": item["id"],
                "output_index": len(self._output) - 1,
                "delta": piece.text,
            }
        part = item["content"][0]
        part["text"] += piece.text
        event = {"type": f"response.{part['type']}.delta", **self._place(), "delta": piece.text}
        if isinstance(piece, Content):
            event["logprobs"] = list(logprobs)
            part["logprobs"].extend(event["logprobs"])
        return event

    def _close(self, status: str) -> list[Event]:
        """End the item that is open, if one is."""
        if self._kind is None:
            return []
        self._kind = None
        item = self._output[-1]
        item["status"] = status
        index = len(self._output) - 1
        if item["type"] == "custom_tool_call":
            item["input"] = _custom_input(self._arguments)
            place = {"item_id": item["id"], "output_index": index}
            return [
                {"type": "response.custom_tool_call_input.delta", **place, "delta": item["input"]},
                {"type": "response.custom_tool_call_input.done", **place, "input": item["input"]},
                {"type": "response.output_item.done", "output_index": index, "item": item},
            ]
        done = {"type": "response.output_item.done", "output_index": index, "item": item}
        if item["type"] == "function_call":
            event = {
                "type": "response.function_call_arguments.done",
                "item_id": item["id"],
                "output_index": index,
                "name": item["name"],
                "arguments": item["arguments"],
            }
            return [event, done]
        part = item["content"][0]
        text = {"type": f"response.{part['type']}.done", **self._place(), "text": part["text"]}
        if part["type"] == "output_text":
            text["logprobs"] = part["logprobs"]
        return [text, {"type": "response.content_part.done", **self._place(), "part": part}, done]

    @property
    def _is_custom(self) -> bool:
        return bool(self._output) and self._output[-1]["type"] == "custom_tool_call"

    def _place(self) -> dict[str, Any]:
        index = len(self._output) - 1
        return {"item_id": self._output[-1]["id"], "output_index": index, "content_index": 0}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def _custom_input(arguments: str) -> str:
    """Return the string that a custom tool is called with; of a call that was cut off there is none."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return ""
    text = value.get(CUSTOM_INPUT) if isinstance(value, dict) else value
    return text if isinstance(text, str) else arguments


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    """Copy an item as deep as it will change."""
    return {key: list(each) if isinstance(each, list) else each for key, each in value.items()}
