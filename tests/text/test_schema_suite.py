"""Realistic schemas: each is refused with the keyword's name, or its grammar allows valid answers."""

from __future__ import annotations

import contextlib
import datetime
import enum
import json
import random
import re
import uuid
from decimal import Decimal
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic.json_schema import JsonSchemaMode

from bench.schema_suite import FAMILIES, suite
from bench.schemas import Writer, judge
from tests.support.grammars import accepts
from tests.support.processor_time import computed_within
from tests.support.toy_tokenizer import VOCAB_SIZE, ToyTokenizer
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler

FIRST = {family: [schema for name, schema in suite() if name == family] for family in FAMILIES}
# Families with keywords that cannot be enforced.
REFUSED = {"condition", "collection", "mapping"}


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
    assert num_answers or family == "condition"


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"type": "integer", "format": "int32"}, ("7",), ('"7"', "7.5")),
        ({"type": ["number", "null"], "format": "double"}, ("7.5", "null"), ('"7"',)),
        ({"type": "string", "format": "password"}, ('"x"',), ("7",)),
        ({"type": "string", "format": "byte"}, ('"aGk="', '"aGkh"', '""'), ('"aGk"', '"a==="', '"h!=="')),
    ],
)
def test_the_formats_of_openapi_are_read(
    compiler: GrammarCompiler, schema: dict[str, Any], inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    source = sources.json_schema(schema)
    assert all(accepts(compiler, source, text) for text in inside)
    assert not any(accepts(compiler, source, text) for text in outside)


def check_numbers(
    compiler: GrammarCompiler, bounds: dict[str, Any], inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    source = sources.json_schema({"type": "number", **bounds})
    assert all(accepts(compiler, source, text) for text in inside)
    assert not any(accepts(compiler, source, text) for text in outside)


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
    check_numbers(compiler, bounds, inside, outside)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (
            {"type": "number", "minimum": 0, "maximum": 1},
            ("0.1234567891", "0.5000"),
            ("0.12345678912", "1.5"),
        ),
        (
            {"type": ["number", "null"], "minimum": -1, "exclusiveMaximum": 9},
            ("null", "-0.5"),
            ("0." + "3" * 11,),
        ),
        ({"type": "number", "minimum": 0, "maximum": 2, "enum": [0.5, 1]}, ("0.5", "1"), ("1.5",)),
        ({"type": "number", "minimum": 0, "maximum": 1e-12}, ("0.0000000000003",), ("1",)),
        (
            {"type": "number", "minimum": 0, "maximum": 0.5},
            ("0", "0.1234567891"),
            ("0.50000001", "0.12345678912"),
        ),
        ({"type": "number", "minimum": 0.001, "maximum": 0.01}, ("0.0099999999",), ("0.0100000001",)),
        # More digits would be read as the bound.
        (
            {"type": "number", "exclusiveMinimum": -100, "exclusiveMaximum": -99.5},
            ("-99.9999999999",),
            ("-100", "-99.5", "-99.999999999999999"),
        ),
        (
            {"type": "number", "minimum": 0},
            ("0.5", "25000000000000.5"),
            ("1" * 17, "0." + "3" * 11, "-1", "1e3"),
        ),
        ({"type": "number", "exclusiveMaximum": 2}, ("1.9", "-5"), ("2", "-" + "1" * 17)),
        ({"type": "number"}, ("6.02e23", "-0.5"), ()),
    ],
)
def test_a_number_of_a_range_has_an_end(
    compiler: GrammarCompiler, bounds: dict[str, Any], inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    check_numbers(compiler, bounds, inside, outside)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (
            {"type": "integer"},
            ("0", "-9000000000000000000", "1234567890123456789"),
            ("1" * 20, "-" + "9" * 19),
        ),
        ({"type": ["integer", "null"]}, ("null", "-5", "8" * 19), ("1" * 20,)),
        ({"type": "integer", "exclusiveMinimum": 5}, ("6", "8" * 19), ("5", "1" * 20)),
        (
            {"type": "integer", "maximum": -5, "multipleOf": 10},
            ("-10", "-" + "8" * 17 + "0"),
            ("0", "-" + "10" * 10),
        ),
        ({"type": "integer", "enum": [3, 4]}, ("3",), ("5",)),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, ("3", "8" * 19), ("2", "1" * 20)),
        ({"allOf": [{"type": "integer"}, {"const": 5}]}, ("5",), ("6",)),
        ({"allOf": [{"type": "integer"}, {"multipleOf": 7}]}, ("14", "-7"), ("15", "7" * 20)),
    ],
)
def test_an_integer_has_an_end(
    compiler: GrammarCompiler, bounds: dict[str, Any], inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    check_numbers(compiler, bounds, inside, outside)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_refused_where_it_is_strict_is_ignored_and_named_where_it_is_not(
    compiler: GrammarCompiler, family: str
) -> None:
    for schema in FIRST[family]:
        source = sources.json_schema(schema, is_strict=False)
        compiler.compile(source)
        try:
            strict = sources.json_schema(schema)
            compiler.compile(strict)
        except InvalidRequest as error:
            assert source.ignored
            assert any(name in error.message for name in source.ignored)
        else:
            assert source.ignored == strict.ignored == ()


class Colour(enum.Enum):
    RED = "red"
    BLUE = 3


class Part(BaseModel):
    kind: Literal["part"]
    price: Decimal = Field(gt=0, max_digits=6, decimal_places=2)
    sizes: tuple[int, float] = (1, 2.0)
    parts: list[Part] = []


class Order(BaseModel):
    id: uuid.UUID
    at: datetime.datetime
    part: Part | None = None
    colours: set[Colour] = set()
    prices: dict[Colour, Decimal] = {}
    named: dict[str, Part] = {}
    code: str = Field("a", json_schema_extra={"pattern": "^(?!x)[a-z]+$"})


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_pydantic_s_models_are_served(compiler: GrammarCompiler, mode: JsonSchemaMode) -> None:
    source = sources.json_schema(Order.model_json_schema(mode=mode), is_strict=False)
    assert set(source.ignored) >= {"pattern", "propertyNames", "uniqueItems"}
    grammar, writer = compiler.compile(source), Writer(ToyTokenizer(), VOCAB_SIZE)
    written = [writer.write(grammar, random.Random(seed)) for seed in range(8)]
    answers = [json.loads(text) for text in written if text is not None]
    assert answers
    for answer in answers:
        assert datetime.datetime.fromisoformat(answer["at"].upper()) and uuid.UUID(answer["id"])
    with pytest.raises(InvalidRequest, match=r"(?s)`uniqueItems`.*`pattern`|`pattern`.*`uniqueItems`"):
        sources.json_schema(Order.model_json_schema(mode=mode))


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_a_pydantic_model_of_what_can_be_enforced_is_strict(
    compiler: GrammarCompiler, mode: JsonSchemaMode
) -> None:
    class Step(BaseModel):
        text: str = Field(max_length=20)
        next: Step | None

    class Plan(BaseModel):
        steps: list[Step]
        day: datetime.date
        colour: Colour
        ratio: float = Field(gt=0, le=1)

    grammar = compiler.compile(sources.json_schema(Plan.model_json_schema(mode=mode)))
    writer = Writer(ToyTokenizer(), VOCAB_SIZE)
    written = [writer.write(grammar, random.Random(seed)) for seed in range(8)]
    assert [Plan.model_validate_json(text) for text in written if text is not None]


@pytest.mark.parametrize(
    ("schema", "names", "valid"),
    [
        ({"type": "array", "uniqueItems": True}, ("uniqueItems",), "[1,1]"),
        ({"type": "string", "pattern": "a(?=b)"}, ("pattern",), '"x"'),
        ({"type": "string", "pattern": "^\\x01$"}, ("pattern",), '"x"'),
        ({"type": "string", "format": "regex"}, ("format",), '"("'),
        ({"$ref": "https://example.com/schema"}, ("$ref",), "1"),
        ({"const": 2**53 + 1}, ("const",), str(2**53)),
        ({"enum": [123456789.123456789]}, ("enum",), "1"),
        ({"const": "\x01"}, ("const",), '"x"'),
        ({"type": "integer", "minimum": 2**60}, ("minimum",), "1"),
        ({"type": "integer", "multipleOf": 1_000_003}, ("multipleOf",), "1"),
        ({"type": "object", "minProperties": 2}, ("minProperties",), '{"a":1}'),
        ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, (), '{"b":1}'),
        ({"properties": {"a": {}}, "required": ["a"], "minProperties": 1}, (), '{"a":1}'),
        (
            {"properties": {"a": {}}, "additionalProperties": {"type": "null"}, "minProperties": 1},
            ("minProperties",),
            '{"a":1}',
        ),
        (
            {"properties": {"a": {}, "b": {}}, "additionalProperties": False, "minProperties": 2},
            ("minProperties",),
            '{"a":1,"b":1}',
        ),
        ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, ("oneOf",), "1"),
        (
            {"type": "object", "patternProperties": {"a": True, "b": True}, "additionalProperties": False},
            ("additionalProperties", "patternProperties"),
            '{"c":1}',
        ),
        (
            {"properties": {"a": {}}, "additionalProperties": False, "minProperties": 1, "maxProperties": 1},
            (),
            '{"a":1}',
        ),
        (
            {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2},
            ("maxProperties",),
            '{"a":1,"b":1,"c":1}',
        ),
        ({"properties": {"not": {"const": 1}}, "$schema": "https://x"}, (), '{"not":1}'),
        ({"type": "string", "maxLength": 2.0}, (), '"ab"'),
        (
            {"type": "array", "prefixItems": [{"const": 1}], "additionalItems": {"const": 2}, "maxItems": 1},
            (),
            "[1]",
        ),
        ({"properties": {f"p{i}": {"pattern": "^a$"} for i in range(9)}}, (), '{"p0":"a"}'),
        (True, (), "1"),
    ],
)
def test_what_cannot_be_enforced_is_left_out_and_named(
    compiler: GrammarCompiler, schema: Any, names: tuple[str, ...], valid: str
) -> None:
    source = sources.json_schema(schema, is_strict=False)
    assert source.ignored == names
    assert accepts(compiler, source, valid)
    if names:
        with pytest.raises(InvalidRequest, match=re.escape(f"`{names[-1]}`")):
            compiler.compile(sources.json_schema(schema))
    else:
        assert accepts(compiler, sources.json_schema(schema), valid)


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize(
    "schema",
    [
        {"patternProperties": {f"^[a-z]{{1,40}}_{i}$": {} for i in range(900)}},
        {"properties": {f"p{i}": {"pattern": f"(.*a.{{{i}00}})"} for i in range(100)}},
        {"oneOf": [{"properties": {f"p{i}": {"const": i}}, "required": [f"p{i}"]} for i in range(900)]},
        {"allOf": [{"anyOf": [{"type": "object"}] * 4}] * 12},
        {
            "$ref": "#/$defs/0",
            "$defs": {
                f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} if i < 30 else {"properties": {"a": {}}}
                for i in range(31)
            },
        },
    ],
)
def test_a_hostile_schema_is_judged_soon(schema: dict[str, Any], is_strict: bool) -> None:

    def read() -> None:
        with contextlib.suppress(InvalidRequest):
            sources.json_schema(schema, is_strict=is_strict)

    computed_within(2, read)


