"""Detect when no value matches two branches of a `oneOf`, so that it means `anyOf`.

The compiler detects this for strings and types, but not for numbers and properties.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from tgi_asgi.text.constrain.exact import is_number

_MAX_BRANCHES = 50  # all pairs are compared


def are_disjoint(branches: list[Any]) -> bool:
    """Return whether no value matches two of the branches."""
    return len(branches) <= _MAX_BRANCHES and all(
        _excludes(first, second) or _excludes(second, first) for first, second in combinations(branches, 2)
    )


def _excludes(first: Any, second: Any) -> bool:
    """Return whether an object that matches the first schema cannot match the second one."""
    if not (_is_object(first) and _is_object(second)):
        return False
    known = second.get("properties", {})
    is_closed = second.get("additionalProperties") is False and "patternProperties" not in second
    for name in first.get("required", ()):
        if name not in known and is_closed:
            return True
        own, other = _values(first["properties"].get(name)), _values(known.get(name))
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
