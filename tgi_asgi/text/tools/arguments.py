"""The arguments of a tool: its schema, and grammar expressions of it for the tool-call formats."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.source import SPACED, check_schema, inline_json

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Many clients describe a tool without arguments by empty `properties`, with at most these other keywords.
_WITHOUT_RULES = frozenset(
    {"type", "properties", "required", "$defs", "definitions", "$schema", "$id", "title", "description"}
)
# Keywords beside a reference that add no rule to what it refers to.
_BESIDE_REFERENCE = frozenset(
    {"$ref", "$defs", "definitions", "$schema", "$id", "$comment", "title", "description"}
)
_MAX_REFERENCES = 8  # a definition may be a reference in turn, even to itself


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function that may be called.

    Attributes:
        is_strict: Whether a keyword of its parameters that cannot be enforced refuses the request; otherwise
            the keyword is ignored.
    """

    name: str
    parameters: Mapping[str, Any] | None
    is_strict: bool = True

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of its arguments, which are always an object."""
        if not self.parameters:
            return _NO_ARGUMENTS
        schema = {"type": "object", **_resolved(self.parameters)}
        has_no_rules = not (schema.get("required") or schema.keys() - _WITHOUT_RULES)
        if schema.get("properties") == {} and has_no_rules and schema["type"] == "object":
            schema["additionalProperties"] = False
        return schema

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of its arguments, by name."""
        properties = self.schema.get("properties")
        return properties if isinstance(properties, Mapping) else {}


def _resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema whose top is no mere reference to its definitions, as zod-to-json-schema's is."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or schema.keys() - _BESIDE_REFERENCE:
            break
        found: Any = schema
        for part in reference.removeprefix("#/").split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        if not reference.startswith("#/") or not isinstance(found, Mapping):
            break
        schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
    return schema


# Keywords that restrict a text or a boolean beyond its type.
CONDITIONS = frozenset(
    {
        "enum", "const", "pattern", "minLength", "maxLength", "format", "$ref", "$dynamicRef", "anyOf",
        "oneOf", "allOf", "not", "if",
    }
)  # fmt: skip
# Keywords allowed in a schema if each argument is written separately; none relates several arguments.
_OF_EACH = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id",
        "$comment", "title", "description", "default", "examples", "strict",
    }
)  # fmt: skip


MAX_REPEATED = 512 * 1024  # characters of one tool's definitions, each time that an argument uses them


class ToolArguments:
    """One tool's arguments as grammar expressions, with JSON spaced as models have learned to write it.

    A strict tool is refused if its schema is too large or invalid. The arguments of any other such tool are
    unconstrained, and `ignored` names it, because an agent's twenty other tools remain usable.

    Attributes:
        name: Name of the tool.
        ignored: Keywords that its expressions do not enforce; `tools.<name>` if they enforce none.
    """

    def __init__(self, spec: ToolSpec) -> None:
        self.name = spec.name
        self.ignored: set[str] = set()
        self._spec = spec
        self._num_repeated = 0

    def whole(self) -> str:
        """Return all arguments as one JSON object."""
        return self._expression(self._spec.schema, otherwise={"type": "object"})

    def each(self) -> Iterator[tuple[str, Any, bool]]:
        """Yield each argument's name, schema and whether it is required, for formats that write each alone.

        Raises:
            InvalidRequest: if the tool is strict, and its schema requires more than such a format can
                enforce.
        """
        schema, properties = self._spec.schema, self._spec.properties
        beyond = sorted(schema.keys() - _OF_EACH)
        if self._spec.is_strict and beyond:
            raise InvalidRequest(
                f"`{beyond[0]}` cannot be enforced for the arguments of `{self.name}` as a whole"
            )
        self.ignored.update(beyond)
        is_free = False
        try:
            check_schema(schema)
        except InvalidRequest:
            if self._spec.is_strict:
                raise
            is_free = True
            self.ignored.add(self._free)
        listed = schema.get("required")
        required = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        for name, value in properties.items():
            yield name, {} if is_free else value, name in required and not is_free
        for name in required:
            if name not in properties and not is_free:
                yield name, {}, True

    def value(self, schema: Any) -> str:
        """Return one argument's value: JSON, with booleans also as Python writes them."""
        if isinstance(schema, Mapping) and schema.get("type") == "boolean" and not CONDITIONS & schema.keys():
            return '("true" | "false" | "True" | "False")'
        described = schema if isinstance(schema, Mapping) else {}
        try:
            described = {**described, **self._shared_by(described)}
        except InvalidRequest:
            if self._spec.is_strict:
                raise
            self.ignored.add(self._free)
            described = {}
        return self._expression(described, otherwise={})

    def _shared_by(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Return the definitions of the tool that a part of its schema may refer to.

        Each argument has a grammar of its own, which repeats them.

        Raises:
            InvalidRequest: if they have been repeated too often.
        """
        text = json.dumps(schema)
        if "$ref" not in text and "$dynamicRef" not in text:
            return {}
        whole = self._spec.schema
        shared = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        self._num_repeated += len(json.dumps(shared))
        if self._num_repeated > MAX_REPEATED:
            raise InvalidRequest(f"the definitions of `{self.name}` are too large to be used so often")
        return shared

    def definition(self, reference: str) -> Any:
        """Return the part of the tool's schema that `#/...` refers to, or None."""
        found: Any = self._spec.schema
        for key in reference.removeprefix("#/").split("/"):
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def leave_out(self, keywords: Collection[str]) -> None:
        """Record keywords that a format cannot enforce.

        Raises:
            InvalidRequest: if the tool is strict.
        """
        if self._spec.is_strict and keywords:
            raise InvalidRequest(
                f"`{min(keywords)}` cannot be enforced for `{self.name}` as this model writes arguments"
            )
        self.ignored.update(keywords)

    def _expression(self, schema: Mapping[str, Any], *, otherwise: Mapping[str, Any]) -> str:
        try:
            expression, ignored = inline_json(schema, SPACED, is_strict=self._spec.is_strict)
        except InvalidRequest:
            if self._spec.is_strict:
                raise
            expression, ignored = inline_json(otherwise, SPACED)[0], frozenset({self._free})
        self.ignored |= ignored
        return expression

    @property
    def _free(self) -> str:
        return f"tools.{self.name}"
