"""Tool calls: each model family's format, how it is chosen, and the prompt for templates without tools."""

from __future__ import annotations

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
from tgi_asgi.text.tools.generic import add_tool_prompt, shorten_ids, spell_out

__all__ = [
    "FORMATS", "CallArguments", "CallParser", "CallStart", "Content", "Mark", "Piece", "Reasoning",
    "ToolFormat", "ToolSpec", "add_tool_prompt", "channels_of", "choose_format", "harmony",
    "recognised_format", "shorten_ids", "spell_out",
]  # fmt: skip


def choose_format(template: str, wanted: str | None = None) -> ToolFormat:
    """Return the format that a chat template's model was trained on, or the operator's choice.

    Templates that are not recognised get the generic one.
    """
    return FORMATS[wanted] if wanted is not None else recognised_format(template) or GENERIC


def recognised_format(template: str) -> ToolFormat | None:
    """Return the format that a chat template's source shows, or None."""
    return next((known for known in FORMATS.values() if known.recognises(template)), None)


def channels_of(template: str) -> str | None:
    """Return harmony's name if a chat template's source shows its channels, else None."""
    return harmony.NAME if harmony.recognises(template) else None
