"""Two tools, calls of them in every format, and what a parser makes of an answer."""

from __future__ import annotations

from typing import Any

from tests.support.tool_writers import write
from tgi_asgi.text.constrain.answer_grammar import ToolUse
from tgi_asgi.text.tools import FORMATS, CallArguments, Content, Piece, Reasoning, ToolSpec
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.harmony import HarmonyParser

PARAMETERS = {
    "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}, "s": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}
SPECS = [ToolSpec("f", PARAMETERS), ToolSpec("g", None)]
TWO_CALLS = {name: write(name, [("f", {"a": 1, "s": '}"<'}), ("g", {})]) for name in FORMATS}


def use(name: str, **options: Any) -> ToolUse:
    """Return the use of the two tools in a format."""
    return ToolUse(FORMATS[name], SPECS, **options)


def parse(parser: AnswerParser | HarmonyParser, text: str, size: int) -> list[Piece]:
    """Feed a text in pieces of some size; join the results."""
    pieces: list[Piece] = []
    for at in range(0, len(text), size):
        pieces += parser.push(text[at : at + size])
    joined: list[Piece] = []
    for piece in pieces + parser.finish():
        last = joined[-1] if joined else None
        if isinstance(piece, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + piece.text)
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            joined[-1] = CallArguments(last.text + piece.text)
        else:
            joined.append(piece)
    return joined
