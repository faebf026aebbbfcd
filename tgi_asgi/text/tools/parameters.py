"""What a tool's parameters say about each argument alone, for formats that write arguments one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tgi_asgi.text.constrain.references import Resolve, Schema, resolver

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
_MAX_OTHERS = 64  # different schemas of arguments that are not listed, which are compared with each other
_MAX_MEMBERS = 64  # of all combinations: references may be circular, and double at each level


@dataclass(frozen=True)
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

    @cached_property
    def names(self) -> Sequence[str]:
        """The names of all arguments that are listed or required, in the order in which they are written."""
        return [*self.properties, *sorted(self.required - self.properties.keys())]

    def schema(self, name: str) -> Any:
        """Return an argument's schema; {} if nothing is known of it."""
        listed = self.properties.get(name)
        return listed if listed is not None else self.others or {}


def parameters_of(schema: Schema) -> Parameters:
    """Read the schema of all arguments together.

    Arguments of all members of `allOf` are merged, and so are those of `anyOf` and `oneOf`, of which an
    argument is required only if each member requires it. If no argument is listed, all names are free unless
    the schema forbids them. Beside listed arguments they are free only if the schema describes their values:
    a model that begins to invent arguments does not stop.
    """
    found = _Found(resolver(schema), iter(range(_MAX_MEMBERS)))
    found.add(schema)
    others = found.of_others[0] if len(found.of_others) == 1 else {"anyOf": found.of_others}
    if not found.of_others:
        is_free = not (found.properties or found.required or found.is_closed)
        others = {} if is_free else None
    return Parameters(found.properties, frozenset(found.required), others, frozenset(found.beyond))


def resolved(schema: Schema, resolve: Resolve) -> Schema:
    """Return a schema, or what it refers to if it is only a reference, as zod-to-json-schema's are."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or schema.keys() - _BESIDE_REFERENCE:
            break
        found = resolve(reference)
        if found is None:
            break
        schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
    return schema


class _Found:
    """What has been read so far; see `Parameters`."""

    def __init__(self, resolve: Resolve, left: Iterator[int]) -> None:
        self._resolve = resolve
        self._left = left  # one for each member that may still be read, shared by all
        self.properties: dict[str, Any] = {}
        self.required: set[str] = set()
        self.of_others: list[Any] = []
        self.beyond: set[str] = set()
        self.is_closed = False

    def add(self, schema: Schema) -> None:
        """Add what a schema says, and its members."""
        self.beyond |= schema.keys() - _OF_EACH - {"allOf"}
        self._list(schema.get("properties"), "allOf")
        self.required.update(_names(schema.get("required")))
        self._describe_others(schema)
        for part in self._members(schema, "allOf"):
            self.add(part)
        for key in ("anyOf", "oneOf"):
            branches = []
            for part in self._members(schema, key):
                branches.append(_Found(self._resolve, self._left))
                branches[-1].add(part)
            for branch in branches:
                self._list(branch.properties, "anyOf")
                self._describe(branch.of_others)
                self.beyond |= branch.beyond
            if branches:
                self.required |= set.intersection(*(branch.required for branch in branches))

    def _list(self, properties: Any, together: str) -> None:
        """List arguments; several schemas of the same one are combined by a keyword."""
        for name, value in properties.items() if isinstance(properties, Mapping) else ():
            known = self.properties.get(name, value)
            self.properties[name] = value if _are_equal(known, value) else {together: [known, value]}

    def _describe_others(self, schema: Schema) -> None:
        rest, patterns = schema.get("additionalProperties"), schema.get("patternProperties")
        self.is_closed |= rest is False
        described = list(patterns.values()) if isinstance(patterns, Mapping) else []
        if isinstance(rest, Mapping) and rest:
            described.append(rest)
        self._describe(described)

    def _describe(self, described: Iterable[Any]) -> None:
        for schema in described:
            if any(_are_equal(schema, each) for each in self.of_others):
                continue
            if len(self.of_others) >= _MAX_OTHERS:
                self.of_others = [{}]
                self.beyond.add("patternProperties")
                return
            self.of_others.append(schema)

    def _members(self, schema: Schema, key: str) -> Iterator[Schema]:
        """Yield the members of a combination that may describe objects, as long as there are not too many."""
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            if next(self._left, None) is None:
                self.beyond.add(key)
                return
            member = resolved(part, self._resolve) if isinstance(part, Mapping) else {"type": None}
            if member.get("type", "object") == "object":
                yield member


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two schemas are the same; those that nest too deep to be compared are not."""
    try:
        return bool(one == other)
    except RecursionError:
        return False


def _names(required: Any) -> list[str]:
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
