"""Gemma's calls: `call:f{key:value,...}`, with a special token as the quotes of strings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools.arguments import ToolArguments, ToolSpec
from tgi_asgi.text.tools.base import (
    CallArguments,
    CallParser,
    CallStart,
    Mark,
    Piece,
    ToolFormat,
    alternatives,
)
from tgi_asgi.text.tools.literals import as_json
from tgi_asgi.text.tools.pythonic import argument_rules

_ANY = r"/(.|\n)*/"
_CALL = "call:"
# Keywords that restrict no value beyond its type; a schema's others are its conditions.
_ANNOTATIONS = frozenset({"type", "description", "title", "default", "examples"})
_OF_OBJECTS = frozenset({"properties", "required", "additionalProperties"})
_MAX_DEPTH = 16  # of the enforced part: references may be circular
_SCALARS = ("integer", "number", "boolean", "null")
_FREE = """gemma_value: gemma_text | /-?[0-9]+(\\.[0-9]+)?([eE][+-]?[0-9]+)?/ | "true" | "false" | "null" \
| gemma_list | gemma_object
gemma_list: "[" (gemma_value ("," gemma_value)*)? "]"
gemma_object: "{" (gemma_item ("," gemma_item)*)? "}"
gemma_item: /[a-zA-Z0-9_-]+/ ":" gemma_value"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaFormat(ToolFormat):
    """`<|tool_call>call:f{a:1,s:<|"|>text<|"|>}<tool_call|>`, repeated for each call.

    Attributes:
        quote: Text on both sides of a string.
        end: Text after a call.
    """

    quote: str
    end: str

    def rules(self, tools: Sequence[ToolArguments], mark: Mark, *, is_parallel: bool) -> str:
        end, quote = mark(self.end), mark(self.quote)
        more = f" ({mark(self.marker)} call {end})*" if is_parallel else ""
        names = [f"call_{index}" for index in range(len(tools))]
        lines = [f"calls: call {end}{more}", alternatives("call", names), _FREE]
        if quote.startswith("<["):
            lines += [f"gemma_text: {quote} GEMMA_TEXT {quote}", f"GEMMA_TEXT: {_ANY}"]
        else:
            lines += [f"gemma_text: {quote} gemma_rest", f"gemma_rest[lazy]: {_ANY} {quote}"]
        for name, tool in zip(names, tools, strict=True):
            values = _Values(name, tool, quote)
            lines += values.items(tool.each())
            lines.append(f'{name}: {literal(f"{_CALL}{tool.name}{{")} {name}_0_first_0 "}}"')
        return "\n".join(lines)

    def parser(self, tools: Sequence[ToolSpec]) -> CallParser:
        return _GemmaParser(tools, self)


class _Values:
    """The grammar rules of one tool's values."""

    def __init__(self, rule: str, tool: ToolArguments, quote: str) -> None:
        self._rule, self._tool, self._quote = rule, tool, quote
        self._num_objects = 0

    def items(self, each: Iterable[tuple[str, Any, bool]], depth: int = 0) -> list[str]:
        """Return rules for the items of the tool's n-th object; `<rule>_<n>_first_0` matches all of them."""
        name = f"{self._rule}_{self._num_objects}"
        self._num_objects += 1
        lines: list[str] = []
        keys = [
            (literal(f"{key}:"), self._value(schema, lines, depth), needed) for key, schema, needed in each
        ]
        return [*lines, *argument_rules(name, keys, ",")]

    def _value(self, schema: Any, lines: list[str], depth: int = 0) -> str:
        """Return the expression of a value; append the rules that it needs to `lines`."""
        described = self._resolved(schema) if isinstance(schema, Mapping) and depth < _MAX_DEPTH else {}
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
        if kind == "array" and conditions <= {"items"}:
            item = self._value(described.get("items", {}), lines, depth + 1)
            return f'"[" ({item} ("," {item})*)? "]"'
        if kind == "object" and "properties" in conditions and conditions <= _OF_OBJECTS:
            name = f"{self._rule}_{self._num_objects}"
            lines += self.items(_items(described), depth + 1)
            return f'"{{" {name}_first_0 "}}"'
        if described or schema:
            self._leave_out(kind, described, schema)
        return "gemma_value"

    def _leave_out(self, kind: object, described: Mapping[str, Any], schema: Any) -> None:
        """Report unenforced keywords; an invalid schema is refused, or left free, by its tool."""
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
        found = self._tool.definition(reference)
        return found if isinstance(found, Mapping) and "$ref" not in found else {}

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


