"""Tool calls: each model family's format, how it is chosen, and the prompt for templates without tools."""

from __future__ import annotations

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
from tgi_asgi.text.tools.deepseek import DeepSeekFormat, DeepSeekV31Format
from tgi_asgi.text.tools.generic import add_tool_prompt, spell_out
from tgi_asgi.text.tools.granite import GraniteFormat
from tgi_asgi.text.tools.hermes import HermesFormat
from tgi_asgi.text.tools.llama import LlamaFormat
from tgi_asgi.text.tools.mistral import MistralArgsFormat, MistralFormat, shorten_ids
from tgi_asgi.text.tools.pythonic import PythonicFormat
from tgi_asgi.text.tools.qwen_xml import QwenXmlFormat

__all__ = [
    "FORMATS", "CallArguments", "CallParser", "CallStart", "Content", "Mark", "Piece", "Reasoning",
    "ToolFormat", "ToolSpec", "add_tool_prompt", "choose_format", "shorten_ids",
    "spell_out",
]  # fmt: skip

_GENERIC = HermesFormat()
FORMATS: dict[str, ToolFormat] = {
    known.name: known
    for known in (
        _GENERIC, QwenXmlFormat(), MistralFormat(), MistralArgsFormat(), GraniteFormat(), DeepSeekFormat(),
        DeepSeekV31Format(), PythonicFormat(), LlamaFormat(),
    )
}  # fmt: skip


def choose_format(template: str, wanted: str | None = None) -> ToolFormat:
    """Return the format that a chat template's model was trained on, or the operator's choice.

    Templates that are not recognised get the generic one.
    """
    if wanted is not None:
        return FORMATS[wanted]
    return next((known for known in FORMATS.values() if known.recognises(template)), _GENERIC)
