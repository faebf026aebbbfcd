"""The answer of `/v1/responses` while it grows, and the event for each change of its items.

A stream sends the events; a complete answer is their result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from tgi_asgi.api.answer import ChoiceReader, Choices
from tgi_asgi.api.call import Generation, Renderer
from tgi_asgi.api.openai.client_tools import ClientTool
from tgi_asgi.api.openai.logprobs import ChatLogprobs, JsonList
from tgi_asgi.api.openai.response_items import OpenItem, new_id
from tgi_asgi.api.openai.tool_search import ToolSearch
from tgi_asgi.api.thoughts import sealed
from tgi_asgi.api.tools import Tool
from tgi_asgi.errors import InvalidRequest, Overloaded, TgiError
from tgi_asgi.text.tools import CallStart, Content, Piece, Reasoning
from tgi_asgi.types import FinishReason, TokenEvent


class ResponseRenderer(Renderer):
    """Renders one choice's token events as items and their events.

    Args:
        base: Constant fields of the response object.
        tools: Tools that may be called.
        tracker: Collects the log-probabilities, if requested.
        recorders: Called with the finished response, in order.
        hides_tokens: Whether only the prompt was to be read, so the one sampled token is not shown.
        seals_thoughts: Whether reasoning items have `encrypted_content`.
        has_summary: Whether reasoning items have their text as `summary`, too: many clients show only that.
    """

    def __init__(
        self,
        generation: Generation,
        base: dict[str, Any],
        tools: Sequence[Tool],
        tracker: ChatLogprobs | None,
        recorders: Sequence[Callable[[dict[str, Any]], None]],
        *,
        hides_tokens: bool = False,
        seals_thoughts: bool = False,
        has_summary: bool = False,
    ) -> None:
        self._generation = generation
        self._hides_tokens = hides_tokens
        self._seals_thoughts, self._has_summary = seals_thoughts, has_summary
        self._response = base
        self._tools = {tool.name: tool for tool in tools}
        self._tracker = tracker
        self._recorders = recorders
        self._reader = ChoiceReader(generation.jobs[0].reading)
        self._num_generated = 0
        self._output: list[dict[str, Any]] = base["output"]
        self._open: OpenItem | None = None  # the last of them, until it is complete
        self._is_stream = False
        self._frames: list[bytes] = []
        self._num_frames = 0

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the response."""
        if self._hides_tokens:
            self._generation.num_shown = 0
        [[events]] = job_choices
        self._take(events)
        return orjson.dumps(self._response)

    def render(self, job_index: int, events: Sequence[TokenEvent]) -> bytes:
        """Return the events for new tokens."""
        self._begin()
        self._take(events)
        return self._new_frames()

    def fail(self, error: TgiError) -> bytes:
        """Return the event of a failed response."""
        self._begin()
        if self._open is not None and self._open.tool is not None:  # the client does not know of the call
            self._output.pop()
            self._open = None
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
        """Parse new tokens; one by one if they have log-probabilities, which may belong to several items."""
        if self._hides_tokens:
            self._finish(None)
            return
        for some in [events] if self._tracker is None else ([event] for event in events):
            self._take_together(some)

    def _take_together(self, events: Sequence[TokenEvent]) -> None:
        self._num_generated += len(events)
        pieces = self._reader.push(events, self._tracker)
        logprobs = self._tracker.take_entries() if self._tracker is not None else JsonList()
        for piece in pieces:
            self._add(piece, logprobs)
            if isinstance(piece, Content):
                logprobs = JsonList()
        reason = events[-1].finish
        if reason is not None:
            self._conclude(reason)

    def _conclude(self, reason: FinishReason) -> None:
        """End the response after the last token of the answer."""
        if not self._output:
            self._begin_item(Content(""))
        why = None
        if reason is FinishReason.LENGTH:
            why = "max_output_tokens"
        elif reason is FinishReason.STOP and self._open is not None and self._open.lacks_end():
            why = "stop"  # OpenAI's responses have no stop strings; clients run the calls of completed ones
        self._finish(why)

    def _finish(self, why: str | None) -> None:
        """End the response; `why` says what cut it off, if anything did."""
        status = "completed" if why is None else "incomplete"
        self._close_item(status)
        ended = int(time.time()) if why is None else None
        details = None if why is None else {"reason": why}
        self._end(status, completed_at=ended, incomplete_details=details, usage=self._usage())
        for record in self._recorders:
            record(self._response)

    def _end(self, status: str, **fields: Any) -> None:
        if self._open is not None:
            self._open.fill()
        self._response |= {"status": status, **fields}
        self._emit(status, response=self._response)

    def _add(self, piece: Piece, logprobs: JsonList) -> None:
        """Add a piece to the open item, or to a new one."""
        opened = self._open
        if opened is None or not opened.takes(piece):
            self._close_item("completed")
            opened = self._begin_item(piece)
        if not isinstance(piece, CallStart):
            text = piece.text if opened.custom is None else opened.custom.push(piece.text)
            self._grow(opened, text, logprobs)

    def _begin_item(self, piece: Piece) -> OpenItem:
        """Open an item for a piece."""
        self._open = opened = OpenItem.of(piece, self._tools)
        item, part = opened.item, opened.part
        self._output.append(item)
        if opened.tool is None:
            self._emit_item("added")
        if part is not None:
            item["content"].append(part)
            self._emit("content_part.added", **self._place(), part=part)
        if opened.kind is Reasoning and self._has_summary:
            item["summary"].append({"type": "summary_text", "text": ""})
            self._emit("reasoning_summary_part.added", **self._summary_place(), part=item["summary"][0])
        return opened

    def _grow(self, opened: OpenItem, text: str, logprobs: JsonList) -> None:
        """Add to an item's text."""
        if not text:
            return
        opened.texts.append(text)
        if opened.tool is not None:
            return
        more = {}
        if opened.kind is Content:
            more["logprobs"] = logprobs.json()
            opened.logprobs.extend(logprobs)
        self._emit(f"{opened.event}.delta", **self._place(), delta=text, **more)
        if opened.item.get("summary"):
            self._emit("reasoning_summary_text.delta", **self._summary_place(), delta=text)

    def _close_item(self, status: str) -> None:
        """Close the open item, if there is one."""
        opened = self._open
        if opened is None:
            return
        if opened.custom is not None:
            self._grow(opened, opened.custom.finish(), JsonList())
        if opened.tool is not None and self._end_held(opened, opened.tool):
            return
        opened.fill()
        self._open = None
        item, place = opened.item, self._place()
        item["status"] = status
        if opened.kind is Reasoning and self._seals_thoughts:
            item["encrypted_content"] = sealed(opened.growing["text"])
        self._emit(f"{opened.event}.done", **place, **opened.ended())
        if opened.part is not None:
            self._emit("content_part.done", **place, part=opened.part)
        if item.get("summary"):
            [part], place_of_summary = item["summary"], self._summary_place()
            self._emit("reasoning_summary_text.done", **place_of_summary, text=part["text"])
            self._emit("reasoning_summary_part.done", **place_of_summary, part=part)
        self._emit_item("done")

    def _end_held(self, opened: OpenItem, tool: ClientTool | ToolSearch) -> bool:
        """Send the events of a call that were held back; return whether it became an item of the tool's type.

        Such an item cannot have a part of the arguments. If they are cut off, the call stays a function's.
        """
        arguments = "".join(opened.texts)
        own = tool.call(arguments)
        if own is None:
            self._emit_item("added")
            self._emit("function_call_arguments.delta", **self._place(), delta=arguments)
            return False
        self._open = None
        call_id = opened.item["call_id"]
        item = {**own, "id": new_id(tool.prefix), "call_id": call_id, "status": "in_progress"}
        self._output[-1] = item
        self._emit_item("added")
        item["status"] = "completed"
        self._emit_item("done")
        return True

    def _place(self) -> dict[str, Any]:
        """Return where the last item's growing field is."""
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
