"""Detect when no value matches two branches of a `oneOf`, so that it means `anyOf`.

The compiler detects this for strings and types, but not for numbers and properties.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from tgi_asgi.text.constrain.exact import is_number
from tgi_asgi.text.constrain.references import Resolve

_MAX_BRANCHES = 50  # all pairs are compared
_MAX_CHAIN = 16  # references that are followed one after the other


def are_disjoint(branches: list[Any], resolve: Resolve) -> bool:
    """Return whether no value matches two of the branches, each of which may be a reference."""
    if len(branches) > _MAX_BRANCHES:
        return False
    schemas = [_target(branch, resolve) for branch in branches]
    return all(
        _have_other_types(first, second)
        or _excludes(first, second, resolve)
        or _excludes(second, first, resolve)
        for first, second in combinations(schemas, 2)
    )


def _target(schema: Any, resolve: Resolve) -> Any:
    """Return what a reference without further conditions stands for, or the schema itself."""
    for _ in range(_MAX_CHAIN):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        target = resolve(reference) if isinstance(reference, str) else None
        if target is None:
            break
        schema = target  # the reference's other conditions would exclude more
    return schema


def _have_other_types(first: Any, second: Any) -> bool:
    own, other = _types(first), _types(second)
    return own is not None and other is not None and not own & other


def _types(schema: Any) -> set[str] | None:
    """Return the types that a schema names; None if it names none. An integer is a number."""
    named = schema.get("type") if isinstance(schema, Mapping) else None
    types = [named] if isinstance(named, str) else named
    if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
        return None
    return {"number" if name == "integer" else name for name in types}


def _excludes(first: Any, second: Any, resolve: Resolve) -> bool:
    """Return whether an object that matches the first schema cannot match the second one."""
    if not (_is_object(first) and _is_object(second)):
        return False
    known = second.get("properties", {})
    is_closed = second.get("additionalProperties") is False and "patternProperties" not in second
    for name in first.get("required", ()):
        if name not in known and is_closed:
            return True
        own, other = (
            _values(_target(properties.get(name), resolve)) for properties in (first["properties"], known)
        )
        if own is not None and other is not None and not own & other and name in second.get("required", ()):
            return True
    return False


def _is_object(schema: Any) -> bool:
    return (
        isinstance(schema, Mapping)
        and schema.get("type") == "object"
        and isinstance(schema.get("properties"), Mapping)
        and isinstance(required := schema.get("required", []), list)
        and all(isinstance(name, str) for name in required)
    )


def _values(schema: Any) -> set[str] | None:
    """Return the constants that a schema allows, as texts that are equal if the JSON values are; or None."""
    if not isinstance(schema, Mapping):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, Mapping | list) for value in values):
        return None
    return {str(float(value)) if is_number(value) and abs(value) < 2**53 else repr(value) for value in values}
