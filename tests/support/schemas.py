"""Random JSON schemas from the keywords that structured outputs support."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import jsonschema


def check(text: str, schema: dict[str, Any]) -> None:
    """Raise unless a text is JSON that matches a schema; numbers are exact, not rounded to floats."""
    jsonschema.Draft202012Validator(schema).validate(json.loads(text, parse_float=Decimal))


def random_schema(rng: random.Random) -> dict[str, Any]:
    """Return an object schema with bounded properties, not all of them required, and with `$defs`."""
    schema = _object(rng, 3)
    schema["$defs"] = {"leaf": _leaf(rng)}
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["id", "name", "größe", "x y", "is_ok", 'q"', "items"], rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": names if rng.random() < 0.7 else names[:1],
        "additionalProperties": False,
    }


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0:
        return _leaf(rng)
    kind = rng.choice(["leaf", "object", "array", "anyOf", "ref"])
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        low, more = rng.randint(0, 2), rng.randint(0, 2)
        return {
            "type": "array",
            "items": _any(rng, depth - 1),
            "minItems": low,
            "maxItems": low + more,
        }
    if kind == "anyOf":
        return {"anyOf": [_any(rng, depth - 1), _leaf(rng)]}
    return {"$ref": "#/$defs/leaf"} if kind == "ref" else _leaf(rng)


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
            {"type": "number", "minimum": low, "exclusiveMaximum": low + 2.5},
            {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 12)},
            {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", "^\\d{2}-x?$", "^(ab)+c$"])},
            {"type": "boolean"},
            {"type": ["null", "boolean"]},
            {"enum": ["a", "b c", 3, None]},
            {"const": "fixed"},
            {"type": "string", "format": "date"},
        ]
    )
