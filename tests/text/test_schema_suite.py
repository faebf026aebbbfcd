"""The suite of realistic schemas: refused by the name of a keyword, or the grammar allows valid answers."""

from __future__ import annotations

from typing import Any

import pytest

from bench.schema_suite import FAMILIES, suite
from bench.schemas import Writer, judge
from tests.support.toy_tokenizer import VOCAB_SIZE, ToyTokenizer
from tests.text.test_grammar import accepts
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import GrammarCompiler

FIRST = {family: [schema for name, schema in suite() if name == family] for family in FAMILIES}
REFUSED = {"condition", "collection", "mapping"}  # families with keywords that cannot be enforced


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ToyTokenizer(), VOCAB_SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_schemas_are_held_to_or_refused_by_name(compiler: GrammarCompiler, family: str) -> None:
    writer = Writer(ToyTokenizer(), VOCAB_SIZE)
    num_answers = 0
    for schema in FIRST[family][:4]:
        found = judge(compiler, writer, schema, answers=2)
        if "refused" in found:
            assert family in REFUSED, found["message"]
            assert found["refused"], found["message"]
            continue
        assert not found["wrong"]
        num_answers += found["answers"]
    assert num_answers or family in REFUSED


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, ("0.1", "0.5"), ("0", "0.0", "0.51")),
        ({"exclusiveMinimum": 7, "exclusiveMaximum": 7.5}, ("7.01",), ("7", "7.00", "7.5")),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, ("-1.5", "-1.01"), ("-1", "-1.0")),
        ({"exclusiveMinimum": -3, "maximum": -2.5}, ("-2.999",), ("-3", "-2.4")),
        ({"exclusiveMinimum": 0, "maximum": 1}, ("1", "0.000001"), ("0", "1.1")),
    ],
)
def test_open_bounds_of_numbers_stay_outside(
    compiler: GrammarCompiler, bounds: dict[str, Any], inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    source = sources.json_schema({"type": "number", **bounds})
    assert all(accepts(compiler, source, text) for text in inside)
    assert not any(accepts(compiler, source, text) for text in outside)


def test_formats_of_somebody_s_tools_are_annotations(compiler: GrammarCompiler) -> None:
    port = {"type": "string", "format": "int-or-string"}
    schema = {"properties": {"format": port, "const": {"const": {"format": "x"}}}, "uniqueItems": False}
    source = sources.json_schema({"type": "object", **schema})
    assert accepts(compiler, source, '{"format":"80","const":{"format":"x"}}')
    assert not accepts(compiler, source, '{"const":{}}')
    assert port["format"] == "int-or-string"


def test_an_object_that_lists_its_properties_gets_no_others(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    source = sources.json_schema(schema)
    assert accepts(compiler, source, '{"a":1}')
    assert not accepts(compiler, source, '{"a":1,"b":2}')
    assert accepts(compiler, sources.json_schema({**schema, "additionalProperties": True}), '{"a":1,"b":2}')
    assert accepts(compiler, sources.json_schema({"type": "object"}), '{"b":2}')


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
    ],
)
def test_one_of_schemas_that_exclude_each_other_is_any_of_them(
    compiler: GrammarCompiler, branches: list[Any], texts: tuple[str, ...]
) -> None:
    source = sources.json_schema({"oneOf": branches})
    assert all(accepts(compiler, source, text) for text in texts)
    assert not accepts(compiler, source, "{}")


@pytest.mark.parametrize(
    "branches",
    [
        [_kind(1), _kind(1.0)],
        [_kind(1), _kind(2, required=[])],
        [_kind(1), {"properties": {"kind": {"const": 2}}}],
    ],
)
def test_one_of_schemas_that_may_match_together_is_refused(
    compiler: GrammarCompiler, branches: list[Any]
) -> None:
    with pytest.raises(InvalidRequest, match="`oneOf`"):
        compiler.compile(sources.json_schema({"oneOf": branches}))
