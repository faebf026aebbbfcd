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
    num_held,
)
from tgi_asgi.text.tools.literals import as_json

_ANY = r"/(.|\n)*/"
_HEAD = re.compile(r"<function=([^>\n]+)>")
_IN_HEAD = re.compile(r"<function=[^>\n]{0,128}")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(\n?)")
_FUNCTION_END = re.compile(r"\s*(?:</function>|(?=</tool_call>))")
_VALUE_END = "\n</parameter>"
_CALL_ENDS = ("\n</function>\n</tool_call>", "\n</function></tool_call>")
_OPENER = "<tool_call>"
_MARKS = (_OPENER, "</tool_call>", "</function>", "```xml", "```")
_BEGINS = ("<function=", *_MARKS)


class QwenXmlFormat:
    """`<tool_call>\\n<function=f>\\n<parameter=a>\\n1\\n</parameter>\\n</function>\\n</tool_call>`."""

    name = "qwen3_coder"
    marker = "<tool_call>"
    openers: tuple[str, ...] = ("<function=",)
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
        self.rest: str | None = None
        self._schemas = {tool.name: tool.properties for tool in tools}
        self._buffer = ""
        self._opening = ""  # what was skipped, and is text if no call follows
        self._has_called = False
        self._function: str | None = None
        self._parameter: str | None = None
        self._ends: tuple[str, ...] = ()  # of the parameter's value
        self._num_parameters = 0

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells."""
        pieces: list[Piece] = []
        while text and self.rest is None:
            if self._parameter is not None:
                self._buffer += text
                text = self._buffer if self._read_value(pieces) else ""
                self._buffer = self._buffer if not text else ""
            else:  # by the character: what comes out does not depend on how the text was cut
                self._buffer += text[0]
                text = text[1:]
                while self._parameter is None and self._step(pieces):
                    pass
        if self.rest is not None:
            self.rest += text
        return pieces

    def finish(self) -> str:
        """Return what was begun and is no call, at the end of the answer."""
        if self._function is not None:
            return ""
        return self._opening + self._buffer if self._opening.strip() or not self._has_called else ""

    def _step(self, pieces: list[Piece]) -> bool:
        """Read one thing; False where more text is needed, or none is wanted."""
        if self.rest is not None:
            return False
        if self._function is None:
            return self._begin(pieces)
        found = _PARAMETER.match(self._buffer)
        if found and (found[2] or found.end() < len(self._buffer)):
            self._cut(found.end())
            self._parameter = found[1]
            self._ends = self._ends_of_value(has_line=bool(found[2]))
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
        """Look for the next function, behind blanks and markers; True where a marker was skipped."""
        text = self._buffer.lstrip()
        mark = next((mark for mark in _MARKS if text.startswith(mark)), None)
        if mark is not None:
            if mark == _OPENER or not self._has_called or self._opening:
                self._opening += self._buffer[: -len(text)] + mark
            self._buffer = text[len(mark) :]
            return True
        found = _HEAD.fullmatch(text)
        if found and found[1] in self._schemas:
            self._function, self._num_parameters = found[1], 0
            self._buffer = self._opening = ""
            self._has_called = True
            pieces.append(CallStart(found[1]))
        elif found or not (_IN_HEAD.fullmatch(text) or any(mark.startswith(text) for mark in _BEGINS)):
            whole = self._opening + self._buffer
            self.rest = whole.lstrip() if self._has_called else whole
        return False

    def _ends_of_value(self, *, has_line: bool) -> tuple[str, ...]:
        """Return what ends a value: its own end, or where that is missing, what follows and is left."""
        names = self._schemas.get(self._function or "", ())
        follows = (*(f"\n<parameter={name}>" for name in names), *_CALL_ENDS)
        return (_VALUE_END if has_line else _VALUE_END.lstrip(), *follows)

    def _read_value(self, pieces: list[Piece]) -> bool:
        """Read of a value what there is; True once it has ended."""
        is_text = self._is_text()
        found = [(at, end) for end in self._ends if (at := self._buffer.find(end)) >= 0]
        if not found:
            held = max(num_held(self._buffer, end) for end in self._ends)
            shown = self._buffer[: len(self._buffer) - held]
            if is_text and shown:
                self._cut(len(shown))
                pieces.append(CallArguments(_dump(shown)[1:-1]))
            return False
        at, end = min(found)
        value = self._buffer[:at]
        self._cut(at + (len(end) if end == self._ends[0] else 0))
        pieces.append(CallArguments(_dump(value)[1:] if is_text else self._json(value)))
        self._parameter = None
        return True

    def _json(self, value: str) -> str:
        """Return a value that is JSON by its schema; what is none, as a string."""
        if _choices(self._schema()) is not None:
            return _dump(value)
        written = as_json(value.strip())
        return _dump(value) if written is None else written

    def _is_text(self) -> bool:
        return _is_text(self._schema())

    def _schema(self) -> Any:
        return self._schemas.get(self._function or "", {}).get(self._parameter or "", {})

    def _cut(self, size: int) -> None:
        self._buffer = self._buffer[size:]


def _dump(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
