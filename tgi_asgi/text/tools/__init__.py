"""Tool calls: each model family's format, how it is chosen, and the prompt for templates without tools."""

from __future__ import annotations

from functools import lru_cache

from tgi_asgi.text.tools import harmony
from tgi_asgi.text.tools.arguments import ToolSpec
from tgi_asgi.text.tools.base import (
    CallArguments,
    CallParser,
    CallStart,
    Content,
    Mark,
    Piece,
    Reasoning,
    ToolFormat,
)
from tgi_asgi.text.tools.formats import FORMATS, GENERIC
from tgi_asgi.text.tools.histories import (
    with_calls_in_text,
    with_fitting_ids,
    with_results_in_order,
    with_single_calls,
)
from tgi_asgi.text.tools.prompts import (
    add_tool_prompt,
    spell_out,
    with_listed_tools,
    with_own_tools,
)
from tgi_asgi.text.tools.type_names import with_json_types

__all__ = [
    "FORMATS", "CallArguments", "CallParser", "CallStart", "Content", "Mark", "Piece", "Reasoning",
    "ToolFormat", "ToolSpec", "add_tool_prompt", "assumption", "choose_format", "harmony",
    "recognised_format", "spell_out", "with_calls_in_text", "with_fitting_ids", "with_json_types",
    "with_listed_tools", "with_own_tools", "with_results_in_order", "with_single_calls",
]  # fmt: skip


def choose_format(template: str, wanted: str | None = None) -> ToolFormat:
    """Return the format that a chat template's model was trained on, or the administrator's choice.

    Templates that are not recognised get the generic format.
    """
    return FORMATS[wanted] if wanted is not None else recognised_format(template) or GENERIC


@lru_cache(4)  # each request asks: a search of gpt-oss's template for all formats takes 0.25 ms
def recognised_format(template: str) -> ToolFormat | None:
    """Return the format that a chat template's source shows, or None."""
    return next((known for known in FORMATS.values() if known.recognises(template)), None)


def assumption(template: str, *, has_tools: bool) -> str | None:
    """Return the assumption made about a model whose template shows tools in an unknown way, or None."""
    if not has_tools or recognised_format(template) is not None or harmony.recognises(template):
        return None
    return (
        "the chat template's format of tool calls is not known: calls are read as JSON in <tool_call> tags, "
        "Hermes's format (--tool-format names another)"
    )