class _GemmaParser:
    """A parser that emits a call's arguments once the call is complete."""

    def __init__(self, tools: Sequence[ToolSpec], form: GemmaFormat) -> None:
        self.rest: str | None = None
        self._schemas = {tool.name: tool.properties for tool in tools}
        self._form = form
        self._buffer = ""
        self._opening = ""  # skipped text, which counts as text if no call follows
        self._name: str | None = None  # of the call whose arguments are being read
        self._has_called = False
        self._depth = 0
        self._is_in_string = False

    def push(self, text: str) -> list[Piece]:
        """Return the pieces in the next part of the text."""
        pieces: list[Piece] = []
        for at, character in enumerate(text):
            self._buffer += character
            if self._name is not None:
                self._read_arguments(character, pieces)
            else:
                self._skip(pieces)
            if self.rest is not None:
                self.rest += text[at + 1 :]
                break
        return pieces

    def finish(self) -> str:
        """Return the text that resembled a call but is none; nothing of a call that has begun."""
        if self._name is not None:
            return ""
        return self._opening + self._buffer if self._opening.strip() or not self._has_called else ""

    def _skip(self, pieces: list[Piece]) -> None:
        """Look for the next call, after marks and blanks."""
        text = self._buffer.lstrip()
        name, brace, _ = text.removeprefix(_CALL).partition("{")
        if text.startswith(_CALL) and brace and name in self._schemas:
            pieces.append(CallStart(name))
            self._name, self._depth, self._has_called = name, 0, True
            self._buffer = self._opening = ""
        elif text in (self._form.marker, self._form.end):
            if text == self._form.marker or not self._has_called:
                self._opening += self._buffer
            self._buffer = ""
        elif not (
            any(mark.startswith(text) for mark in (self._form.marker, self._form.end, _CALL))
            or (text.startswith(_CALL) and any(each.startswith(name) for each in self._schemas) and not brace)
        ):
            whole = self._opening + self._buffer
            self.rest = whole.lstrip() if self._has_called else whole

    def _read_arguments(self, character: str, pieces: list[Piece]) -> None:
        if self._buffer.endswith(self._form.quote):
            self._is_in_string = not self._is_in_string
        elif not self._is_in_string and character in "{[":
            self._depth += 1
        elif not self._is_in_string and character in "}]":
            self._depth -= 1
            if self._depth < 0:
                assert self._name is not None
                pieces.append(
                    CallArguments(_to_json(self._buffer, self._form.quote, self._schemas[self._name]))
                )
                self._buffer, self._name = "", None


def _to_json(text: str, quote: str, schemas: Mapping[str, Any]) -> str:
    """Turn `a:1,b:[...]}` into a JSON object; an empty one if it is nested too deeply."""
    try:
        return json.dumps(_Reader(text, quote).items(schemas), ensure_ascii=False)
    except RecursionError:
        return "{}"


class _Reader:
    """A reader of values whose brackets match; a quote within a name may leave a text without its end."""

    def __init__(self, text: str, quote: str) -> None:
        self._text, self._quote, self._at = text, quote, 0

    def items(self, schemas: Mapping[str, Any]) -> dict[str, Any]:
        """Read items up to their closing bracket; `schemas` give the types of strings."""
        result: dict[str, Any] = {}
        while self._at < len(self._text) and not self._take("}"):
            if self._take(","):
                continue
            key = self._until(":").strip().strip('"')
            self._take(":")
            schema = schemas.get(key)
            value = self._value()
            result[key] = _typed(value, schema) if isinstance(value, str) else value
        return result

    def _value(self) -> Any:
        while self._take(" ") or self._take("\n"):
            pass
        if self._take(self._quote):
            begin, end = self._at, self._text.find(self._quote, self._at)
            end = end if end >= 0 else len(self._text)
            self._at = end + len(self._quote)
            return self._text[begin:end]
        if self._take("{"):
            return self.items({})
        if self._take("["):
            items = []
            while self._at < len(self._text) and not self._take("]"):
                if not self._take(",") and not self._take("}"):
                    items.append(self._value())
            return items
        if self._text.startswith('"', self._at):  # as in JSON
            try:
                value, self._at = json.JSONDecoder(strict=False).raw_decode(self._text, self._at)
            except ValueError:
                pass
            else:
                return value
        text = self._until(",}]").strip()
        written = as_json(text)
        return text if written is None else json.loads(written)

    def _take(self, text: str) -> bool:
        is_next = self._text.startswith(text, self._at)
        self._at += len(text) if is_next else 0
        return is_next

    def _until(self, ends: str) -> str:
        begin = self._at
        while self._at < len(self._text) and self._text[self._at] not in ends:
            self._at += 1
        return self._text[begin : self._at]


def _typed(text: str, schema: Any) -> Any:
    """Convert a string if its schema requires another type: FunctionGemma quotes numbers, too."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind in (None, "string") or (isinstance(kind, list) and "string" in kind):
        return text
    written = as_json(text)
    return text if written is None else json.loads(written)
