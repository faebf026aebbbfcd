"""Grammar of Gemma's calls: `call:f{key:value,...}`, with a special token as the quotes of strings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import CallParser, Mark, ToolFormat, alternatives, argument_rules, free_name
from tgi_asgi.text.tools.gemma_calls import GemmaCallParser

_ANY = r"/(.|\n)*/"
_CALL = "call:"
# Keywords that restrict no value beyond its type; a schema's others are its conditions.
_ANNOTATIONS = frozenset({"type", "description", "title", "default", "examples"})
_OF_OBJECTS = frozenset({"properties", "required", "additionalProperties"})
_NAME = r'[^\s{}:,"<>]([^{}:,"<>\n]{0,126}[^\s{}:,"<>])?'  # of an item that is not listed
_MAX_VALUES = 3_000  # with those that are referred to, which may double at each level
_MAX_DEPTH = 16  # of the enforced part: references may be circular
_SCALARS = ("integer", "number", "boolean", "null")
_FREE = f"""gemma_value: gemma_text | /-?[0-9]+(\\.[0-9]+)?([eE][+-]?[0-9]+)?/ | "true" | "false" | "null" \
| gemma_list | gemma_object
gemma_list: "[" (gemma_value ("," gemma_value)*)? "]"
gemma_object: "{{" (gemma_item ("," gemma_item)*)? "}}"
gemma_item: /{_NAME}/ ":" gemma_value"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaFormat(ToolFormat):
    """`<|tool_call>call:f{a:1,s:<|"|>text<|"|>}<tool_call|>`, repeated for each call.

    Attributes:
        quote: Text on both sides of a string.
    """

    quote: str

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        end, quote = mark(self.tail), mark(self.quote)
        more = f" ({mark(self.marker)} call {end})*" if is_parallel else ""
        names = [f"call_{index}" for index in range(len(tools))]
        lines = [f"calls: call {end}{more}", alternatives("call", names), _FREE]
        if quote.startswith("<["):
            lines += [f"gemma_text: {quote} GEMMA_TEXT {quote}", f"GEMMA_TEXT: {_ANY}"]
        else:
            lines += [f"gemma_text: {quote} gemma_rest", f"gemma_rest[lazy]: {_ANY} {quote}"]
        for name, tool in zip(names, tools, strict=True):
            values = _Values(name, tool, quote)
            lines += values.items(tool.each(), others=tool.others())
            lines.append(f'{name}: {literal(f"{_CALL}{tool.name}{{")} {name}_0_first_0 "}}"')
        return "\n".join(lines)

    def written_call(self, number: int, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{_CALL}{name}{self._written(arguments)}"

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, list):
            return f"[{','.join(map(self._written, value))}]"
        if isinstance(value, Mapping):
            return f"{{{','.join(f'{key}:{self._written(item)}' for key, item in value.items())}}}"
        return json.dumps(value)

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return GemmaCallParser(tools, marker=self.marker, end=self.tail, quote=self.quote)


