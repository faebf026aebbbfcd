"""Calls written as Python: Llama 3.2 and 4."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

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

_HEAD = re.compile(r"\[\s*[\w-]*")
_CALL = re.compile(r"\[\s*[\w-]+\(")
_CONSTANTS = {"true": True, "false": False, "null": None}


class PythonicFormat:
    """`[f(a=1, b="x"), g()]`: values are JSON, booleans by themselves Python's."""

    name = "pythonic"
    marker = ""
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
        return _PythonicParser()


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

    def __init__(self) -> None:
        self._buffer = ""
        self._is_in_call = False
        self._nesting = _Nesting()

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells."""
        pieces: list[Piece] = []
        for character in text:
            if not self._is_in_call and character == "(":
                pieces.append(CallStart(self._buffer.strip(" ,[\n")))
                self._buffer, self._is_in_call, self._nesting = "", True, _Nesting()
            elif self._is_in_call and self._nesting.push(character) < 0:
                pieces.append(CallArguments(_to_json(self._buffer)))
                self._buffer, self._is_in_call = "", False
            else:
                self._buffer += character
        return pieces


class _Nesting:
    """Follows brackets and quotes."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def push(self, character: str) -> int:
        """Take a character; return how many brackets are open behind it, with one more inside quotes."""
        if self._is_escaped:
            self._is_escaped = False
        elif self._quote:
            self._is_escaped = character == "\\"
            if character == self._quote:
                self._quote = ""
        elif character in "\"'":
            self._quote = character
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth -= 1
        return self._depth + bool(self._quote)


def _to_json(arguments: str) -> str:
    """Turn `a=1, b=[true, None]` into a JSON object; what is JSON stays as it is written."""
    nesting, values, start = _Nesting(), [], 0
    for index, character in enumerate(f"{arguments},"):
        if nesting.push(character) == 0 and character == ",":
            name, equals, value = f"{arguments},"[start:index].partition("=")
            if equals:
                values.append(f"{json.dumps(name.strip(), ensure_ascii=False)}: {_json_value(value.strip())}")
            start = index + 1
    return "{" + ", ".join(values) + "}"


def _json_value(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        try:
            return json.dumps(_evaluate(ast.parse(text, mode="eval").body), ensure_ascii=False)
        except (SyntaxError, ValueError):  # neither JSON nor Python: what was written, as a string
            return json.dumps(text, ensure_ascii=False)
    return text


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _evaluate(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    return ast.literal_eval(node)
