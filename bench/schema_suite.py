"""Two hundred realistic JSON schemas, by family: common requests, and each keyword of draft 2020-12.

Written for this project after the families that JSONSchemaBench (Geng et al., 2025) collected from the field:
function calls, web APIs, configuration files, Kubernetes, tables. `suite()` is the same on every call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

NAMES = (
    "id",
    "name",
    "title",
    "email",
    "status",
    "created_at",
    "amount",
    "tags",
    "owner",
    "url",
    "count",
    "note",
)
VARIANTS = 10  # per family


def suite() -> Iterator[tuple[str, Schema]]:
    """Yield (family, schema)."""
    for family, make in FAMILIES.items():
        for variant in range(VARIANTS):
            yield family, make(random.Random(f"{family} {variant}"))


def _record(properties: Schema, rng: random.Random, *, is_open: bool = False) -> Schema:
    names = list(properties)
    schema = {"type": "object", "properties": properties}
    schema["required"] = sorted(rng.sample(names, rng.randint(1, len(names))), key=names.index)
    return schema if is_open else {**schema, "additionalProperties": False}


def _scalar(rng: random.Random) -> Schema:
    low = rng.randint(-20, 20)
    return rng.choice(
        [
            {"type": "string", "description": "A short text"},
            {"type": "string", "minLength": 1, "maxLength": rng.randint(4, 60)},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(1, 1000)},
            {"type": "number", "minimum": 0},
            {"type": "boolean", "default": False},
            {"type": "string", "enum": rng.sample(["open", "closed", "on hold", "new", "void"], 3)},
            {"type": ["string", "null"], "maxLength": 20},
        ]
    )


def _properties(rng: random.Random, count: int) -> Schema:
    return {name: _scalar(rng) for name in rng.sample(NAMES, count)}


def function_call(rng: random.Random) -> Schema:
    """Flat parameters with descriptions, as in assistants' functions."""
    return _record(_properties(rng, rng.randint(1, 5)), rng)


def strict_answer(rng: random.Random) -> Schema:
    """OpenAI's strict subset: everything is required, nothing else allowed, optional values are nullable."""
    properties = _properties(rng, 3)
    properties["steps"] = {"type": "array", "items": function_call(rng)}
    properties["next"] = {"anyOf": [function_call(rng), {"type": "null"}]}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def web_api(rng: random.Random) -> Schema:
    """An OpenAPI component: formats, nullable, references, read-only fields."""
    address = _record({"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}, rng)
    return {
        **_record(
            {
                "id": {"type": "string", "format": "uuid", "readOnly": True},
                "mail": {"type": "string", "format": "email"},
                "at": {"type": "string", "format": "date-time"},
                "amount": {"type": "number", "format": "double", "minimum": 0},
                "secret": {"type": "string", "format": "password"},
                "home": {"$ref": "#/components/schemas/Address"},
                **_properties(rng, 2),
            },
            rng,
        ),
        "components": {"schemas": {"Address": address}},
    }


def workflow(rng: random.Random) -> Schema:
    """A build workflow: maps of jobs, steps of one of two kinds, events as text, list or map."""
    step = {"type": "object", "properties": {"name": {"type": "string"}, "run": {"type": "string"}}}
    uses = {
        "type": "object",
        "properties": {"uses": {"type": "string", "pattern": "^[a-z-]+/[a-z-]+@v[0-9]+$"}},
    }
    steps = [{**step, "required": ["run"], "additionalProperties": False}]
    steps.append({**uses, "required": ["uses"], "additionalProperties": False})
    job = {
        "type": "object",
        "properties": {
            "runs-on": {"enum": ["ubuntu-latest", "macos-latest"]},
            "timeout-minutes": {"type": "integer", "minimum": 1, "maximum": 360},
            "steps": {
                "type": "array",
                "items": {"anyOf": steps},
                "minItems": 1,
                "maxItems": rng.randint(2, 6),
            },
        },
        "required": ["runs-on", "steps"],
        "additionalProperties": False,
    }
    events = {"enum": ["push", "pull_request", "release"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "on": {"oneOf": [events, {"type": "array", "items": events, "minItems": 1, "maxItems": 3}]},
            "jobs": {
                "type": "object",
                "patternProperties": {"^[a-z][a-z0-9_-]{0,9}$": job},
                "additionalProperties": False,
                "minProperties": 1,
            },
        },
        "required": ["on", "jobs"],
        "additionalProperties": False,
    }


def kubernetes(rng: random.Random) -> Schema:
    """A manifest: labels, quantities, ports that are numbers or names."""
    container = _record(
        {
            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 20},
            "image": {"type": "string"},
            "cpu": {"type": "string", "pattern": "^[0-9]+m?$"},
            "port": {
                "anyOf": [{"type": "integer", "format": "int32"}, {"type": "string"}],
                "x-int-or-string": True,
            },
            "data": {"type": "string", "format": "byte"},
        },
        rng,
    )
    return {
        "type": "object",
        "properties": {
            "apiVersion": {"const": "apps/v1"},
            "kind": {"enum": ["Deployment", "StatefulSet"]},
            "metadata": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 30},
                    "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 10}},
                },
                "required": ["name"],
            },
            "replicas": {"type": "integer", "format": "int32", "minimum": 0, "maximum": rng.randint(1, 50)},
            "containers": {"type": "array", "items": container, "minItems": 1, "maxItems": 3},
        },
        "required": ["apiVersion", "kind", "metadata"],
        "additionalProperties": False,
    }


