"""What a tool's parameters say about each argument alone, for formats that write arguments one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Keywords of a schema that each argument alone can obey; none relates several arguments.
_OF_EACH = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id",
        "$comment", "title", "description", "default", "examples", "strict",
    }
)  # fmt: skip
# Keywords beside a reference that add no rule to what it refers to.
_BESIDE_REFERENCE = frozenset(
    {"$ref", "$defs", "definitions", "$schema", "$id", "$comment", "title", "description"}
)
_MAX_REFERENCES = 8  # a definition may be a reference in turn, even to itself
_MAX_DEPTH = 8  # of `allOf` and `anyOf` within each other: references may be circular


@dataclass(frozen=True, slots=True)
class Parameters:
    """The arguments of a tool.

    Attributes:
        properties: Schemas of the arguments that are listed, by name.
        required: Names of the arguments that must come.
        others: Schema of the arguments with other names; None if there must be none.
        beyond: Keywords that say more than this.
    """

    properties: Mapping[str, Any]
    required: frozenset[str]
    others: Any
    beyond: frozenset[str]

    def schema(self, name: str | None) -> Any:
        """Return an argument's schema; {} if nothing is known of it."""
        listed = self.properties.get(name or "")
        return listed if listed is not None else self.others or {}


def parameters_of(schema: Mapping[str, Any]) -> Parameters:
    """Read the schema of all arguments together.

    Arguments of all members of `allOf` are merged, and so are those of `anyOf` and `oneOf`, of which an
    argument is required only if each member requires it. If no argument is listed, all names are free unless
    the schema forbids them. Beside listed arguments they are free only if the schema describes their values:
    a model that begins to invent arguments does not stop.
    """
    found = _Found()
    found.add(schema, schema)
    others = found.of_others[0] if len(found.of_others) == 1 else {"anyOf": found.of_others}
    if not found.of_others:
        is_free = not (found.properties or found.required or found.is_closed)
        others = {} if is_free else None
    return Parameters(found.properties, frozenset(found.required), others, frozenset(found.beyond))


def resolved(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema that is no mere reference to a definition of the whole, as zod-to-json-schema's is."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or schema.keys() - _BESIDE_REFERENCE:
            break
        found = definition(reference, whole)
        if not isinstance(found, Mapping):
            break
        schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
    return schema


def definition(reference: str, whole: Mapping[str, Any]) -> Any:
    """Return the part of a schema that `#/...` refers to, or None."""
    if not reference.startswith("#/"):
        return None
    found: Any = whole
    for part in reference.removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


class _Found:
    """What has been read so far; see `Parameters`."""

    def __init__(self) -> None:
        self.properties: dict[str, Any] = {}
        self.required: set[str] = set()
        self.of_others: list[Any] = []
        self.beyond: set[str] = set()
        self.is_closed = False

    def add(self, schema: Mapping[str, Any], whole: Mapping[str, Any], depth: int = 0) -> None:
        """Add what a schema says, and its members."""
        self.beyond |= schema.keys() - _OF_EACH - {"allOf"}
        self._list(schema.get("properties"), "allOf")
        self.required.update(_names(schema.get("required")))
        self._describe_others(schema)
        if depth == _MAX_DEPTH:
            return
        for part in _members(schema.get("allOf"), whole):
            self.add(part, whole, depth + 1)
        for key in ("anyOf", "oneOf"):
            branches = []
            for part in _members(schema.get(key), whole):
                branches.append(_Found())
                branches[-1].add(part, whole, depth + 1)
            for branch in branches:
                self._list(branch.properties, "anyOf")
                self.of_others += [each for each in branch.of_others if each not in self.of_others]
                self.beyond |= branch.beyond
            if branches:
                self.required |= set.intersection(*(branch.required for branch in branches))

    def _list(self, properties: Any, together: str) -> None:
        """List arguments; several schemas of the same one are combined by a keyword."""
        for name, value in properties.items() if isinstance(properties, Mapping) else ():
            known = self.properties.get(name, value)
            self.properties[name] = value if known == value else {together: [known, value]}

    def _describe_others(self, schema: Mapping[str, Any]) -> None:
        rest, patterns = schema.get("additionalProperties"), schema.get("patternProperties")
        self.is_closed |= rest is False
        described = list(patterns.values()) if isinstance(patterns, Mapping) else []
        if isinstance(rest, Mapping) and rest:
            described.append(rest)
        self.of_others += [each for each in described if each not in self.of_others]


def _members(parts: Any, whole: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Yield the members of a combination that may describe objects."""
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, Mapping) and (member := resolved(part, whole)).get("type", "object") == "object":
            yield member


def _names(required: Any) -> list[str]:
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
