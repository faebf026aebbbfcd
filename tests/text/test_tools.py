"""Every tool-call format: what its grammar allows, what its parser reads, and how it is recognised."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from typing import Any

import pytest

from tests.support.grammars import accepts, random_walk
from tests.support.schemas import check, random_schema
from tests.support.tool_calls import PARAMETERS, SPECS, TWO_CALLS, parse, use
from tests.support.tool_writers import write
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools import (
    FORMATS,
    CallArguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
    ToolSpec,
    assumption,
    choose_format,
    harmony,
)
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.json_format import BareJsonFormat
from tgi_asgi.text.tools.reasoning import STYLES, style_of

THINK = STYLES[0]
LOOSELY_CONSTRAINED = ("gemma4", "functiongemma")  # formats whose grammar cannot enforce all of a schema
names = pytest.mark.parametrize("name", sorted(FORMATS))


def beside_json(name: str, calls: str) -> str:
    """Calls without the blanks that they cannot have where the answer may be JSON instead."""
    form = FORMATS[name]
    for part in form.call[:2] if isinstance(form, BareJsonFormat) else ():
        calls = calls.replace(part, part.replace(" ", ""))
    return calls


TWO_CALLS_OR_JSON = {name: beside_json(name, calls) for name, calls in TWO_CALLS.items()}


@names
def test_a_required_answer_is_calls_and_nothing_else(compiler: GrammarCompiler, name: str) -> None:
    grammar = answer_grammar(None, use(name, must_call=True))
    assert grammar is not None
    assert accepts(compiler, grammar, TWO_CALLS[name])
    for text in ("", "hello", "hi " + TWO_CALLS[name], TWO_CALLS[name] + "."):
        assert not accepts(compiler, grammar, text), text


@names
def test_one_call_is_the_most_where_calls_are_not_parallel(compiler: GrammarCompiler, name: str) -> None:
    for must_call in (True, False):
        grammar = answer_grammar(None, use(name, must_call=must_call, is_parallel=False))
        assert grammar is not None
        assert not accepts(compiler, grammar, TWO_CALLS[name])


@names
@pytest.mark.parametrize("is_strict", [True, False])
def test_a_property_s_schema_may_be_anything(compiler: GrammarCompiler, name: str, is_strict: bool) -> None:
    odd = {"a": True, "b": "string", "c": ["integer"], "d": 3, "e": {}}
    tool = ToolSpec("f", {"type": "object", "properties": odd}, is_strict)
    with contextlib.suppress(InvalidRequest):  # such a strict tool may be refused
        grammar = answer_grammar(None, ToolUse(FORMATS[name], [tool], must_call=True))
        assert grammar is not None
        assert accepts(compiler, grammar, write(name, [("f", {"a": 1})]))


@names
def test_an_automatic_answer_is_free_text_or_ends_in_calls(compiler: GrammarCompiler, name: str) -> None:
    grammar = answer_grammar(None, use(name))
    assert grammar is not None
    for text in (TWO_CALLS[name], "", "hello [x] {y} <tool"):
        assert accepts(compiler, grammar, text), text
    assert not accepts(compiler, grammar, write(name, [("f", {"a": 1}), ("h", {})]))
    assert accepts(compiler, grammar, "Let me see.\n" + TWO_CALLS[name])


@names
def test_an_answer_that_is_no_call_can_be_json_of_any_schema(compiler: GrammarCompiler, name: str) -> None:
    """Such as a call's object: only the name's value may tell them apart."""
    person = {
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    schemas: list[tuple[dict[str, Any], Any]] = [
        ({"type": "object", **person, "additionalProperties": False}, {"name": "Ada", "age": 3}),
        ({"type": "object"}, {"name": "Ada", "result": [1]}),
        ({"type": "array"}, [{"name": "Ada"}, 1]),
    ]
    for schema, value in schemas:
        grammar = answer_grammar(sources.json_schema(schema), use(name))
        assert grammar is not None
        assert accepts(compiler, grammar, json.dumps(value, separators=(",", ":")))
        assert accepts(compiler, grammar, TWO_CALLS_OR_JSON[name])
        assert not accepts(compiler, grammar, "Ada")


@names
def test_an_answer_that_is_no_call_can_be_constrained(compiler: GrammarCompiler, name: str) -> None:
    grammar = answer_grammar(sources.choice(["yes"]), use(name))
    assert grammar is not None
    assert accepts(compiler, grammar, "yes")
    assert accepts(compiler, grammar, TWO_CALLS_OR_JSON[name])
    assert not accepts(compiler, grammar, "no")


@names
def test_reasoning_comes_first_and_is_free(compiler: GrammarCompiler, name: str) -> None:
    grammar = answer_grammar(None, use(name, must_call=True), THINK)
    assert grammar is not None
    assert accepts(compiler, grammar, "<think>{ hm [</think>\n\n" + TWO_CALLS[name])
    assert accepts(compiler, grammar, TWO_CALLS[name])
    opened = answer_grammar(None, use(name, must_call=True), THINK, is_reasoning_open=True)
    assert opened is not None
    assert accepts(compiler, opened, "hm</think>" + TWO_CALLS[name])
    # The beginning of a call ends the reasoning in most formats.
    assert accepts(compiler, opened, TWO_CALLS[name]) == (FORMATS[name].leaves_reasoning(literal) is not None)


def test_a_constrained_answer_follows_reasoning(compiler: GrammarCompiler) -> None:
    grammar = answer_grammar(sources.choice(["yes"]), None, THINK)
    assert grammar is not None
    assert accepts(compiler, grammar, "yes")
    assert accepts(compiler, grammar, "<think>no {or} </thin</think>\n\nyes")
    assert not accepts(compiler, grammar, "no <think></think>yes")


def test_an_answer_without_tools_and_format_is_not_constrained() -> None:
    assert answer_grammar(None, None, THINK) is None


@names
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_wherever_the_text_is_cut(name: str, size: int) -> None:
    text = "<think>hm</think>\n\n" + ("Sure.\n" if FORMATS[name].marker else "") + TWO_CALLS[name]
    reasoning, *rest = parse(AnswerParser(THINK, FORMATS[name], SPECS), text, size)
    assert reasoning == Reasoning("hm")
    if FORMATS[name].marker:
        assert rest.pop(0) == Content("Sure.")
    first, arguments, second, none = rest
    assert (first, second) == (CallStart("f"), CallStart("g"))
    assert isinstance(arguments, CallArguments) and isinstance(none, CallArguments)
    assert json.loads(arguments.text) == {"a": 1, "s": '}"<'}
    assert none.text == "{}"


@names
def test_text_that_only_looks_like_a_call_is_given_whole(name: str) -> None:
    text = "a <tool_cal [TOOL_ {x} [y]  \n"
    assert parse(AnswerParser(None, FORMATS[name]), text, 1) == [Content(text)]


@names
def test_the_beginning_of_a_call_that_must_follow_is_no_text(name: str) -> None:
    """The answer was cut off inside the marker, or before it can be distinguished from JSON."""
    form = FORMATS[name]
    text = form.marker or form.written([("f", {})])[:1]
    for size in range(1, len(text)):
        assert parse(AnswerParser(None, form, must_call=True), text[:size], 1) == []
    for size in (1, 1000):
        pieces = parse(
            AnswerParser(THINK, form, SPECS, must_call=True), "<think>a</think>\n" + TWO_CALLS[name], size
        )
        assert pieces[:2] == [Reasoning("a"), CallStart("f")]


@names
@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize(
    "text",
    [
        '{"city": "Paris"}',
        ' {"name": "Ada", "age": 3}',
        '{"name": "Ada"}',
        "[1, [true]]",
        '["f(x)"]',
        "[",
        "{",
    ],
)
def test_json_that_is_no_call_is_text(name: str, text: str, size: int) -> None:
    assert parse(AnswerParser(None, FORMATS[name]), text, size) == [Content(text)]


@pytest.mark.parametrize(
    ("text", "is_open", "pieces"),
    [
        ("no thoughts", False, [Content("no thoughts")]),
        ("hm</think>x", True, [Reasoning("hm"), Content("x")]),
        ("hm</thi", True, [Reasoning("hm</thi")]),
        ("<thi", False, [Content("<thi")]),
        ("\n<think>\n\n</think>\n\nx", False, [Reasoning("\n\n"), Content("x")]),
        ("<think>a</think>", False, [Reasoning("a")]),
        ("<think>a</think>\n<think>b</think>\n\nx", False, [Reasoning("a\n\nb"), Content("x")]),
        ("<think></think><think>b</think>", False, [Reasoning("b")]),
        ("a</think>\n\n<thin", True, [Reasoning("a"), Content("<thin")]),
        ("x <think>y</think>", False, [Content("x <think>y</think>")]),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 100])
def test_reasoning_is_split_off(text: str, is_open: bool, pieces: list[Piece], size: int) -> None:
    assert parse(AnswerParser(THINK, None, is_reasoning_open=is_open), text, size) == pieces


@names
@pytest.mark.parametrize("seed", range(4))
def test_random_arguments_are_valid_for_their_schema(compiler: GrammarCompiler, name: str, seed: int) -> None:
    is_strict = name not in LOOSELY_CONSTRAINED
    # Random bytes hardly ever end a text of the others, so that their schemas are some without such texts.
    rng = random.Random(f"{name} {seed}" if is_strict else seed)
    schema = random_schema(rng)
    use_specs = [ToolSpec("f", schema, is_strict)]
    grammar = answer_grammar(None, ToolUse(FORMATS[name], use_specs, must_call=True, is_parallel=False))
    assert grammar is not None
    answer = random_walk(compiler, grammar, rng, 4000)
    start, arguments = parse(AnswerParser(None, FORMATS[name], use_specs), answer, 7)
    assert start == CallStart("f")
    assert isinstance(arguments, CallArguments)
    if is_strict or not grammar.ignored:
        check(arguments.text, schema)
    assert isinstance(json.loads(arguments.text), dict)


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("from=1, class='it''s', b=True", '{"from": 1, "class": "its", "b": true}'),
        (r"a='x\'y, (', b=[None, {'c': 1.50}]", '{"a": "x\'y, (", "b": [null, {"c": 1.5}]}'),
        ('s="\\ud83d\\ude00\\/", n=-1.50', '{"s": "\\ud83d\\ude00\\/", "n": -1.50}'),
        ("a=1 +, b=", '{"a": "1 +", "b": ""}'),
        ("", "{}"),
    ],
)
def test_pythonic_arguments_become_json(written: str, arguments: str) -> None:
    assert parse(AnswerParser(None, FORMATS["pythonic"], SPECS), f"[f({written})]", 3) == [
        CallStart("f"), CallArguments(arguments),
    ]  # fmt: skip


def test_a_call_that_is_cut_keeps_what_there_is() -> None:
    text = TWO_CALLS["hermes"]
    cut = text[: text.index("1") + 1]
    assert parse(AnswerParser(None, FORMATS["hermes"], SPECS), cut, 4) == [
        CallStart("f"),
        CallArguments('{"a": 1'),
    ]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>{{ tools }}", "hermes"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [ARGS]", "mistral_args"),
        ("<|tool_call|> followed by a JSON list of tools", "granite"),
        (TWO_CALLS["qwen3_coder"], "qwen3_coder"),
        (TWO_CALLS["deepseek_v31"], "deepseek_v31"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        (TWO_CALLS["deepseek_v3"], "deepseek_v3"),
        ("nothing of the kind", "hermes"),
    ],
)
def test_a_template_shows_its_format(template: str, name: str) -> None:
    assert choose_format(template).name == name
    assert choose_format(template, "mistral").name == "mistral"


def test_administrators_may_name_every_format() -> None:
    choices = {spec.name: spec.metadata["choices"] for spec in dataclasses.fields(Settings)}
    assert choices["tool_format"] == ("auto", *FORMATS, harmony.NAME)
    assert choices["reasoning_format"] == ("auto", "none", *(style.name for style in STYLES))


def test_a_format_that_is_not_known_is_said() -> None:
    said = assumption("{% for tool in tools %}{{ tool }}{% endfor %}", has_tools=True)
    assert said is not None and "<tool_call>" in said and "--tool-format" in said
    for template, has_tools in (
        ("<tool_call>", True),
        ("nothing", False),
        ("<|channel|>analysis<|message|>", True),
    ):
        assert assumption(template, has_tools=has_tools) is None


def test_a_template_shows_its_reasoning_style() -> None:
    assert style_of("{% if x %}</think>{% endif %}") is THINK
    assert style_of("nothing") is None
    assert THINK.is_open("assistant\n<think>\n")
    assert THINK.is_closed("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_values_in_xml_are_text_or_json_as_their_schemas_say(size: int) -> None:
    properties = {
        "text": {"type": "string"},
        "kind": {"type": "string", "enum": ["1", "true"]},
        "code": {"type": "string", "pattern": "^a+$"},
        "count": {"type": "integer"},
        "is_ok": {"type": "boolean"},
        "many": {"type": "array", "items": {"type": "number"}},
    }
    values = {
        "text": 'say "1"\n</par>\n\tend', "kind": "1", "code": "aa", "count": "7", "is_ok": "True",
        "many": "[1.50, 2]",
    }  # fmt: skip
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    text = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
    specs = [ToolSpec("f", {"properties": properties, "required": list(properties)})]
    assert parse(AnswerParser(None, FORMATS["qwen3_coder"], specs), text, size) == [
        CallStart("f"),
        CallArguments(
            '{"text": "say \\"1\\"\\n</par>\\n\\tend", "kind": "1", "code": "aa", "count": 7, "is_ok": true, '
            '"many": [1.50, 2]}'
        ),
    ]
    cut = text[: text.index("</par>")]
    assert parse(AnswerParser(None, FORMATS["qwen3_coder"], specs), cut, size) == [
        CallStart("f"), CallArguments('{"text": "say \\"1\\"'),
    ]  # fmt: skip


def test_text_in_xml_comes_out_as_it_is_written() -> None:
    specs = [ToolSpec("f", {"properties": {"s": {"type": "string"}}})]
    parser = AnswerParser(None, FORMATS["qwen3_coder"], specs)
    parser.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    assert parser.push("one ") == [CallArguments("one ")]
    assert parser.push("two\n</") == [CallArguments("two")]
    assert parser.push("x>") == [CallArguments("\\n</x>")]


@names
@pytest.mark.parametrize("is_strict", [True, False])
def test_a_tool_that_lists_no_arguments_gets_none(
    compiler: GrammarCompiler, name: str, is_strict: bool
) -> None:
    schema = {"type": "object", "properties": {}, "required": [], "title": "Now"}
    specs = [ToolSpec("f", schema, is_strict)]
    grammar = answer_grammar(None, ToolUse(FORMATS[name], specs, must_call=True, is_parallel=False))
    assert grammar is not None
    answer = random_walk(compiler, grammar, random.Random(1), 400)
    start, *arguments = parse(AnswerParser(None, FORMATS[name], specs), answer, 7)
    assert start == CallStart("f")
    assert json.loads("".join(piece.text for piece in arguments if isinstance(piece, CallArguments))) == {}


def test_a_tool_that_allows_unlisted_arguments_gets_any() -> None:
    for said in ({"properties": {}, "additionalProperties": True}, {"type": "object"}):
        assert ToolSpec("f", said).schema == {"type": "object", **said}


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_a_condition_on_all_arguments_together_is_refused_by_name_where_it_cannot_be_held(name: str) -> None:
    schema = {**PARAMETERS, "dependentRequired": {"a": ["b"]}}
    with pytest.raises(InvalidRequest, match="dependentRequired"):
        answer_grammar(None, ToolUse(FORMATS[name], [ToolSpec("f", schema)], must_call=True))
    grammar = answer_grammar(None, ToolUse(FORMATS[name], [ToolSpec("f", schema, is_strict=False)]))
    assert grammar is not None
    assert grammar.ignored == ("dependentRequired",)


@names
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"enum": ["x" * 200_000]}}},
        {"properties": {"a": {"type": "strin"}}, "required": True},
        {"properties": {"a": {"$ref": "#/$defs/absent"}}},
    ],
)
def test_one_tool_whose_schema_cannot_be_had_is_free_and_named_unless_it_is_strict(
    compiler: GrammarCompiler, name: str, parameters: dict[str, Any]
) -> None:
    specs = [*SPECS, ToolSpec("big", parameters, is_strict=False)]
    grammar = answer_grammar(
        sources.json_schema({"type": "array", "uniqueItems": True}, is_strict=False),
        ToolUse(FORMATS[name], specs),
    )
    assert grammar is not None
    assert grammar.ignored == ("tools.big", "uniqueItems")
    assert accepts(compiler, grammar, TWO_CALLS_OR_JSON[name])
    assert accepts(compiler, grammar, beside_json(name, write(name, [("big", {"a": 1}), ("g", {})])))
    with pytest.raises(InvalidRequest):
        wanted = answer_grammar(None, ToolUse(FORMATS[name], [ToolSpec("big", parameters)]))
        assert wanted is not None
        compiler.compile(wanted)


@names
def test_a_truth_value_is_the_one_that_its_schema_names(compiler: GrammarCompiler, name: str) -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {"type": "boolean", "enum": [True]}}}
    grammar = answer_grammar(
        None, ToolUse(FORMATS[name], [ToolSpec("f", schema), ToolSpec("g", None)], must_call=True)
    )
    assert grammar is not None
    for value in (True, False):
        assert accepts(compiler, grammar, write(name, [("f", {"a": 1, "b": value}), ("g", {})])) == value


@names
@pytest.mark.parametrize("place", ["$defs", "definitions"])
def test_arguments_may_be_a_reference_to_a_definition(
    compiler: GrammarCompiler, name: str, place: str
) -> None:
    """zod-to-json-schema writes so; formats that write each argument alone took it for a tool without any."""
    definition = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema = {"$ref": f"#/{place}/Arguments", place: {"Arguments": definition}}
    spec = ToolSpec("f", schema)
    assert spec.arguments.properties == {"a": {"type": "integer"}}
    grammar = answer_grammar(None, ToolUse(FORMATS[name], [spec], must_call=True))
    assert grammar is not None
    assert accepts(compiler, grammar, write(name, [("f", {"a": 1})]))
    assert not accepts(compiler, grammar, write(name, [("f", {})]))


def test_a_reference_to_itself_or_elsewhere_stays() -> None:
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    for schema in ({"$ref": "#"}, {"$ref": "http://a"}, endless):
        assert ToolSpec("f", schema).arguments.properties == {}
