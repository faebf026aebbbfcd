"""Answers of `/v1/responses` that are a summary of the conversation instead of its next turn.

A `compaction_trigger` at the end of the input asks for one, and so does `/v1/responses/compact`. The item
that carries the summary replaces earlier ones and what the assistant and its tools said before it; the user's
messages stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from tgi_asgi.api.answer import Choices
from tgi_asgi.api.openai.logprobs import JsonList
from tgi_asgi.api.openai.pages import listed
from tgi_asgi.api.openai.response_items import new_id
from tgi_asgi.api.openai.response_output import ResponseRenderer
from tgi_asgi.api.openai.response_schema import Item
from tgi_asgi.api.parse import refuse_field
from tgi_asgi.api.thoughts import sealed
from tgi_asgi.errors import GenerationFailed, TgiError
from tgi_asgi.text.tools import Content, Piece
from tgi_asgi.types import FinishReason, TokenEvent

TRIGGER: Item = {"type": "compaction_trigger"}
_NO_SUMMARY = "the model wrote no summary"


def is_triggered(items: Sequence[Item]) -> bool:
    """Return whether the input asks for a summary.

    Raises:
        InvalidRequest: if it does so before its last item; `param` names the place.
    """
    for i, item in enumerate(items):
        if item.get("type") == TRIGGER["type"]:
            if i + 1 < len(items):
                refuse_field(f"input[{i}]", "must be the last item: a summary ends the answer")
            return True
    return False


class SummaryRenderer(ResponseRenderer):
    """Renders an answer that is a summary as one `compaction` item; the reasoning before it is not shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._texts: list[str] = []

    def _take_together(self, events: Sequence[TokenEvent]) -> None:
        if self._num_generated == 0:
            self._output.append({"type": "compaction", "id": new_id("cmp"), "encrypted_content": ""})
            self._emit_item("added")
        super()._take_together(events)
        if events[-1].finish is None:  # clients give up on a stream without events
            self._emit("compaction.compacting", **self._place())

    def _add(self, piece: Piece, _logprobs: JsonList) -> None:
        if isinstance(piece, Content):
            self._texts.append(piece.text)

    def fail(self, error: TgiError) -> bytes:
        """Return the event of a failed response, which has no part of a summary."""
        self._output.clear()
        return super().fail(error)

    def _conclude(self, reason: FinishReason) -> None:
        summary = "".join(self._texts).strip()
        if not summary:  # an empty one would erase the conversation
            self._output.clear()
            self._end("failed", error={"code": "server_error", "message": _NO_SUMMARY})
            return
        self._output[-1]["encrypted_content"] = sealed(summary)
        self._emit_item("done")
        self._finish("max_output_tokens" if reason is FinishReason.LENGTH else None)


class CompactionRenderer(SummaryRenderer):
    """Renders the answer of `/v1/responses/compact`: the user's messages, then the summary."""

    def whole(self, job_choices: Sequence[Choices]) -> bytes:
        """Return the compacted conversation.

        Raises:
            GenerationFailed: if the model wrote no summary.
        """
        super().whole(job_choices)
        response = self._response
        if response["error"] is not None:
            raise GenerationFailed(_NO_SUMMARY)
        return orjson.dumps(
            {
                "id": response["id"],
                "object": "response.compaction",
                "created_at": response["created_at"],
                "output": response["output"],
                "usage": response["usage"],
            }
        )


def user_messages(items: Sequence[Item], owner: str) -> list[Item]:
    """Return the user's messages among items, as lists show them; `owner` as in `listed`."""
    return [
        listed(item, owner, i)
        for i, item in enumerate(items)
        if item.get("type") in (None, "message") and item.get("role") == "user"
    ]
