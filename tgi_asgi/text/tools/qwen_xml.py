"""Qwen3-Coder's calls: a function and its parameters as XML, whose values are text and not JSON strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import CONDITIONS, ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import (
    CallArguments,
    CallParser,
    CallStart,
    Mark,
    Piece,
    alternatives,
)

_ANY = r"/(.|\n)*/"
_HEAD = re.compile(r"<function=([^>\n]+)>\s*")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_FUNCTION_END = re.compile(r"\s*</function>")
_VALUE_END = "\n</parameter>"


class QwenXmlFormat:
    """`<tool_call>\\n<function=f>\\n<parameter=a>\\n1\\n</parameter>\\n</function>\\n</tool_call>`."""

    name = "qwen3_coder"
    marker = "<tool_call>"
    markers: tuple[str, ...] = ("<tool_call>", "</tool_call>")
    first = ""

    def recognises(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template

    def begins(self, text: str) -> bool | None:
        return False  # the marker tells

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        end = mark("</tool_call>")
        more = rf' ("\n" {mark(self.marker)} "\n" call {end})*' if is_parallel else ""
        names = [f"call_{index}" for index in range(len(tools))]
        lines = [rf'calls: "\n" call {end}{more}', alternatives("call", names)]
        is_needed = False
        for name, tool in zip(names, tools, strict=True):
            parts = []
            for key, schema, is_required in tool.each():
                head = literal(f"<parameter={key}>\n")
                if _is_text(schema):
                    value, is_needed = "text_value", True
                else:
                    value = f"({_value(schema, tool)}) {literal(_VALUE_END)}"
                parts.append(rf'({head} {value} "\n")' + ("" if is_required else "?"))
            opening = literal(f"<function={tool.name}>\n")
            lines.append(rf'{name}: {opening} {" ".join(parts)} "</function>\n"')
        if is_needed:
            lines.append(f"text_value[lazy]: {_ANY} {literal(_VALUE_END)}")
        return "\n".join(lines)

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return _XmlParser(tools)


def _is_text(schema: Any) -> bool:
    """Tell whether any text is a value: strings without a further condition are written as they are."""
    return isinstance(schema, Mapping) and schema.get("type") == "string" and not CONDITIONS & schema.keys()


def _choices(schema: Any) -> list[str] | None:
    """Return the texts of an enumeration of strings, which are written as they are, too."""
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    if values and schema.keys() <= {"type", "enum", "description", "title", "default"}:
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) == len(values):
            return texts
    return None


def _value(schema: Any, tool: ToolArguments) -> str:
    choices = _choices(schema)
    return " | ".join(map(literal, choices)) if choices else tool.value(schema)


class _XmlParser:
    """Reads calls; text values come out as they are written, others once they are complete."""

    def __init__(self, tools: Sequence[ToolSpec]) -> None:
        self._schemas = {tool.name: tool.properties for tool in tools}
        self._buffer = ""
        self._function: str | None = None
        self._parameter: str | None = None
        self._num_parameters = 0

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Read one thing; False where more text is needed."""
        if self._function is None:
            return self._begin(pieces)
        if self._parameter is not None:
            return self._read_value(pieces)
        found = _PARAMETER.match(self._buffer)
        if found and (self._buffer[found.end() - 1] == "\n" or found.end() < len(self._buffer)):
            self._cut(found.end())
            self._parameter = found[1]
            head = f"{', ' if self._num_parameters else '{'}{_dump(found[1])}: "
            self._num_parameters += 1
            pieces.append(CallArguments(head + ('"' if self._is_text() else "")))
            return True
        end = _FUNCTION_END.match(self._buffer)
        if end:
            self._cut(end.end())
            pieces.append(CallArguments("}" if self._num_parameters else "{}"))
            self._function = None
        return end is not None

    def _begin(self, pieces: list[Piece]) -> bool:
        found = _HEAD.search(self._buffer)
        if found is None:
            return False
        self._cut(found.end())
        self._function, self._num_parameters = found[1], 0
        pieces.append(CallStart(found[1]))
        return True

    def _read_value(self, pieces: list[Piece]) -> bool:
        is_text = self._is_text()
        at = self._buffer.find(_VALUE_END)
        if at < 0:
            if is_text:
                held = _num_held(self._buffer)
                shown = self._buffer[: len(self._buffer) - held]
                self._cut(len(shown))
                if shown:
                    pieces.append(CallArguments(_dump(shown)[1:-1]))
            return False
        value = self._buffer[:at]
        self._cut(at + len(_VALUE_END))
        pieces.append(CallArguments(_dump(value)[1:] if is_text else self._json(value)))
        self._parameter = None
        return True

    def _json(self, value: str) -> str:
        """Return a value that is JSON by its schema; what is none, as a string."""
        if _choices(self._schema()) is not None:
            return _dump(value)
        text = value.strip()
        if text in ("True", "False"):
            return text.lower()
        try:
            json.loads(text)
        except ValueError:
            return _dump(value)
        return text

    def _is_text(self) -> bool:
        return _is_text(self._schema())

    def _schema(self) -> Any:
        return self._schemas.get(self._function or "", {}).get(self._parameter or "", {})

    def _cut(self, size: int) -> None:
        self._buffer = self._buffer[size:]


def _num_held(text: str) -> int:
    """Return how many characters at the end of a value may begin its end."""
    sizes = range(min(len(_VALUE_END) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(_VALUE_END[:size])), 0)


def _dump(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
