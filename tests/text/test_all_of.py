"""Objects and values that a schema describes in several places: `allOf`, references, and `oneOf`."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from tests.support.grammars import accepts
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.all_of import merge_all_of
from tgi_asgi.text.constrain.compiler import GrammarCompiler


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]},
        {"properties": {"a": {"const": 1}}, "anyOf": [{"properties": {"b": {"const": 2}}}]},
        {
            "properties": {"a": {"const": 1}},
            "$ref": "#/$defs/b",
            "$defs": {"b": {"properties": {"b": {"const": 2}}}},
        },
        {"properties": {"a": {"const": 1}}, "required": ["a", "b"]},
    ],
)
def test_properties_listed_in_several_places_can_meet(
    compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    assert accepts(compiler, sources.json_schema({"type": "object", **schema}), '{"a":1,"b":2}')


CUSTOMER = {"type": "object", "properties": {"name": {"type": "null"}}, "required": ["name"]}
DEFINITIONS = {"$defs": {"Customer": CUSTOMER, "Status": {"enum": ["new", "paid"]}}}


@pytest.mark.parametrize(
    ("property_schema", "inside", "outside"),
    [
        # As pydantic 1 and FastAPI write a reference with a description.
        ({"allOf": [{"$ref": "#/$defs/Status"}], "default": "new", "title": "S"}, ('"new"',), ('"other"',)),
        (
            {"allOf": [{"$ref": "#/$defs/Customer"}], "description": "who", "nullable": False},
            ('{"name":null}',),
            ('{"name":null,"a":1}',),
        ),
        # As OpenAPI's generators write a subclass.
        (
            {"allOf": [{"$ref": "#/$defs/Customer"}, {"properties": {"age": {"const": 1}}}]},
            ('{"name":null,"age":1}', '{"name":null}'),
            ('{"name":null,"age":1,"age":1}', '{"age":1}', '{"name":null,"age":1,"b":1}'),
        ),
        (
            {
                "properties": {"age": {"const": 1}}, "required": ["age"],
                "allOf": [{"$ref": "#/$defs/Customer"}, {"description": "only a note"}],
            },
            ('{"age":1,"name":null}',),
            ('{"age":1}', '{"age":1,"name":null,"b":1}'),
        ),
        (
            {
                "allOf": [
                    {"$ref": "#/$defs/Customer"},
                    {"properties": {"name": {"const": None}, "b": {"const": 1}}},
                ]
            },
            ('{"name":null,"b":1}',),
            ('{"name":1,"b":1}', '{"name":null,"c":1}'),
        ),
        # What is not merged stays as it is: both parts hold.
        ({"allOf": [{"type": "string", "minLength": 1}, {"maxLength": 2}]}, ('"a"',), ('""', '"abc"')),
        ({"allOf": [{"$ref": "#/$defs/Customer"}, {"minProperties": 1}]}, ('{"name":null}',), ("{}",)),
        ({"allOf": [{"$ref": "#/$defs/Status"}, {"const": "paid"}]}, ('"paid"',), ('"new"',)),
    ],
)  # fmt: skip
def test_all_of_opens_no_object(
    compiler: GrammarCompiler,
    property_schema: dict[str, Any],
    inside: tuple[str, ...],
    outside: tuple[str, ...],
) -> None:
    """Neither those that it combines, if they can be merged, nor others of the document."""
    schema = {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/Customer"}, "b": property_schema},
        "required": ["a", "b"], **DEFINITIONS,
    }  # fmt: skip
    source = sources.json_schema(schema)
    for text in inside:
        assert accepts(compiler, source, f'{{"a":{{"name":null}},"b":{text}}}'), text
    for text in outside:
        assert not accepts(compiler, source, f'{{"a":{{"name":null}},"b":{text}}}'), text
    assert not accepts(compiler, source, f'{{"a":{{"name":null}},"b":{inside[0]},"c":1}}')
    if "minProperties" not in str(property_schema):  # its part of `allOf` may be anywhere
        assert not accepts(compiler, source, f'{{"a":{{"name":null,"x":1}},"b":{inside[0]}}}')


def test_the_same_all_of_holds_each_time(compiler: GrammarCompiler) -> None:
    status = {"allOf": [{"$ref": "#/$defs/Status"}], "title": "S"}
    properties = {"properties": {"a": status, "b": status}, "required": ["a", "b"]}
    source = sources.json_schema({**properties, **DEFINITIONS})
    assert accepts(compiler, source, '{"a":"new","b":"paid"}')
    assert not accepts(compiler, source, '{"a":"new","b":"other"}')


def test_a_condition_beside_a_reference_holds(compiler: GrammarCompiler) -> None:
    customer = {"$ref": "#/$defs/Customer", "required": ["age"]}
    source = sources.json_schema({"allOf": [customer, {"properties": {"age": {"const": 1}}}], **DEFINITIONS})
    assert accepts(compiler, source, '{"name":null,"age":1}')
    assert not accepts(compiler, source, '{"name":null}')


def test_all_of_that_leads_back_to_itself_is_judged(compiler: GrammarCompiler) -> None:
    for target in ("#/$defs/a", "#/$defs/b", "#", "#/nowhere", "#anchor"):
        schema = {
            "allOf": [{"$ref": target}, {"properties": {"x": {"const": 1}}}],
            "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}, {}]}},
        }
        with contextlib.suppress(InvalidRequest):
            compiler.compile(sources.json_schema({"type": "object", **schema}))


_CHILD = {"allOf": [{"$ref": "#/$defs/Node"}, {"properties": {"extra": {"const": 1}}}]}
_TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {"Node": {"type": "object", "properties": {"child": _CHILD}}, "merged-0": {"const": 3}},
}


@pytest.mark.parametrize("is_strict", [True, False])
def test_a_class_that_contains_a_subclass_of_itself_is_merged(
    compiler: GrammarCompiler, is_strict: bool
) -> None:
    source = sources.json_schema(_TREE, is_strict=is_strict)
    for text in ("{}", '{"child":{"child":{"child":{"extra":1},"extra":1}}}'):
        assert accepts(compiler, source, text), text
    for text in ('{"extra":1}', '{"child":{"other":1}}', '{"child":{"child":{"extra":2}}}'):
        assert not accepts(compiler, source, text), text


def test_merging_does_not_multiply_large_definitions() -> None:
    large = {"type": "object", "properties": {"x": {"enum": [f"value {n}" for n in range(8_000)]}}}
    part = {"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"y": {"type": "string"}}}]}
    schema = {"properties": {f"p{n}": part for n in range(150)}, "$defs": {"A": large}}
    size = len(json.dumps(schema))
    assert size < len(json.dumps(merge_all_of(schema))) < size + 256 * 1024


def test_a_document_that_is_one_of_its_definitions_is_closed(compiler: GrammarCompiler) -> None:
    definition = {**CUSTOMER, "minProperties": 1}  # cannot be merged with anything
    source = sources.json_schema({"allOf": [{"$ref": "#/definitions/C"}], "definitions": {"C": definition}})
    assert accepts(compiler, source, '{"name":null}')
    assert not accepts(compiler, source, '{"name":null,"a":1}')


def test_a_reference_into_all_of_finds_its_target(compiler: GrammarCompiler) -> None:
    schema = {
        "type": "object", "required": ["a", "b"],
        "properties": {"a": {"allOf": [{"const": 1}]}, "b": {"$ref": "#/properties/a/allOf/0"}},
    }  # fmt: skip
    source = sources.json_schema(schema)
    assert accepts(compiler, source, '{"a":1,"b":1}')
    assert not accepts(compiler, source, '{"a":1,"b":2}')


def _kind(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": value}}, "required": ["kind"], **more}


@pytest.mark.parametrize(
    ("branches", "texts"),
    [
        ([_kind(1), _kind(2)], ('{"kind":1}', '{"kind":2}')),
        (
            [
                {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"const": 2}}, "required": ["b"]},
            ],
            ('{"a":1}', '{"b":2}'),
        ),
        ([{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}], ('{"kind":1}', '{"kind":2}')),
        ([{"$ref": "#/$defs/one"}, {"type": "null"}], ('{"kind":1}', "null")),
        (
            [{"$ref": "#/$defs/one"}, {"type": "array", "items": {"$ref": "#/$defs/one"}}],
            ('{"kind":1}', '[{"kind":1}]'),
        ),
        ([{"$ref": "#/$defs/one"}, {"type": ["integer", "string"]}], ('{"kind":1}', "5", '"x"')),
    ],
)
def test_one_of_schemas_that_exclude_each_other_is_any_of_them(
    compiler: GrammarCompiler, branches: list[Any], texts: tuple[str, ...]
) -> None:
    definitions = {"one": _kind(1), "two": _kind(2)}
    source = sources.json_schema({"oneOf": branches, "$defs": definitions})
    assert all(accepts(compiler, source, text) for text in texts)
    assert not accepts(compiler, source, "{}")


@pytest.mark.parametrize(
    "branches",
    [
        [_kind(1), _kind(1.0)],
        [_kind(1), _kind(2, required=[])],
        [_kind(1), {"properties": {"kind": {"const": 2}}}],
        [{"$ref": "#/$defs/one"}, _kind(1)],
        [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/one"}],
        [{"type": "integer"}, {"type": "number"}],
    ],
)
def test_one_of_schemas_that_may_match_together_is_refused(
    compiler: GrammarCompiler, branches: list[Any]
) -> None:
    with pytest.raises(InvalidRequest, match="`oneOf`"):
        compiler.compile(sources.json_schema({"oneOf": branches, "$defs": {"one": _kind(1)}}))


def test_true_is_not_one_in_parts_that_are_joined(compiler: GrammarCompiler) -> None:
    parts = [{"properties": {"a": {"const": value}}, "required": ["a"]} for value in (1, True)]
    source = sources.json_schema({"type": "object", "allOf": parts})
    with contextlib.suppress(InvalidRequest):
        assert not accepts(compiler, source, '{"a":1}')
        assert not accepts(compiler, source, '{"a":true}')
