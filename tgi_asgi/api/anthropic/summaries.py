"""Summaries in a conversation (`compaction` blocks) that Anthropic's servers made before it came here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgi_asgi.api.anthropic.schema import Turn
from tgi_asgi.api.parse import string_of


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
