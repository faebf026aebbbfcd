"""Formats that write arguments one by one: names and values that grammars allow and parsers read."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest

from tests.support.grammars import Marked, accepts, random_walk, takes
from tests.support.processor_time import computed_within
from tests.support.schemas import check
from tests.support.tool_calls import parse
from tests.support.tool_writers import write
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.plain_strings import whole_pattern, without
from tgi_asgi.text.constrain.source import GrammarSource
from tgi_asgi.text.tools import FORMATS, CallArguments, CallStart, ToolSpec
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.arguments import freed
from tgi_asgi.text.tools.gemma_format import GemmaFormat
from tgi_asgi.text.tools.pythonic_format import PythonicFormat
from tgi_asgi.text.tools.xml_format import XmlFormat

TAGS = [name for name, form in FORMATS.items() if isinstance(form, XmlFormat)]
EACH = [name for name, form in FORMATS.items() if isinstance(form, XmlFormat | GemmaFormat | PythonicFormat)]
A, B = {"type": "integer"}, {"type": "string"}


def grammar_of(name: str, *specs: ToolSpec, mark: Any = None) -> GrammarSource:
    options = {} if mark is None else {"mark": mark}
    grammar = answer_grammar(None, ToolUse(FORMATS[name], specs, must_call=True), **options)
    assert grammar is not None
    return grammar


def read(name: str, text: str, schema: Any, size: int = 3) -> Any:
    """Return the arguments of the only call in a text."""
    start, *arguments = parse(AnswerParser(None, FORMATS[name], [ToolSpec("f", schema)]), text, size)
    assert start == CallStart("f")
    return json.loads("".join(piece.text for piece in arguments if isinstance(piece, CallArguments)))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    ("schema", "given"),
    [
        ({"type": "object"}, {"any": 1, "name": True}),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"any": 1, "name": 2}),
        ({"additionalProperties": B}, {"any": "x", "name": "y z"}),
        ({"properties": {"a": A}, "required": ["a"], "additionalProperties": B}, {"a": 1, "name": "x"}),
        ({"properties": {"a": A}, "additionalProperties": A}, {"name": 1}),
        ({"allOf": [{"properties": {"a": A}, "required": ["a"]}, {"properties": {"s": B}}]},
         {"a": 1, "s": "x"}),
        ({"properties": {"a": A}, "allOf": [{"$ref": "#/$defs/S"}], "$defs": {"S": {"properties": {"s": B}}}},
         {"a": 1, "s": "x"}),
    ],
)  # fmt: skip
def test_arguments_may_have_names_that_no_list_at_the_top_has(
    compiler: GrammarCompiler, name: str, schema: dict[str, Any], given: dict[str, Any]
) -> None:
    text = write(name, [("f", given)])
    assert accepts(compiler, grammar_of(name, ToolSpec("f", schema)), text)
    assert read(name, text, schema) == given
    tokenizer = Marked([*FORMATS[name].markers])
    assert takes(tokenizer, grammar_of(name, ToolSpec("f", schema), mark=tokenizer.mark), text)


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize(
    "reference", ["#/$defs/List%3CT%3E", "#/$defs/List<T>", "#/$defs/Either/anyOf/0"], ids=str
)
def test_a_text_is_one_however_its_schema_is_referred_to(
    compiler: GrammarCompiler, name: str, reference: str
) -> None:
    definitions = {"List<T>": B, "Either": {"anyOf": [B, A]}}
    schema = {"properties": {"s": {"$ref": reference}}, "required": ["s"], "$defs": definitions}
    text = write(name, [("f", {"s": "12"})])
    assert accepts(compiler, grammar_of(name, ToolSpec("f", schema)), text)
    assert read(name, text, schema) == {"s": "12"}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("key", ["anyOf", "oneOf"])
def test_arguments_of_alternatives_are_all_allowed_and_needed_if_all_need_them(
    compiler: GrammarCompiler, name: str, key: str
) -> None:
    one = {"type": "object", "properties": {"kind": {"const": "one"}, "a": A}, "required": ["kind", "a"]}
    two = {"type": "object", "properties": {"kind": {"const": "two"}, "s": B}, "required": ["kind"]}
    spec = ToolSpec("f", {key: [one, two, {"type": "null"}]}, is_strict=False)
    grammar = grammar_of(name, spec)
    assert grammar.ignored == (key,)
    for given in ({"kind": "one", "a": 1}, {"kind": "two", "s": "x"}):
        assert accepts(compiler, grammar, write(name, [("f", given)])), given
    for wrong in ({"a": 1}, {"kind": "three"}):
        assert not accepts(compiler, grammar, write(name, [("f", wrong)])), wrong
    with pytest.raises(InvalidRequest, match=key):
        grammar_of(name, ToolSpec("f", {key: [one, two]}))


@pytest.mark.parametrize("name", [name for name in EACH if isinstance(FORMATS[name], GemmaFormat)])
def test_keys_within_values_may_be_any_names(compiler: GrammarCompiler, name: str) -> None:
    parameters = {"properties": {"files": {"type": "object", "additionalProperties": B}}}
    given = {
        "files": {key: "x" for key in ("src/main.py", "First Name", "a.b", "naïve", "$set", "a[0]", "k")}
    }
    call = write(name, [("f", given)])
    assert accepts(compiler, grammar_of(name, ToolSpec("f", parameters, is_strict=False)), call)
    assert read(name, call, parameters) == given


@pytest.mark.parametrize("name", EACH)
def test_names_that_a_schema_does_not_free_are_refused(compiler: GrammarCompiler, name: str) -> None:
    listed = {"properties": {"a": A}}
    for schema in (listed, {**listed, "additionalProperties": True}, {"additionalProperties": False}):
        grammar = grammar_of(name, ToolSpec("f", schema))
        assert not accepts(compiler, grammar, write(name, [("f", {"b": 1})])), schema
    map_of_texts = grammar_of(name, ToolSpec("f", {**listed, "additionalProperties": B}))
    assert not accepts(compiler, map_of_texts, write(name, [("f", {"s": "x", "a": "x"})]))


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("value", [["</end>"], {"k": 'a\\"</end>{'}, ["</end>", {"</end>": "</end>"}]])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_end_in_a_string_of_json_ends_no_value(name: str, value: Any, size: int) -> None:
    form = FORMATS[name]
    assert isinstance(form, XmlFormat)
    given = json.loads(json.dumps(value).replace("</end>", json.dumps(form.argument[2])[1:-1]))
    schema = {"properties": {"o": {}, "s": B}, "required": ["o"]}
    for arguments in ({"o": given}, {"o": given, "s": "x"}):
        assert read(name, write(name, [("f", arguments)]), schema, size) == arguments


@pytest.mark.parametrize("name", ["qwen3_coder", "minimax_m2", "seed_oss", "glm45"])
@pytest.mark.parametrize(
    ("value", "wanted"), [('["it"s"]', '["it"s"]'), ("['it\"s']", ['it"s']), ('["x', '["x'), ('{"', '{"')]
)
def test_a_value_whose_quotes_do_not_match_ends_at_its_end(name: str, value: str, wanted: Any) -> None:
    schema = {"properties": {"s": {"type": "array"}, "t": B}}
    text = write(name, [("f", {"s": "VALUE", "t": "x"})]).replace("VALUE", value)
    assert read(name, text, schema) == {"s": wanted, "t": "x"}


CONDITIONS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "string", "pattern": "^[a-z]+-\\d$"}, ["ab-1"], ["ab", '"ab-1"']),
    ({"type": "string", "pattern": "b|^c"}, ["abc\nd", "cd"], ["ac"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", 'é"c'], ["a", "abcd"]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29"]),
    ({"type": "string", "format": "uuid"}, ["3f2504e0-4f89-11d3-9a0c-0305e82c3301"], ["3f2504e0"]),
    ({"type": "string", "format": "ipv4", "minLength": 9}, ["10.0.0.12"], ["10.0.0.1", "10.0.0.256"]),
    ({"type": "string", "enum": ["a b", '"c"']}, ["a b", '"c"'], ["c", '"a b"']),
    ({"const": "x y"}, ["x y"], ['"x y"', "y"]),
    ({"allOf": [{"$ref": "#/$defs/E"}], "description": "pydantic's"}, ["a", "b"], ["c"]),
    ({"anyOf": [{"const": "on"}, {"const": "off"}], "type": "string"}, ["on", "off"], ["of"]),
]


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize(("schema", "good", "bad"), CONDITIONS)
def test_a_text_with_conditions_is_plain_and_obeys_them(
    compiler: GrammarCompiler, name: str, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    parameters = {"properties": {"s": schema}, "required": ["s"], "$defs": {"E": {"enum": ["a", "b"]}}}
    grammar = grammar_of(name, ToolSpec("f", parameters))
    assert not grammar.ignored
    tokenizer = Marked([*FORMATS[name].markers])
    marked = grammar_of(name, ToolSpec("f", parameters), mark=tokenizer.mark)
    for text in good:
        call = write(name, [("f", {"s": text})])
        assert accepts(compiler, grammar, call), text
        assert takes(tokenizer, marked, call), text
        assert read(name, call, parameters) == {"s": text}
    for text in bad:
        assert not accepts(compiler, grammar, write(name, [("f", {"s": text})])), text
        assert not takes(tokenizer, marked, write(name, [("f", {"s": text})])), text


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("keyword", ["pattern", "format", "not"])
def test_a_condition_that_a_plain_text_cannot_be_held_to_is_refused_or_named(
    compiler: GrammarCompiler, name: str, keyword: str
) -> None:
    value = {"pattern": "(^a|b$)", "format": "ipv6", "not": {"const": "a"}}[keyword]
    parameters = {"properties": {"s": {"type": "string", keyword: value}}}
    with pytest.raises(InvalidRequest, match=keyword):
        grammar_of(name, ToolSpec("f", parameters))
    grammar = grammar_of(name, ToolSpec("f", parameters, is_strict=False))
    assert grammar.ignored == (keyword,)
    assert accepts(compiler, grammar, write(name, [("f", {"s": "any text"})]))


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize(
    "schema",
    [{"type": ["string", "null"]}, {"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]}],
)
def test_a_text_that_may_be_null_is_plain_or_null(
    compiler: GrammarCompiler, name: str, schema: dict[str, Any]
) -> None:
    parameters = {"properties": {"s": schema}}
    grammar = grammar_of(name, ToolSpec("f", parameters))
    for value in ("some text", "nullable", '"quoted"', "12", None):
        call = write(name, [("f", {"s": value})])
        assert accepts(compiler, grammar, call), value
        for size in (1, 5, 1000):
            assert read(name, call, parameters, size) == {"s": value}


def test_a_text_that_may_be_null_is_passed_on_while_it_is_written() -> None:
    spec = ToolSpec("f", {"properties": {"s": {"type": ["string", "null"]}}})
    parser = AnswerParser(None, FORMATS["qwen3_coder"], [spec])
    parser.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    assert parser.push("nul") == []
    assert parser.push("ls ") == [CallArguments('"nulls ')]
    assert parser.push("and") == [CallArguments("and")]


@pytest.mark.parametrize("name", TAGS)
def test_a_value_of_several_types_is_plain_text_unless_it_is_one_of_the_others(
    compiler: GrammarCompiler, name: str
) -> None:
    schema = {"anyOf": [B, {"type": "array", "items": A}, {"type": "integer", "minimum": 5}]}
    parameters = {"properties": {"s": schema}}
    grammar = grammar_of(name, ToolSpec("f", parameters))
    for value in ("some text", "true", "", [1, 2], 7):
        call = write(name, [("f", {"s": value})])
        assert accepts(compiler, grammar, call), value
        assert read(name, call, parameters) == {"s": value}
    for wrong in ([1.5], 4):
        assert not accepts(compiler, grammar, write(name, [("f", {"s": wrong})])), wrong


# Texts that begin as other values do, but have the form of none.
LIKE_OTHERS = [
    "2024-05-01", "192.168.0.1", "3 apples", "1st", "-la /tmp", "- item", ".5.", "+49 30 1234", "+5", "1_000",
    "0x1F", "007", "(none)", "(1, 2)", "(defun f ())", "[TODO] x", "{ printf }", "{{ x }}",
    '"a" and "b"', '"a" "b"',
    '"""Docstring."""\nx = 1', "---\ntitle: x\n---", "truely", "None of them", "  indented",
    " \n3 lines", "NaN",
]  # fmt: skip
UNRESTRICTED = [
    {}, {"description": "anything"}, {"type": ["string", "number"]}, {"anyOf": [B, {"type": "integer"}]},
    {"type": ["string", "integer", "boolean", "object", "array", "null"]},
    {"anyOf": [{"type": "string"}, {"type": "array"}]},
    {"type": ["string", "number"], "description": "a number", "default": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", TAGS)
def test_a_text_may_begin_as_a_value_of_another_type_does(compiler: GrammarCompiler, name: str) -> None:
    calls = {text: write(name, [("f", {"s": text})]) for text in LIKE_OTHERS}
    grammars = set()  # several schemas have the same
    for schema in UNRESTRICTED:
        parameters = {"properties": {"s": schema}}
        grammars.add(grammar_of(name, ToolSpec("f", parameters)))
        for text, call in calls.items():
            assert read(name, call, parameters) == {"s": text}, schema
    for grammar in grammars:
        for call in calls.values():
            assert accepts(compiler, grammar, call), (call, grammar)


@pytest.mark.parametrize("name", TAGS)
def test_arguments_that_may_be_anything_may_be_any_text(compiler: GrammarCompiler, name: str) -> None:
    """Those of tools that are too many for one grammar; the parser still knows their types."""
    parameters = {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}, "required": ["s"]}
    spec = ToolSpec("f", parameters, is_strict=False)
    grammar = answer_grammar(None, ToolUse(FORMATS[name], freed([spec]), must_call=True))
    assert grammar is not None
    for text in [*LIKE_OTHERS, "5", "null", "[1]", '{"a": 1}', '"a"', ""]:
        call = write(name, [("f", {"s": text, "n": 5})])
        assert accepts(compiler, grammar, call), text
        assert read(name, call, parameters) == {"s": text, "n": 5}


@pytest.mark.parametrize("name", [name for name in TAGS if "%t" not in FORMATS[name].argument[1]])  # type: ignore[attr-defined]
@pytest.mark.parametrize("seed", range(4))
def test_what_is_allowed_for_values_of_several_types_is_valid(
    compiler: GrammarCompiler, name: str, seed: int
) -> None:
    rng = random.Random(f"{name} {seed}")  # other schemas for each format
    texts = rng.choice(
        [{"type": "string"}, {"type": "string", "minLength": 3}, {"enum": ["5", "a", "null", "[1]"]}]
    )
    others = [
        {"type": "number"}, {"type": "integer", "minimum": 6}, {"enum": [1, 5, [1], None]}, {"const": True},
        {"type": "array"}, {"type": "array", "items": B}, {"type": "object"}, {"type": "null"},
        {"type": "object", "properties": {"a": B}, "required": ["a"], "additionalProperties": False},
        {"type": ["number", "array"], "maximum": 5},
        {"not": {"type": "integer"}, "type": ["integer", "object"]},
    ]  # fmt: skip
    schema = {"anyOf": [texts, *rng.sample(others, rng.choice([1, 2]))]}
    parameters = {"properties": {"s": schema}, "required": ["s"], "additionalProperties": False}
    grammar = grammar_of(name, ToolSpec("f", parameters, is_strict=False))
    own = [
        "5",
        "-7.5",
        "1e2",
        "true",
        "False",
        "None",
        '"5"',
        '"a"',
        '"ab',
        "[1]",
        ' ["a"]',
        "['a']",
        '{"a": "b"}',
        "{'a': 1}",
        "abc",
    ]
    num_allowed = 0
    for text in own + LIKE_OTHERS:
        call = write(name, [("f", {"s": text})])
        if accepts(compiler, grammar, call):
            num_allowed += 1
            found = read(name, call, parameters)
            if "not" not in json.dumps(schema):  # left out
                check(json.dumps(found), parameters)
    assert num_allowed


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("seed", range(4))
def test_random_values_of_several_types_are_valid(compiler: GrammarCompiler, name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    leaves = [
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": '^[x-z\\[{"0-9]{1,3}$'},
        {"enum": ["a", "1", "null", 3, None]},
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        {"type": "object", "properties": {"k": A}, "required": ["k"]},
        {"type": ["null", "boolean"]},
    ]
    properties = {key: {"anyOf": rng.sample(leaves, 2)} for key in ("p", "q", "r")}
    parameters = {"properties": properties, "required": list(properties), "additionalProperties": False}
    use = ToolUse(FORMATS[name], [ToolSpec("f", parameters)], must_call=True, is_parallel=False)
    grammar = answer_grammar(None, use)
    assert grammar is not None
    check(json.dumps(read(name, random_walk(compiler, grammar, rng, 4000), parameters)), parameters)


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("value", "wanted"),
    [("\n", ""), ("\nx", "x"), ("x", "x"), ("x\n", "x"), ("\n\n", ""), ("\n\nx\n\n", "\nx\n"), ("", "")],
)
def test_lines_around_a_value_may_be_missing(
    compiler: GrammarCompiler, value: str, wanted: str, size: int
) -> None:
    schema = {"properties": {"s": B, "a": A}}
    for behind in ("", "<parameter=a>\n1\n</parameter>\n"):
        arguments = {"s": wanted, **({"a": 1} if behind else {})}
        body = f"<parameter=s>{value}</parameter>\n{behind}"
        text = f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
        assert read("qwen3_coder", text, schema, size) == arguments
        if value.startswith("\n"):  # the grammar writes the first
            assert accepts(compiler, grammar_of("qwen3_coder", ToolSpec("f", schema)), text)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "value",
    [
        "<a>\n  <parameter>x</parameter>\n  <parameter=b>y</parameter>\n </a>",
        "</parameter> </parameter>",
        "x</parameter>\n\n<b>",
    ],
)
def test_an_end_tag_within_a_line_of_a_text_is_part_of_it(
    compiler: GrammarCompiler, value: str, size: int
) -> None:
    schema = {"properties": {"s": B, "t": {"type": ["string", "null"]}, "a": A}}
    for arguments in ({"s": "x" + value}, {"s": "x" + value, "t": "-" + value, "a": 1}):
        call = write("qwen3_coder", [("f", arguments)])
        assert accepts(compiler, grammar_of("qwen3_coder", ToolSpec("f", schema)), call)
        assert read("qwen3_coder", call, schema, size) == arguments
        short = call.replace("\n</parameter>\n<", "</parameter>\n<")
        if "a" not in arguments:
            short = short.replace("</parameter>\n<", "</parameter><")
        assert accepts(compiler, grammar_of("qwen3_coder", ToolSpec("f", schema)), short)
        assert read("qwen3_coder", short, schema, size) == arguments


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^a+$", ["a"], ["", "ab"]),
        ("a|^b", ["xay", "bx"], ["xb"]),
        ("^(a|b)c|d$", ["acx", "xd"], ["xac", "b"]),
        (r"\$x$", ["a$x"], ["$xa"]),
        ("a/b", ["\na/b"], ["ab"]),
        ("^[^|]$", ["a"], ["|"]),
        ("", ["", "a"], []),
    ],
)
def test_a_pattern_is_found_anywhere_in_a_text(
    compiler: GrammarCompiler, pattern: str, good: list[str], bad: list[str]
) -> None:
    source = GrammarSource(f"start: TEXT\nTEXT: {whole_pattern(pattern)}")
    assert all(accepts(compiler, source, text) for text in good)
    assert not any(accepts(compiler, source, text) for text in bad)


@pytest.mark.parametrize("end", ["</a>", "]]></x>", "/^-$"])
def test_a_regex_of_texts_without_their_end_matches_all_of_them(compiler: GrammarCompiler, end: str) -> None:
    source = GrammarSource(f"start: TEXT\nTEXT: {without(end)}")
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices([*end, "x", "\n"], k=rng.randint(0, 9)))
        if end.lstrip("]") not in text:
            assert accepts(compiler, source, text), text
    assert not accepts(compiler, source, f"x{end}") and not accepts(compiler, source, f"x{end}y")


@pytest.mark.parametrize("name", TAGS)
def test_a_long_bounded_text_is_not_too_much_for_the_compiler(compiler: GrammarCompiler, name: str) -> None:
    schema = {"type": "string", "minLength": 1, "maxLength": 5000}
    grammar = grammar_of(name, ToolSpec("f", {"properties": {"s": schema}}))
    assert accepts(compiler, grammar, write(name, [("f", {"s": "some text </b> " * 20})]))


@pytest.mark.parametrize("pattern", [r"\bfoo", "(?=a)b", "^(^a|b)$", "(a$|b)", "[]|]"])
def test_a_pattern_that_is_no_regex_of_the_grammar_is_none(pattern: str) -> None:
    assert whole_pattern(pattern) is None


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if isinstance(form, GemmaFormat)])
def test_a_type_holds_beside_a_keyword_that_does_not(compiler: GrammarCompiler, name: str) -> None:
    properties = {
        "s": {"type": "string", "pattern": "^a"},
        "l": {"type": "array", "items": A, "minItems": 1},
        "o": {"type": "object", "properties": {"k": A}, "minProperties": 1},
    }
    grammar = grammar_of(name, ToolSpec("f", {"properties": properties}, is_strict=False))
    assert grammar.ignored == ("minItems", "minProperties", "pattern")
    assert accepts(compiler, grammar, write(name, [("f", {"s": "x", "l": [1], "o": {"k": 1}})]))
    for wrong in ({"s": 1}, {"l": ["x"]}, {"l": "x"}, {"o": {"k": "x"}}, {"o": [1]}):
        assert not accepts(compiler, grammar, write(name, [("f", wrong)])), wrong


@pytest.mark.parametrize("name", ["qwen3_coder", "gemma4", "lfm2"])
@pytest.mark.parametrize("key", ["allOf", "anyOf"])
def test_definitions_that_double_at_each_level_are_read_in_time(name: str, key: str) -> None:
    levels = {f"D{at}": {key: [{"$ref": f"#/$defs/D{at + 1}"}] * 20} for at in range(20)}
    definitions = {**levels, "D20": {"type": "string"}, "C": {key: [{"$ref": "#/$defs/C"}] * 20}}
    value = {"properties": {"s": {"$ref": "#/$defs/D0"}, "c": {"$ref": "#/$defs/C"}}}
    whole = {key: [{"$ref": "#/$defs/D0"}, {"$ref": "#/$defs/C"}]}

    def run() -> None:
        for schema in (value, whole):
            spec = ToolSpec("f", {**schema, "$defs": definitions}, is_strict=False)
            with contextlib.suppress(InvalidRequest):
                grammar_of(name, spec)
            parse(AnswerParser(None, FORMATS[name], [spec]), write(name, [("f", {"s": "x", "c": 1})]), 7)

    computed_within(2, run)


@pytest.mark.parametrize("name", ["qwen3_coder", "gemma4", "lfm2"])
def test_a_tool_with_thousands_of_patterns_is_read_in_time(name: str) -> None:
    """A call of it is parsed on the event loop."""
    patterns = {f"a{at}": {"minLength": at} for at in range(8_000)}
    spec = ToolSpec("f", {"patternProperties": patterns}, is_strict=False)

    def run() -> None:
        with contextlib.suppress(InvalidRequest):
            grammar_of(name, spec)
        for _ in range(50):
            parse(AnswerParser(None, FORMATS[name], [spec]), write(name, [("f", {"a1": "x", "a2": "y"})]), 7)

    computed_within(2, run)
