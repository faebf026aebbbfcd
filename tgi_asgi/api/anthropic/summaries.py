"""Summaries of conversations (`compaction` blocks): those that requests bring, and those they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgi_asgi.api.anthropic.render import Event, MessageRenderer
from tgi_asgi.api.anthropic.schema import Turn
from tgi_asgi.api.parse import string_of
from tgi_asgi.text.tools import Content, Piece
from tgi_asgi.types import FinishReason, TokenEvent


def find_summary(turns: Sequence[Turn]) -> tuple[int, str]:
    """Return the index of the last turn that summarises those before it, and the summary; 0 and "" if none.

    Raises:
        InvalidRequest: if the summary is not a text; `param` names it.
    """
    for i in reversed(range(len(turns))):
        for j, block in enumerate(_blocks(turns[i])):
            if block.get("type") == "compaction" and block.get("content"):  # empty if the server failed
                return i, string_of(block, "content", f"messages[{i}].content[{j}]")
    return 0, ""


def is_only_summary(turn: Turn) -> bool:
    """Return whether a turn of the assistant has `compaction` blocks and nothing else."""
    blocks = _blocks(turn)
    return bool(blocks) and all(block.get("type") == "compaction" for block in blocks)


def _blocks(turn: Turn) -> Sequence[dict[str, Any]]:
    return turn.content if turn.role == "assistant" and isinstance(turn.content, list) else ()


class SummaryRenderer(MessageRenderer):
    """Renders an answer that is a summary as one `compaction` block; the thinking before it is not shown.

    The block has no content if the model wrote no summary or did not end it. Such a block replaces nothing.
    """

    def _add(self, piece: Piece) -> list[Event]:
        if isinstance(piece, Content):
            self._texts.append(piece.text)
        return []

    def _end(self, last: TokenEvent) -> list[Event]:
        self._stop = self._stop_of(last)
        content = None
        if last.finish is not FinishReason.LENGTH:
            content = "".join(self._texts).strip() or None
            self._stop = {"stop_reason": "compaction", "stop_sequence": None}
        self._blocks.append({"type": "compaction", "content": content})
        start = {"type": "compaction", "content": None}
        delta = {"type": "compaction_delta", "content": content}
        return [
            {"type": "content_block_start", "index": 0, "content_block": start},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
        ]
