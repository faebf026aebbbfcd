"""The answer of `/v1/responses` while it grows: its items, and the event for each change.

A stream sends the events; a complete answer is their result.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from tgi_asgi.api.answer import ChoiceReader
from tgi_asgi.api.call import Choices, Generation
from tgi_asgi.api.custom_input import CustomInput
from tgi_asgi.api.openai.client_tools import CLIENT_TOOLS, ClientTool
from tgi_asgi.api.openai.logprobs import ChatLogprobs, JsonList
from tgi_asgi.api.openai.tool_search import ToolSearch
from tgi_asgi.api.thoughts import sealed
from tgi_asgi.api.tools import Tool
from tgi_asgi.errors import InvalidRequest, Overloaded, TgiError
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent

# By item type: events' name for the growing field, and the fields that they report at its end.
_GROWING = {
    "message": ("output_text", ("text", "logprobs")),
    "reasoning": ("reasoning_text", ("text",)),
    "function_call": ("function_call_arguments", ("name", "arguments")),
    "custom_tool_call": ("custom_tool_call_input", ("input",)),
}


class ResponseRenderer:
    """Renders one choice's token events as items and their events.

    Args:
        base: Constant fields of the response object.
        tools: Tools that may be called.
        tracker: Collects the log-probabilities, if requested.
        store: Called with the finished response, if it is stored.
        seals_thoughts: Whether reasoning items have `encrypted_content`.
        has_summary: Whether reasoning items have their text as `summary`, too: many clients show only that.
    """

    def __init__(
        self,
        generation: Generation,
        base: dict[str, Any],
        tools: Sequence[Tool],
        tracker: ChatLogprobs | None,
        store: Callable[[dict[str, Any]], None] | None,
        *,
        seals_thoughts: bool = False,
        has_summary: bool = False,
    ) -> None:
        self._generation = generation
        self._seals_thoughts, self._has_summary = seals_thoughts, has_summary
        self._response = base
        self._tools = {tool.name: tool for tool in tools}
        self._tracker = tracker
        self._store = store
        self._reader = ChoiceReader(generation.jobs[0].reading)
        self._num_generated = 0
        self._output: list[dict[str, Any]] = base["output"]
        self._kind: type[Piece] | None = None  # of the open item
        self._texts: list[str] = []  # of the open item; a string would be copied for each token
        self._logprobs = JsonList()  # of the open item
        self._custom = CustomInput()  # of the open item, if it calls a custom tool
        # Called by the open item, of which no event has been sent yet.
        self._held: ClientTool | ToolSearch | None = None
        self._is_stream = False
        self._frames: list[bytes] = []
        self._num_frames = 0

    def whole(self, parts: Sequence[Choices]) -> bytes:
        """Return the response."""
        [[events]] = parts
        # Log-probabilities that arrive together are one item's.
        for some in [events] if self._tracker is None else ([event] for event in events):
            self._take(some)
        return orjson.dumps(self._response)

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the events for new tokens."""
        self._begin()
        self._take(events)
        return self._new_frames()

    def close(self) -> bytes:
        """Return nothing, because the last event marks the end."""
        return b""

    def fail(self, error: TgiError) -> bytes:
        """Return the event of a failed response."""
        self._begin()
        if self._held is not None:  # the client does not know of the call
            self._output.pop()
            self._held = self._kind = None
        code = "server_error"
        if isinstance(error, InvalidRequest):
            code = error.code or "invalid_prompt"
        elif isinstance(error, Overloaded):
            code = "rate_limit_exceeded"
        self._end("failed", error={"code": code, "message": error.message})
        return self._new_frames()

    def _begin(self) -> None:
        if not self._is_stream:
            self._is_stream = True
            self._emit("created", response=self._response)
            self._emit("in_progress", response=self._response)

    def _take(self, events: Sequence[TokenEvent]) -> None:
        """Parse new tokens."""
        self._num_generated += len(events)
        pieces = self._reader.push(events, self._tracker)
        logprobs = self._tracker.take_entries() if self._tracker is not None else JsonList()
        for piece in pieces:
            self._add(piece, logprobs)
            if isinstance(piece, Content):
                logprobs = JsonList()
        reason = events[-1].finish
        if reason is None:
            return
        if not self._output:
            self._open(Content(""))
        why = None
        if reason is FinishReason.LENGTH:
            why = "max_output_tokens"
        elif reason is FinishReason.STOP and self._is_within_call():
            why = "stop"  # OpenAI's responses have no stop strings; clients run the calls of completed ones
        is_cut = why is not None
        status = "incomplete" if is_cut else "completed"
        self._close(status)
        details = {"reason": why} if is_cut else None
        ended = None if is_cut else int(time.time())
        self._end(status, completed_at=ended, incomplete_details=details, usage=self._usage())
        if self._store is not None:
            self._store(self._response)

    def _is_within_call(self) -> bool:
        """Return whether the open item is a call whose arguments lack their end."""
        if self._kind is not CallStart:
            return False
        if self._output[-1]["type"] == "custom_tool_call":
            return not self._custom.has_ended
        try:
            orjson.loads("".join(self._texts))
        except ValueError:
            return True
        return False

    def _end(self, status: str, **fields: Any) -> None:
        self._fill()
        self._response |= {"status": status, **fields}
        self._emit(status, response=self._response)

    def _add(self, piece: Piece, logprobs: JsonList) -> None:
        """Add a piece to the open item, or to a new one."""
        if isinstance(piece, CallStart) or _kind_of(piece) is not self._kind:
            self._close("completed")
            self._open(piece)
        if isinstance(piece, CallStart):
            return
        item = self._output[-1]
        if item["type"] == "custom_tool_call":
            self._add_input(self._custom.push(piece.text))
            return
        self._texts.append(piece.text)
        if self._held is not None:
            return
        more = {"logprobs": logprobs.json()} if isinstance(piece, Content) else {}
        if more:
            self._logprobs.extend(logprobs)
        self._emit(f"{_GROWING[item['type']][0]}.delta", **self._place(), delta=piece.text, **more)
        if item.get("summary"):
            self._emit("reasoning_summary_text.delta", **self._summary_place(), delta=piece.text)

    def _add_input(self, text: str) -> None:
        """Add to the input of a custom tool's call."""
        if text:
            self._texts.append(text)
            self._emit("custom_tool_call_input.delta", **self._place(), delta=text)

    def _open(self, piece: Piece) -> None:
        """Open an item for a piece."""
        item: dict[str, Any]
        part: dict[str, Any] | None = None
        if isinstance(piece, CallStart):
            tool = self._tools.get(piece.name)
            kind, prefix, field = "function_call", "fc", "arguments"
            if tool is not None and tool.is_custom:
                kind, prefix, field = "custom_tool_call", "ctc", "input"
                self._custom = CustomInput()
            call_id = "call_" + secrets.token_hex(12)
            name = piece.name if tool is None else tool.own_name or tool.name
            item = {"type": kind, "id": _id(prefix), "call_id": call_id, "name": name, field: ""}
            self._held = CLIENT_TOOLS.get(tool.own_type or "") if tool is not None else None
            if tool is not None and tool.namespace is not None:
                item["namespace"] = tool.namespace
        elif isinstance(piece, Reasoning):
            item = {"type": "reasoning", "id": _id("rs"), "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": "message", "id": _id("msg"), "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["status"] = "in_progress"
        self._texts, self._logprobs = [], JsonList()
        self._output.append(item)
        if self._held is None:
            self._emit_item("added")
        self._kind = _kind_of(piece)
        if part is not None:
            item["content"].append(part)
            self._emit("content_part.added", **self._place(), part=part)
        if item["type"] == "reasoning" and self._has_summary:
            item["summary"].append({"type": "summary_text", "text": ""})
            self._emit("reasoning_summary_part.added", **self._summary_place(), part=item["summary"][0])

    def _close(self, status: str) -> None:
        """Close the open item, if there is one."""
        if self._kind is None:
            return
        if self._output[-1]["type"] == "custom_tool_call":
            self._add_input(self._custom.finish())
        if self._held is not None and self._end_held(self._held):
            return
        self._fill()
        self._kind = None
        item, growing, place = self._output[-1], self._growing(), self._place()
        item["status"] = status
        name, fields = _GROWING[item["type"]]
        if item["type"] == "reasoning" and self._seals_thoughts:
            item["encrypted_content"] = sealed(growing["text"])
        self._emit(f"{name}.done", **place, **{field: growing[field] for field in fields})
        if growing is not item:
            self._emit("content_part.done", **place, part=growing)
        if item.get("summary"):
            [part], place_of_summary = item["summary"], self._summary_place()
            self._emit("reasoning_summary_text.done", **place_of_summary, text=part["text"])
            self._emit("reasoning_summary_part.done", **place_of_summary, part=part)
        self._emit_item("done")

    def _end_held(self, tool: ClientTool | ToolSearch) -> bool:
        """Send the events of a call that were held back; return whether it became an item of the tool's type.

        Such an item cannot have a part of the arguments. If they are cut off, the call stays a function's.
        """
        self._held = None
        arguments = "".join(self._texts)
        own = tool.call(arguments)
        if own is None:
            self._emit_item("added")
            self._emit("function_call_arguments.delta", **self._place(), delta=arguments)
            return False
        self._kind = None
        item = {
            **own,
            "id": _id(tool.prefix),
            "call_id": self._output[-1]["call_id"],
            "status": "in_progress",
        }
        self._output[-1] = item
        self._emit_item("added")
        item["status"] = "completed"
        self._emit_item("done")
        return True

    def _fill(self) -> None:
        """Write the text that has come so far into the open item, if there is one."""
        if self._kind is None:
            return
        item, text = self._output[-1], "".join(self._texts)
        match item["type"]:
            case "custom_tool_call":
                item["input"] = text
            case "function_call":
                item["arguments"] = text
            case _:
                for part in (*item["content"], *item.get("summary", ())):
                    part["text"] = text
        if item["type"] == "message":
            self._growing()["logprobs"] = self._logprobs.json()

    def _growing(self) -> dict[str, Any]:
        """Return the growing object: the only part of an item with parts, otherwise the item."""
        item = self._output[-1]
        part: dict[str, Any] = item["content"][0] if "content" in item else item
        return part

    def _place(self) -> dict[str, Any]:
        item = self._output[-1]
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        return {**place, "content_index": 0} if "content" in item else place

    def _summary_place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "summary_index": 0}

    def _emit_item(self, change: str) -> None:
        self._emit(f"output_item.{change}", output_index=len(self._output) - 1, item=self._output[-1])

    def _emit(self, kind: str, **fields: Any) -> None:
        """Add an event if streaming; encoded at once, because its objects change later."""
        if self._is_stream:
            event = {"type": f"response.{kind}", "sequence_number": self._num_frames, **fields}
            self._frames.append(b"event: response.%b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(event)))
            self._num_frames += 1

    def _new_frames(self) -> bytes:
        frames, self._frames = self._frames, []
        return b"".join(frames)

    def _usage(self) -> dict[str, Any]:
        num_prompt = self._generation.num_prompt_tokens
        cached = self._generation.num_cached_tokens
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": self._num_generated,
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens},
            "total_tokens": num_prompt + self._num_generated,
        }


def _kind_of(piece: Piece) -> type[Piece]:
    return CallStart if isinstance(piece, CallArguments) else type(piece)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
