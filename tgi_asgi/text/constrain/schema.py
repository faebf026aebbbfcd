"""What llguidance reads otherwise than JSON Schema 2020-12 means it, put right before a schema is compiled.

Every change keeps to the schema: what the changed one allows, the original does, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from itertools import combinations
from typing import Any, TypeGuard

# All others are annotations of somebody's tools (OpenAPI's `password`, Kubernetes' `int-or-string`), which no
# answer can violate. Those that the standard has and the compiler lacks are refused by it.
_FORMATS = frozenset(
    {
        "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4",
        "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer",
        "relative-json-pointer", "regex",
    }
)  # fmt: skip
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")  # what looks like a schema in these is none
_OF_OTHERS = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", "propertyNames"}
)
_BRANCHES = frozenset({"anyOf", "oneOf", "$ref", "$dynamicRef", "if", "not", "dependentSchemas"})
_MAX_BRANCHES = 50  # of a `oneOf`: each is compared with each
_NUDGE = Decimal("0.000001")


def adapt(schema: Any) -> Any:
    """Return a schema that the compiler understands; it may share parts with the given one.

    Objects that list their properties and say nothing of others get no others: the schema would allow any,
    and a model that begins to invent some finds no end. As deep as the schema: check its depth before.
    """
    return _adapt(schema, closes=not _combines(schema))


def _adapt(schema: Any, *, closes: bool) -> Any:
    if isinstance(schema, list):
        return [_adapt(item, closes=closes) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            result[key] = {name: _adapt(item, closes=closes) for name, item in value.items()}
        else:
            result[key] = value if key in _DATA else _adapt(value, closes=closes)
    if isinstance(result.get("format"), str) and result["format"] not in _FORMATS:
        del result["format"]
    if result.get("uniqueItems") is False:
        del result["uniqueItems"]
    _nudge(result, "Minimum", 1)
    _nudge(result, "Maximum", -1)
    if closes and _is_listed(result):
        result["additionalProperties"] = False
    branches = result.get("oneOf")
    if "anyOf" not in result and isinstance(branches, list) and _are_disjoint(branches):
        result["anyOf"] = result.pop("oneOf")
    return result


def _are_disjoint(branches: list[Any]) -> bool:
    """Tell whether no value matches two of the branches, so that `oneOf` is `anyOf`.

    The compiler sees that of strings and types by itself, but not of numbers and of properties.
    """
    return len(branches) <= _MAX_BRANCHES and all(
        _excludes(first, second) or _excludes(second, first) for first, second in combinations(branches, 2)
    )


def _excludes(first: Any, second: Any) -> bool:
    """Tell whether an object that matches the first schema cannot match the second one."""
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
    """Return the constants that a schema allows, as texts that are equal where JSON's values are; or None."""
    if not isinstance(schema, Mapping):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, Mapping | list) for value in values):
        return None
    return {
        str(float(value)) if _is_number(value) and abs(value) < 2**53 else repr(value) for value in values
    }


def _is_listed(schema: Mapping[str, Any]) -> bool:
    """Tell whether a schema lists all properties that it needs, and says nothing of others."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, Mapping)
        and bool(properties)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
        and not _OF_OTHERS & schema.keys()
    )


def _combines(schema: Any) -> bool:
    """Tell whether an object's properties may be listed in several places, none of which knows them all."""
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, Mapping):
        return False
    return bool(
        "allOf" in schema
        or ("properties" in schema and _BRANCHES & schema.keys())
        or any(_combines(value) for key, value in schema.items() if key not in _DATA)
    )


def _nudge(schema: dict[str, Any], bound: str, direction: int) -> None:
    """Move a whole exclusive bound a little away from zero where the other one is less than 1 beyond it.

    llguidance 1.9 allows the bound itself then: 7 where a number has to be above 7 and at most 7.5.
    """
    limit = schema.get(f"exclusive{bound}")
    facing = ("maximum", "exclusiveMaximum") if direction > 0 else ("minimum", "exclusiveMinimum")
    others = [value for name in facing if _is_number(value := schema.get(name))]
    if not _is_number(limit) or limit % 1 != 0 or direction * limit < 0:
        return
    if any(abs(other - limit) < 1 for other in others):
        nudged = float(Decimal(int(limit)) + direction * _NUDGE)
        schema[f"exclusive{bound}"] = nudged


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
