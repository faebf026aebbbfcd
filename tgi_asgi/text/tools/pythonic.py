"""Calls written as Python: Llama 3.2 and 4."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tgi_asgi.text.grammar_source import SPACED, inline_json, literal
from tgi_asgi.text.tools.base import CallArguments, CallParser, CallStart, Mark, Piece, ToolSpec, alternatives

_CONSTANTS = {"true": True, "false": False, "null": None}


class PythonicFormat:
    """`[f(a=1, b="x"), g()]`: values are JSON, booleans by themselves Python's."""

    name = "pythonic"
    marker = ""
    markers: tuple[str, ...] = ()
    first = "["

    def recognises(self, template: str) -> bool:
        return "[func_name1(" in template

    def rules(self, tools: Sequence[ToolSpec], mark: Mark, *, is_parallel: bool) -> str:
        more = ' (", " call)*' if is_parallel else ""
        rules = [f'calls: "[" call{more} "]"']
        names = [f"call_{index}" for index in range(len(tools))]
        rules.append(alternatives("call", names))
        for name, tool in zip(names, tools, strict=True):
            rules.append(f'{name}: {literal(tool.name + "(")} {name}_first_0 ")"')
            rules.extend(_keywords(name, tool))
        return "\n".join(rules)

    def parser(self) -> CallParser:
        return _PythonicParser()


def _keywords(call: str, tool: ToolSpec) -> list[str]:
    """Return rules for `a=1, b=2`, properties in order: before the first one (`_first_i`) and after one."""
    schema = tool.schema
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties: Mapping[str, Any] = schema.get("properties", {})
    required = set(schema.get("required", ()))
    rules = []
    for index, (name, value) in enumerate(properties.items()):
        rest = f"{call}_more_{index + 1}"
        keyword = f"{literal(name + '=')} {_value(value, shared, is_lenient=not tool.is_strict)} {rest}"
        for place, comma in (("first", ""), ("more", '", " ')):
            skipped = "" if name in required else f" | {call}_{place}_{index + 1}"
            rules.append(f"{call}_{place}_{index}: {comma}{keyword}{skipped}")
    end = len(properties)
    return [*rules, f'{call}_first_{end}: ""', f'{call}_more_{end}: ""']


def _value(schema: Any, shared: Mapping[str, Any], *, is_lenient: bool) -> str:
    if isinstance(schema, dict) and schema.get("type") == "boolean":
        return '("True" | "False")'
    described = schema if isinstance(schema, dict) else {}
    return inline_json({**described, **shared}, SPACED, is_lenient=is_lenient)


class _PythonicParser:
    """Reads calls; a call's arguments come out once it is complete."""

    def __init__(self) -> None:
        self._buffer = ""
        self._is_in_call = False
        self._quote = ""
        self._is_escaped = False
        self._depth = 0

    def push(self, text: str) -> list[Piece]:
        """Return what the next piece of text tells."""
        pieces: list[Piece] = []
        for character in text:
            self._take(character, pieces)
        return pieces

    def _take(self, character: str, pieces: list[Piece]) -> None:
        if not self._is_in_call:
            if character == "(":
                pieces.append(CallStart(self._buffer.strip(" ,[\n")))
                self._buffer, self._is_in_call = "", True
            else:
                self._buffer += character
            return
        if self._ends_call(character):
            pieces.append(CallArguments(_to_json(self._buffer)))
            self._buffer, self._is_in_call = "", False
        else:
            self._buffer += character

    def _ends_call(self, character: str) -> bool:
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
            if self._depth < 0:
                self._depth = 0
                return True
        return False


def _to_json(arguments: str) -> str:
    """Turn `a=1, b=[true, None]` into a JSON object."""
    call = ast.parse(f"f({arguments})", mode="eval").body
    assert isinstance(call, ast.Call)
    values = {str(keyword.arg): _evaluate(keyword.value) for keyword in call.keywords}
    return json.dumps(values, ensure_ascii=False)


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
