"""Calls written as Python: Llama 3.2 and 4."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import (
    CallArguments,
    CallParser,
    CallStart,
    Mark,
    Piece,
    alternatives,
)
from tgi_asgi.text.tools.literals import Nesting, as_json

_HEAD = re.compile(r"\[\s*[\w.-]*")
_CALL = re.compile(r"\[\s*[\w.-]+\(")
_BEFORE = re.compile(r"[\s\[,]*([\w.-]+)\(")
_IN_BEFORE = re.compile(r"[\s\[,]*[\w.-]*")


class PythonicFormat:
    """`[f(a=1, b="x"), g()]`: values are JSON, booleans by themselves Python's."""

    name = "pythonic"
    marker = ""
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    first = "["

    def recognises(self, template: str) -> bool:
        return "[func_name1(" in template

    def begins(self, text: str) -> bool | None:
        if _CALL.match(text):
            return True
        return None if _HEAD.fullmatch(text) else False

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        more = ' (", " call)*' if is_parallel else ""
        rules = [f'calls: "[" call{more} "]"']
        names = [f"call_{index}" for index in range(len(tools))]
        rules.append(alternatives("call", names))
        for name, tool in zip(names, tools, strict=True):
            rules.append(f'{name}: {literal(tool.name + "(")} {name}_first_0 ")"')
            rules.extend(_keywords(name, tool))
        return "\n".join(rules)

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return _PythonicParser(tools)


def _keywords(call: str, tool: ToolArguments) -> list[str]:
    """Return rules for `a=1, b=2`, properties in order: before the first one (`_first_i`) and after one."""
    rules = []
    end = 0
    for index, (name, schema, is_required) in enumerate(tool.each()):
        end = index + 1
        keyword = f"{literal(name + '=')} {tool.value(schema)} {call}_more_{end}"
        for place, comma in (("first", ""), ("more", '", " ')):
            skipped = "" if is_required else f" | {call}_{place}_{end}"
            rules.append(f"{call}_{place}_{index}: {comma}{keyword}{skipped}")
    return [*rules, f'{call}_first_{end}: ""', f'{call}_more_{end}: ""']


class _PythonicParser:
    """Reads calls; a call's arguments come out once it is complete."""

    def __init__(self, tools: Sequence[ToolSpec]) -> None:
        self.rest: str | None = None
        self._names = {tool.name for tool in tools}
        self._buffer = ""
        self._name: str | None = None  # of the call whose arguments are being read
        self._has_called = False
        self._nesting = Nesting()

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells."""
        pieces: list[Piece] = []
        for at, character in enumerate(text):
            self._buffer += character
            if self._name is not None:
                if self._nesting.push(character) < 0:
                    pieces.append(CallArguments(_to_json(self._buffer[:-1])))
                    self._buffer, self._name = "", None
            elif found := _BEFORE.fullmatch(self._buffer):
                if found[1] in self._names:
                    pieces.append(CallStart(found[1]))
                    self._buffer, self._name, self._nesting = "", found[1], Nesting()
                    self._has_called = True
                elif found[1] is not None:
                    self._give_up(text[at + 1 :])
            elif self._has_called and self._buffer.strip() == "]":
                self._buffer = ""
                self._give_up(text[at + 1 :])
            elif not _IN_BEFORE.fullmatch(self._buffer):
                self._give_up(text[at + 1 :])
            if self.rest is not None:
                break
        return pieces

    def finish(self) -> str:
        """Return what was begun and is no call; of one that has begun, nothing is."""
        return (
            "" if self._name is not None else self._buffer.strip(" ,\n") if self._has_called else self._buffer
        )

    def _give_up(self, text: str) -> None:
        self.rest = (self._buffer.lstrip(" ,\n") if self._has_called else self._buffer) + text
        self._buffer = ""


def _to_json(arguments: str) -> str:
    """Turn `a=1, b=[true, None]` into a JSON object; what is JSON stays as it is written."""
    nesting, values, start = Nesting(), [], 0
    for index, character in enumerate(f"{arguments},"):
        if nesting.push(character) == 0 and character == ",":
            name, equals, value = f"{arguments},"[start:index].partition("=")
            if equals:
                values.append(f"{json.dumps(name.strip(), ensure_ascii=False)}: {_json_value(value.strip())}")
            start = index + 1
    return "{" + ", ".join(values) + "}"


def _json_value(text: str) -> str:
    """Return a value as JSON; what is neither JSON nor Python, as a string."""
    written = as_json(text)
    return json.dumps(text, ensure_ascii=False) if written is None else written