@pytest.mark.parametrize("text", ['{"\\u0066oo":"x"}', '{"f\\u006fo":"x"}'])
def test_a_property_cannot_hide_behind_escapes(compiler: GrammarCompiler, text: str) -> None:
    integer = {"type": "integer"}
    for schema in (
        {"properties": {"foo": integer}, "additionalProperties": True},
        {"patternProperties": {"^f": integer}},
    ):
        source = sources.json_schema({"type": "object", **schema})
        assert not accepts(compiler, source, text)
        assert accepts(compiler, source, '{"foo":1,"x":"é"}')


@pytest.mark.parametrize(
    ("form", "valid", "invalid"),
    [
        ("date", ("2024-02-29", "2000-02-29", "1999-12-31"), ("2023-02-29", "1900-02-29", "2023-04-31")),
        ("time", ("23:59:59.5Z", "00:00:00+01:30"), ("23:59:60Z", "24:00:00Z")),
        ("date-time", ("2024-02-29T12:00:00Z",), ("2023-02-29T12:00:00Z", "2024-02-29")),
    ],
)
def test_dates_are_days_that_there_are(
    compiler: GrammarCompiler, form: str, valid: tuple[str, ...], invalid: tuple[str, ...]
) -> None:
    for more in ({}, {"pattern": "^[12]|:"}):
        source = sources.json_schema({"type": "string", "format": form, **more})
        assert all(accepts(compiler, source, f'"{text}"') for text in valid)
        assert not any(accepts(compiler, source, f'"{text}"') for text in invalid)


