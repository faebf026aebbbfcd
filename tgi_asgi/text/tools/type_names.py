"""Types that tools name as Python or Google do: `dict`, `int`, `STRING`.

Meta's examples for Llama 3.2 and the functions of the Berkeley Function-Calling Leaderboard have such names.
They make a schema invalid, and the arguments of a tool whose schema is invalid cannot be constrained.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.text.constrain.source import MAX_DEPTH

_JSON = frozenset({"string", "integer", "number", "boolean", "object", "array", "null"})
_NAMES = {name: name for name in _JSON} | {
    "str": "string", "int": "integer", "float": "number", "double": "number", "bool": "boolean",
    "dict": "object", "list": "array", "tuple": "array", "none": "null",
}  # fmt: skip
_ANY = "any"
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
_PARTS = frozenset((*_SCHEMAS_BY_NAME, *_SCHEMAS))


def with_json_types(schema: Any, depth: int = 0) -> Any:
    """Return a schema with JSON Schema's names of types; it may share parts with the given one.

    Unknown names, and what is nested deeper than a schema may be, stay as they are.
    """
    if depth > MAX_DEPTH:
        return schema
    if isinstance(schema, list):
        return [with_json_types(each, depth + 1) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kinds = schema.get("type")
    if isinstance(kinds, str) and kinds in _JSON and _PARTS.isdisjoint(schema):
        return schema  # nearly all: an agent's requests have hundreds
    result = dict(schema)
    for key in _SCHEMAS_BY_NAME:
        if isinstance(parts := result.get(key), dict):
            result[key] = {name: with_json_types(each, depth + 1) for name, each in parts.items()}
    for key in _SCHEMAS:
        if key in result:
            result[key] = with_json_types(result[key], depth + 1)
    if isinstance(kinds, list):
        result["type"] = [_json_name(each) for each in kinds]
    elif isinstance(kinds, str) and kinds.lower() == _ANY:
        del result["type"]
    elif kinds is not None:
        result["type"] = _json_name(kinds)
    return result


def _json_name(kind: Any) -> Any:
    return _NAMES.get(kind.lower(), kind) if isinstance(kind, str) else kind