def table(rng: random.Random) -> Schema:
    """Rows of tuples."""
    columns = [_scalar(rng) for _ in range(rng.randint(1, 4))]
    row = {"type": "array", "prefixItems": columns, "items": False, "minItems": len(columns)}
    return {"type": "array", "items": row, "minItems": 1, "maxItems": rng.randint(2, 8)}


def tree(rng: random.Random) -> Schema:
    """Recursion through $defs."""
    node = {
        "type": "object",
        "properties": {
            "value": _scalar(rng),
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": rng.randint(1, 3)},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def linked(rng: random.Random) -> Schema:
    """References to references, with annotations next to them."""
    return {
        **_record({"a": {"$ref": "#/$defs/x", "description": "One"}, "b": {"$ref": "#/$defs/y"}}, rng),
        "$defs": {"x": {"$ref": "#/$defs/y"}, "y": _scalar(rng)},
    }


def union(rng: random.Random) -> Schema:
    """Kinds distinguished by a constant."""
    kinds = ("circle", "square", "line")[: rng.randint(2, 3)]
    shapes = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "size": {"type": "number", "exclusiveMinimum": 0}},
            "required": ["kind", "size"],
            "additionalProperties": False,
        }
        for kind in kinds
    ]
    return {rng.choice(["oneOf", "anyOf"]): shapes}


def merged(rng: random.Random) -> Schema:
    """Parts of an object combined by allOf."""
    first, second = _properties(rng, 2), _properties(rng, 2)
    return {
        "allOf": [
            {"type": "object", "properties": first, "required": list(first)[:1]},
            {"properties": {f"{name}_2": value for name, value in second.items()}},
        ]
    }


def number(rng: random.Random) -> Schema:
    """Bounds and steps of numbers, open and closed, on both sides of zero."""
    low = rng.choice([-3, -1, -0.5, 0, 0.25, 1, 7])
    high = low + rng.choice([0.5, 1, 2.75, 10, 1000])
    bounds = {
        rng.choice(["minimum", "exclusiveMinimum"]): low,
        rng.choice(["maximum", "exclusiveMaximum"]): high,
    }
    kind = rng.choice(["number", "number", "integer"]) if high - low >= 10 else "number"
    step: Schema = {"type": "integer", "multipleOf": rng.choice([2, 5, 12]), "minimum": 0, "maximum": 500}
    return {
        "type": "object",
        "properties": {"x": {"type": kind, **bounds}, "y": {"type": "number", **bounds}, "step": step},
        "required": ["x", "y", "step"],
        "additionalProperties": False,
    }