class _Values:
    """The grammar rules of one tool's values."""

    def __init__(self, rule: str, tool: ToolArguments, quote: str) -> None:
        self._rule, self._tool, self._quote = rule, tool, quote
        self._num_objects = 0
        self._num_left = _MAX_VALUES
        self._reported: set[tuple[int, str]] = set()  # schemas, which the tool keeps, and types of values

    def items(
        self, each: Iterable[tuple[str, Any, bool]], depth: int = 0, *, others: Any = None
    ) -> list[str]:
        """Return rules for the items of the tool's n-th object; `<rule>_<n>_first_0` matches all of them.

        Args:
            others: Schema of the items that are not listed, if there may be such.
        """
        name = f"{self._rule}_{self._num_objects}"
        self._num_objects += 1
        lines: list[str] = []
        listed = list(each)
        keys = [
            (literal(f"{key}:"), self._value(schema, lines, depth), needed) for key, schema, needed in listed
        ]
        free = None
        if others is not None:
            free = f'FREE_{name.upper()} ":" {self._value(others, lines, depth)}'
            lines.append(f"FREE_{name.upper()}: {free_name(_NAME, [key for key, *_ in listed])}")
        return [*lines, *argument_rules(name, keys, ",", free)]

    def _value(self, schema: Any, lines: list[str], depth: int = 0) -> str:
        """Return the expression of a value; append the rules that it needs to `lines`."""
        self._num_left -= 1
        is_held = isinstance(schema, Mapping) and depth < _MAX_DEPTH and self._num_left > 0
        described = self._resolved(schema) if is_held else {}
        conditions = described.keys() - _ANNOTATIONS
        if conditions == {"const"} or conditions == {"enum"}:
            values = described["enum"] if "enum" in conditions else [described["const"]]
            if isinstance(values, list) and values:
                return "(" + " | ".join(self._written(value) for value in values) + ")"
        if conditions == {"anyOf"} and isinstance(described["anyOf"], list) and described["anyOf"]:
            return "(" + " | ".join(self._value(each, lines, depth + 1) for each in described["anyOf"]) + ")"
        kinds = described.get("type")
        kinds = kinds if isinstance(kinds, list) and kinds else [kinds]
        return "(" + " | ".join(self._of_kind(kind, described, schema, lines, depth) for kind in kinds) + ")"

    def _of_kind(
        self, kind: object, described: Mapping[str, Any], schema: Any, lines: list[str], depth: int
    ) -> str:
        conditions = described.keys() - _ANNOTATIONS
        if kind in _SCALARS:
            return self._tool.value({**described, "type": kind})
        if kind == "string" and not conditions:
            return "gemma_text"
        is_listed = kind == "object" and isinstance(described.get("properties"), Mapping)
        is_whole = conditions <= _OF_OBJECTS if is_listed else kind == "array" and conditions <= {"items"}
        if isinstance(schema, Mapping) and schema and not is_whole:
            self._leave_out(kind, described, schema)
        if kind == "array":
            item = self._value(described.get("items", {}), lines, depth + 1)
            return f'"[" ({item} ("," {item})*)? "]"'
        if is_listed:
            name = f"{self._rule}_{self._num_objects}"
            lines += self.items(_items(described), depth + 1)
            return f'"{{" {name}_first_0 "}}"'
        return {"string": "gemma_text", "object": "gemma_object"}.get(str(kind), "gemma_value")

    def _leave_out(self, kind: object, described: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
        """Report unenforced keywords; an invalid schema is refused, or left free, by its tool."""
        key = (id(schema), str(kind))
        if key in self._reported:  # definitions are used again and again
            return
        self._reported.add(key)
        num_ignored = len(self._tool.ignored)
        self._tool.value(schema)
        is_free = kind in ("string", "array", "object") and not described.keys() - _ANNOTATIONS
        if len(self._tool.ignored) == num_ignored and not is_free:
            conditions = schema.keys() - _ANNOTATIONS or {"type"}
            self._tool.leave_out(conditions - _OF_OBJECTS - {"items"} or conditions)

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Resolve a reference to one of the tool's definitions; return {} if there is none."""
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        found = self._tool.resolve(reference)
        return found if found is not None and "$ref" not in found else {}

    def _written(self, value: Any) -> str:
        """Return the only way to write a value."""
        if isinstance(value, str):
            return f"{self._quote} {literal(value)} {self._quote}"
        if isinstance(value, list):
            return " ".join(['"["', ' "," '.join(map(self._written, value)), '"]"'])
        if isinstance(value, dict):
            items = ' "," '.join(f"{literal(f'{key}:')} {self._written(item)}" for key, item in value.items())
            return f'"{{" {items} "}}"'
        return literal(json.dumps(value))


def _items(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    required = schema.get("required", ())
    for key, value in schema["properties"].items():
        yield key, value, key in required
