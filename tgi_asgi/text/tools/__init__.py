"""Tool calls: each model family's format, how it is chosen, and the prompt for templates without tools."""

from __future__ import annotations

from tgi_asgi.text.tools.base import (
    CallArguments,
    CallParser,
    CallStart,
    Content,
    Mark,
    Piece,
    Reasoning,
    ToolFormat,
    ToolSpec,
)
from tgi_asgi.text.tools.deepseek import DeepSeekFormat
from tgi_asgi.text.tools.generic import generic_prompt, spell_out
from tgi_asgi.text.tools.hermes import HermesFormat
from tgi_asgi.text.tools.llama import LlamaFormat
from tgi_asgi.text.tools.mistral import MistralFormat
from tgi_asgi.text.tools.pythonic import PythonicFormat

__all__ = [
    "FORMATS", "CallArguments", "CallParser", "CallStart", "Content", "Mark", "Piece", "Reasoning",
    "ToolFormat", "ToolSpec", "choose_format", "generic_prompt", "spell_out",
]  # fmt: skip

_GENERIC = HermesFormat()
FORMATS: dict[str, ToolFormat] = {
    known.name: known
    for known in (_GENERIC, MistralFormat(), DeepSeekFormat(), PythonicFormat(), LlamaFormat())
}


def choose_format(template: str, wanted: str | None = None) -> ToolFormat:
    """Return the format that a chat template's model was trained on, or the operator's choice.

    Templates that are not recognised get the generic one.
    """
    if wanted is not None:
        return FORMATS[wanted]
    return next((known for known in FORMATS.values() if known.recognises(template)), _GENERIC)