def pattern(rng: random.Random) -> Schema:
    """Strings by regex, some of them not anchored."""
    patterns = [
        "^[A-Z]{3}-\\d{4}$", "^(\\+\\d{1,3} )?\\d{3}-\\d{4}$", "^#[0-9a-fA-F]{6}$", "\\.(png|jpe?g)$",
        "^v?\\d+(\\.\\d+){2}$", "^[^@ ]+@[^@ ]+$", "^\\S+$", "^[\\w.-]{1,20}$",
    ]  # fmt: skip
    chosen = zip("abc", rng.sample(patterns, 3), strict=True)
    return _record({name: {"type": "string", "pattern": each} for name, each in chosen}, rng)


def string_format(rng: random.Random) -> Schema:
    """Formats."""
    formats = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
    return _record({each: {"type": "string", "format": each} for each in rng.sample(formats, 3)}, rng)


def array(rng: random.Random) -> Schema:
    """Lists with bounds, nested."""
    low = rng.randint(0, 3)
    inner = {"type": "array", "items": _scalar(rng), "minItems": low, "maxItems": low + rng.randint(0, 4)}
    return _record({"list": {"type": "array", "items": inner, "maxItems": 3}, "flat": inner}, rng)


def constant(rng: random.Random) -> Schema:
    """Constants and enumerations of any type."""
    values = [None, True, 0, -1.5, 'a "b"\n', [1, {"x": []}], {"k": "v"}, "größe", ""]
    return _record({"one": {"const": rng.choice(values)}, "any": {"enum": rng.sample(values, 4)}}, rng)


def mapping(rng: random.Random) -> Schema:
    """Maps with open keys."""
    values = _scalar(rng)
    key = rng.choice(["^x-[a-z]{1,5}$", "^[0-9]{1,3}$"])
    return {
        "type": "object",
        "properties": {"known": {"type": "boolean"}},
        "patternProperties": {key: values},
        "additionalProperties": rng.choice([False, {"type": "integer"}]),
        **rng.choice([{}, {"maxProperties": 4}]),
    }


def loose(rng: random.Random) -> Schema:
    """Few constraints: open objects, any values, no types."""
    return rng.choice(
        [
            {"type": "object"},
            {"type": "array"},
            {"properties": _properties(rng, 2)},
            {"type": "object", "properties": {"any": {}, "true": True}, "required": ["any"]},
            _record(_properties(rng, 3), rng, is_open=True),
            {"type": ["object", "array"], "items": {"type": "integer"}, "maxItems": 3},
        ]
    )


def large(rng: random.Random) -> Schema:
    """Dozens of properties, most of them optional, and a long enumeration."""
    properties = {f"field_{index:02}": _scalar(rng) for index in range(rng.randint(20, 60))}
    properties["country"] = {"enum": [f"{a}{b}" for a in "ABCDEFGH" for b in "ABCDEFGHIJKLMNOPQRST"]}
    return {
        "type": "object",
        "properties": properties,
        "required": ["country"],
        "additionalProperties": False,
    }


def condition(rng: random.Random) -> Schema:
    """Properties that depend on the values of others."""
    base = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    return {
        **base,
        **rng.choice(
            [
                {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}, "else": {}},
                {"dependentRequired": {"a": ["b"]}},
                {"dependentSchemas": {"a": {"required": ["b"]}}},
                {"not": {"required": ["a", "b"]}},
                {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
                {"propertyNames": {"pattern": "^[a-z]$"}},
                {"unevaluatedProperties": False},
            ]
        ),
    }


def collection(rng: random.Random) -> Schema:
    """Constraints on all members of a list together."""
    return {
        "type": "array",
        "items": {"type": "integer"},
        **rng.choice([{"uniqueItems": True}, {"contains": {"const": 1}}, {"uniqueItems": False}]),
    }


FAMILIES: dict[str, Callable[[random.Random], Schema]] = {
    make.__name__: make
    for make in (
        function_call, strict_answer, web_api, workflow, kubernetes, table, tree, linked, union, merged,
        number, pattern, string_format, array, constant, mapping, loose, large, condition, collection,
    )
}  # fmt: skip
