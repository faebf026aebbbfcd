"""Merge the parts of a JSON schema's `allOf`, so that an object's properties are listed in one place.

Generators wrap a reference that has a description in an `allOf` of one element (pydantic 1, FastAPI), and
write inheritance as an `allOf` of a reference and the subclass's own properties (OpenAPI). Both are merged
here, so that all properties of such an object are known in one place. What cannot be merged is only marked.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tgi_asgi.text.constrain.references import Schema, resolver

DATA = ("const", "enum", "default", "examples")  # values that only look like schemas
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Everything else is a note: descriptions, defaults, OpenAPI's `nullable` and `discriminator` ...
_KEYWORDS = frozenset(
    {
        "$anchor", "$defs", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef",
        "$ref", "$schema", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "contains",
        "definitions", "dependencies", "dependentRequired", "dependentSchemas", "else", "enum",
        "exclusiveMaximum", "exclusiveMinimum", "format", "id", "if", "items", "maxContains", "maxItems",
        "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength", "minProperties",
        "minimum", "multipleOf", "not", "oneOf", "pattern", "patternProperties", "prefixItems", "properties",
        "propertyNames", "required", "then", "type", "unevaluatedItems", "unevaluatedProperties",
        "uniqueItems", "x-guidance",
    }
)  # fmt: skip
_BESIDE = frozenset({"$defs", "definitions", "$schema"})  # part of no object
_OF_OBJECT = frozenset({"type", "properties", "required"})
_BRANCHES = frozenset({"anyOf", "oneOf", "$ref", "$dynamicRef", "if", "not", "dependentSchemas"})
_IN_PLACE = ("allOf", "anyOf", "oneOf", "if", "then", "else", "not")
_MAX_CHAIN = 32  # references that are followed one after the other
_MAX_PROPERTIES = 2_000  # of all merged objects together
_MAX_PARTS = 2_000  # that are looked at; definitions that name the next one twice have 2^n
_MAX_CHARS = 256 * 1024  # of the definitions that are copied, each time that one is


def merge_all_of(document: Schema) -> Schema:
    """Return a document in which `allOf` is merged into its schema wherever the meaning stays the same."""
    if any("/allOf/" in reference for reference in _references(document)):
        return document
    merger = _Merger(document)
    merged: dict[str, Any] = merger.everywhere(document)
    if merger.definitions:
        merged["$defs"] = {**merged.get("$defs", {}), **merger.definitions}
    return merged


class _Merger:
    """The merging of one document.

    A class that contains itself, as in a tree, would be merged into itself without end. Where that begins, it
    becomes a definition that refers to itself.

    Attributes:
        definitions: Those definitions, by their names in `$defs`.
    """

    def __init__(self, document: Schema) -> None:
        self._resolve = resolver(document)
        self._num_properties = self._num_parts = self._num_chars = 0
        self._sizes: dict[str, int] = {}  # of definitions, by their references
        self._names: dict[str, str] = {}  # of the schemas around the one at hand, by their texts
        taken = document.get("$defs", {})
        self._new_names = (name for n in itertools.count() if (name := f"merged-{n}") not in taken)
        self.definitions: dict[str, Schema] = {}

    def everywhere(self, value: Any, key: str = "") -> Any:
        if isinstance(value, list):
            return [self.everywhere(item) for item in value]
        if not isinstance(value, Mapping) or key in DATA:
            return value
        if key in BY_NAME:
            return {name: self.everywhere(item) for name, item in value.items()}
        if "allOf" not in value:
            return {name: self.everywhere(item, name) for name, item in value.items()}
        text = json.dumps(value, sort_keys=True)
        if text in self._names:
            self.definitions.setdefault(self._names[text], {})
            return {"$ref": f"#/$defs/{self._names[text]}"}
        if len(self._names) == _MAX_CHAIN:
            return value
        name = self._names[text] = next(self._new_names)
        merged = {key: self.everywhere(item, key) for key, item in self._merged(value, 0).items()}
        del self._names[text]
        if name not in self.definitions:
            return merged
        self.definitions[name] = merged
        return {"$ref": f"#/$defs/{name}"}

    def _merged(self, schema: Schema, depth: int) -> Schema:
        """Return a schema without its `allOf`, or as it is."""
        parts = schema.get("allOf")
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            return schema
        own = {name: value for name, value in schema.items() if name != "allOf"}
        parts = [part for part in parts if part.keys() & _KEYWORDS]
        if not parts:
            return own
        kept = {name: value for name, value in own.items() if name in _BESIDE or name not in _KEYWORDS}
        if len(parts) == 1 and kept == own and not _BESIDE & parts[0].keys() & own.keys():
            return self._merged({**parts[0], **own}, depth + 1) if depth < _MAX_CHAIN else schema
        own = {name: value for name, value in own.items() if name not in kept}
        objects = [self._plain(part, depth + 1) for part in ([own] if own else []) + parts]
        plain = [each for each in objects if each is not None]
        size = sum(len(each.get("properties", ())) for each in plain)
        if len(plain) < len(objects) or self._num_properties + size > _MAX_PROPERTIES:
            return schema
        self._num_properties += size
        return {**_joined(plain), **kept}

    def _plain(self, schema: Schema, depth: int) -> Schema | None:
        """Return a schema of an object that only lists properties, merged and without references, or None."""
        self._num_parts += 1
        if depth > _MAX_CHAIN or self._num_parts > _MAX_PARTS:
            return None
        schema = self._merged(schema, depth)
        reference = schema.get("$ref")
        if isinstance(reference, str) and schema.keys() & _KEYWORDS == {"$ref"}:
            target = self._resolve(reference)
            if target is None or not self._may_copy(reference, target):
                return None
            return self._plain(target, depth + 1)
        said = {name: value for name, value in schema.items() if name in _KEYWORDS}
        is_plain = (
            said.keys() <= _OF_OBJECT
            and said.get("type", "object") == "object"
            and isinstance(said.get("properties", {}), Mapping)
            and isinstance(required := said.get("required", []), list)
            and all(isinstance(name, str) for name in required)
        )
        return said if is_plain else None

    def _may_copy(self, reference: str, target: Schema) -> bool:
        if reference not in self._sizes:
            self._sizes[reference] = len(json.dumps(target))
        self._num_chars += self._sizes[reference]
        return self._num_chars <= _MAX_CHARS


def _joined(objects: list[Schema]) -> dict[str, Any]:
    """Return the object that all of these describe together."""
    found: dict[str, Any] = {"type": "object"} if any("type" in each for each in objects) else {}
    properties: dict[str, dict[str, Any]] = {}
    for each in objects:
        for name, schema in each.get("properties", {}).items():
            # By their text: in Python, a schema of 1 equals one of true.
            properties.setdefault(name, {}).setdefault(json.dumps(schema, sort_keys=True), schema)
    if properties:
        found["properties"] = {
            name: schemas[0] if len(schemas) == 1 else {"allOf": schemas}
            for name, schemas in ((name, list(known.values())) for name, known in properties.items())
        }
    required = dict.fromkeys(name for each in objects for name in each.get("required", ()))
    if required:
        found["required"] = list(required)
    return found


def incomplete_objects(document: Schema) -> frozenset[int] | None:
    """Return the `id` of each schema that may list only some of its object's properties; None: any may."""
    resolve = resolver(document)
    found: set[int] = set()

    def add(schema: Any) -> bool:
        """Add what applies to the same value as this schema; return whether all of that is known."""
        if not isinstance(schema, Mapping) or id(schema) in found:
            return True
        found.add(id(schema))
        if "$dynamicRef" in schema:
            return False
        inner = [schema[name] for name in _IN_PLACE if name in schema]
        inner = [item for each in inner for item in (each if isinstance(each, list) else [each])]
        if isinstance(dependent := schema.get("dependentSchemas"), Mapping):
            inner += dependent.values()
        if isinstance(reference := schema.get("$ref"), str):
            target = resolve(reference)
            if target is None:
                return False
            inner.append(target)
        return all(map(add, inner))

    is_known = all(add(schema) for schema in _schemas(document) if _combines(schema))
    return frozenset(found) if is_known else None


def _combines(schema: Schema) -> bool:
    return "allOf" in schema or ("properties" in schema and bool(_BRANCHES & schema.keys()))


def _schemas(value: Any, key: str = "") -> Iterator[Schema]:
    """Yield a schema and all schemas in it."""
    if isinstance(value, list):
        for item in value:
            yield from _schemas(item)
    elif isinstance(value, Mapping) and key not in DATA:
        if key not in BY_NAME:
            yield value
        for name, item in value.items():
            yield from _schemas(item, "" if key in BY_NAME else name)


def _references(document: Schema) -> Iterator[str]:
    return (each for schema in _schemas(document) if isinstance(each := schema.get("$ref"), str))