def test_names_of_properties_are_strings(compiler: GrammarCompiler) -> None:
    """zod's `z.record(z.string(), …)` says so."""
    values = {"type": "object", "additionalProperties": {"type": "integer"}}
    for names in ({"type": "string"}, {}, True):
        source = sources.json_schema({**values, "propertyNames": names})
        assert accepts(compiler, source, '{"any name":1}')
        assert not accepts(compiler, source, '{"any name":"1"}')
    with pytest.raises(InvalidRequest, match="propertyNames"):
        sources.json_schema({**values, "propertyNames": {"type": "string", "maxLength": 3}})


def test_formats_of_somebody_s_tools_are_annotations(compiler: GrammarCompiler) -> None:
    port = {"type": "string", "format": "int-or-string"}
    schema = {"properties": {"format": port, "const": {"const": {"format": "x"}}}, "uniqueItems": False}
    source = sources.json_schema({"type": "object", **schema}, is_strict=False)
    assert source.ignored == ("format",)
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
    ("form", "inside", "outside"),
    [
        (
            "duration",
            ("P3DT12H30M5S", "PT5M", "P1W", "P1Y2M3D"),
            ("P", "PT", "P1Y2D", "PT1H5S", "P" + "1" * 7 + "D"),
        ),
        ("time", ("10:00:00.123456Z",), ("10:00:00." + "1" * 10 + "Z",)),
        (
            "email",
            ("john.q@mail.example.com", "o'brien@x.org"),
            ("a..b@x.com", "@x.com", "x@" + "a" * 64 + ".com"),
        ),
        (
            "hostname",
            ("localhost", "svc.ns.svc.cluster.local", "a" * 63 + ".com"),
            ("-a.com", "a" * 64, "a.b" * 90),
        ),
        (
            "uri",
            ("https://x.com/a%20b?x=1#y", "http://127.0.0.1:8000/", "mailto:a@b.c", "file:///etc/hosts"),
            ("//x.com", "The:+1", "https://x.com/ a", "https://x.com/%2", "https://x.com/" + "a" * 500),
        ),
    ],
)
def test_a_format_has_an_end(
    compiler: GrammarCompiler, form: str, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    source = sources.json_schema({"type": "string", "format": form})
    for text in inside:
        assert accepts(compiler, source, json.dumps(text)), text
    for text in outside:
        assert not accepts(compiler, source, json.dumps(text)), text


@pytest.mark.parametrize("name", ["maximum", "exclusiveMaximum"])
def test_a_bound_that_is_no_number_is_refused(compiler: GrammarCompiler, name: str) -> None:
    with pytest.raises(InvalidRequest):
        compiler.compile(sources.json_schema({"type": "number", "minimum": 0, name: "5"}))


@pytest.mark.parametrize("is_strict", [False, True])
def test_what_the_compiler_panics_on_is_refused(compiler: GrammarCompiler, is_strict: bool) -> None:
    """It quotes 100 bytes, even if they end inside a character."""
    for name in ("x", "xy"):
        with pytest.raises(InvalidRequest):
            compiler.compile(sources.json_schema({"required": {name: "é" * 60}}, is_strict=is_strict))
