"""Grammars against `re` and `jsonschema`, on a vocabulary of bytes; and hostile grammars."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest

from tests.support.grammars import NUM_WORDS, accepts, allowed, random_walk
from tests.support.processor_time import at_most, computed_within
from tests.support.schemas import check, random_schema
from tests.support.toy_tokenizer import EOS, IM_END, VOCAB_SIZE, ToyTokenizer
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import compiler as compiler_module
from tgi_asgi.text.constrain import grammar as grammar_module
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.grammar import Matcher


def test_a_model_without_an_end_refuses_grammars() -> None:
    tokenizer = ToyTokenizer()
    tokenizer.eos_ids = frozenset()
    with pytest.raises(InvalidRequest, match="no token that ends"):
        GrammarCompiler(tokenizer, VOCAB_SIZE).compile(sources.any_object())


@pytest.mark.parametrize("seed", range(60))
def test_whatever_a_random_schema_s_grammar_allows_validates(compiler: GrammarCompiler, seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    text = random_walk(compiler, sources.json_schema(schema), rng, 4000)
    check(text, schema)


@pytest.mark.parametrize(
    "pattern",
    [r"[a-f]{2,5}-\d{3}", r"(red|green)+x?", r"\w+@\w+\s\.(com|org)", r"^a/b$", "é?ü{1,3}", '"[^"]*"'],
)
def test_whatever_a_regex_s_grammar_allows_matches_it_as_a_whole(
    compiler: GrammarCompiler, pattern: str
) -> None:
    for seed in range(5):
        text = random_walk(compiler, sources.regex(pattern), random.Random(seed), 300)
        assert re.fullmatch(pattern, text)


def test_a_choice_is_one_of_its_texts_even_where_one_begins_another(compiler: GrammarCompiler) -> None:
    source = sources.choice(["yes", "yes, sir", 'a "quoted"\nline', "ja"])
    assert all(accepts(compiler, source, text) for text in ("yes", "yes, sir", 'a "quoted"\nline'))
    assert not any(accepts(compiler, source, text) for text in ("", "ye", "yes,", "yes, sir!", "Yes"))


@pytest.mark.parametrize("text", ['root ::= "(" root ")" | "x"', 'start: "(" start ")" | "x"'])
def test_grammars_may_be_written_as_gbnf_or_as_lark(compiler: GrammarCompiler, text: str) -> None:
    source = sources.ebnf(text)
    assert accepts(compiler, source, "((x))")
    assert not accepts(compiler, source, "((x)")


def test_json_is_compact_and_keeps_the_schema_s_order(compiler: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {"b": {"type": "integer"}, "a": {"type": "null"}},
        "required": ["b", "a"],
    }
    source = sources.json_schema(schema)
    assert accepts(compiler, source, '{"b":1,"a":null}')
    assert not accepts(compiler, source, '{"b": 1,"a":null}')
    assert not accepts(compiler, source, '{"a":null,"b":1}')


def test_a_schema_with_properties_and_no_type_describes_an_object(compiler: GrammarCompiler) -> None:
    """TGI's guides write schemas like this."""
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
    source = sources.json_schema(schema)
    assert accepts(compiler, source, '{"a":1}')
    assert not accepts(compiler, source, "1")
    assert "type" not in schema


def test_the_end_is_allowed_exactly_where_the_text_is_complete(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(sources.regex("ab?c?")).matcher()
    assert allowed(matcher) == [ord("a")]
    matcher.accept(ord("a"))
    assert {EOS, IM_END} < set(allowed(matcher))  # every token that ends an answer
    assert not matcher.is_ended
    matcher.accept(ord("b"))
    matcher.accept(ord("c"))
    assert matcher.is_ended


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("count", [1, 6])  # by the thread itself, or by several threads
def test_text_that_must_follow_is_the_same_looked_up_or_computed(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, count: int, is_slow: bool
) -> None:
    monkeypatch.setattr(grammar_module, "_SLOW_S", -1.0 if is_slow else 60.0)
    grammar = compiler.compile(sources.regex("(abc){9}(x|y)[0-9]{2}z{5}"))
    matchers = [grammar.matcher() for _ in range(count)]
    masks = np.zeros((count, -(-VOCAB_SIZE // 32)), np.int32)
    text, num_looked_up = b"", 0
    for byte in b"abc" * 9 + b"y07zzzzz":
        num_looked_up += bool(matchers[0]._forced)
        Matcher.fill_masks(matchers, range(count), masks)
        for matcher, mask in zip(matchers, masks, strict=True):
            assert mask.view(np.uint32)[byte // 32] >> byte % 32 & 1
            single = compiler.compile(sources.regex("(abc){9}(x|y)[0-9]{2}z{5}")).matcher(list(text))
            assert (
                allowed(single)
                == np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
            )
            matcher.accept(byte)
        text += bytes([byte])
    assert all(matcher.is_ended for matcher in matchers)
    assert (num_looked_up > 20) == is_slow


def test_a_token_that_was_not_foreseen_ends_the_foresight(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "_SLOW_S", -1.0)
    matcher = compiler.compile(sources.regex("abc")).matcher()
    assert allowed(matcher) == [ord("a")]
    matcher.accept(ord("x"))
    assert matcher.error is not None


def test_a_matcher_goes_on_where_the_tokens_it_is_given_end(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(sources.regex("abc"))
    assert allowed(grammar.matcher(list(b"ab"))) == [ord("c")]
    assert allowed(grammar.matcher()) == [ord("a")]


def test_a_token_that_is_not_allowed_is_the_matcher_s_error(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(sources.regex("abc")).matcher()
    matcher.accept(ord("x"))
    assert matcher.error is not None


_ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (lambda: sources.json_schema({"not": {"type": "string"}}), "not"),
        (lambda: sources.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: sources.json_schema({"$ref": "#/$defs/absent"}), "absent"),
        (lambda: sources.json_schema({"$ref": "#"}), "no text can match"),
        (lambda: sources.json_schema(_ENDLESS), "has no end"),
        (lambda: sources.json_schema({"type": "string", "pattern": "a(?=b)"}), "`pattern`.*look-around"),
        (
            lambda: sources.json_schema({"type": "number", "minimum": 1e-100}),
            "bound of a number.*too many digits",
        ),
        (lambda: sources.json_schema({"type": "number", "multipleOf": 0.0}), "invalid multiple of"),
        (lambda: sources.json_schema({"type": "string", "format": "regex"}), "`format` regex"),
        (lambda: sources.regex("(a"), "regex"),
        (lambda: sources.regex("a(?=b)"), "regex"),
        (lambda: sources.choice([]), "choice"),
        (lambda: sources.ebnf("start: absent"), "absent"),
    ],
)
def test_a_refusal_names_what_cannot_be_had(compiler: GrammarCompiler, source: Any, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        compiler.compile(source())


def test_a_lenient_schema_leaves_out_what_cannot_be_had(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}}
    assert accepts(compiler, sources.json_schema(schema, is_strict=False), "[true]")


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _chain(length: int) -> dict[str, Any]:
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "null"}}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: sources.json_schema(_nested(5_000)),
        lambda: sources.json_schema(_chain(20_000)),
        lambda: sources.json_schema({"enum": [f"value {i}" * 9 for i in range(50_000)]}),
        lambda: sources.json_schema({"type": "integer", "multipleOf": 1_000_003}),
        lambda: sources.json_schema({"type": "number", "multipleOf": 1e-9 + 1}),
        lambda: sources.json_schema({"type": "integer", "multipleOf": 10**400}),
        lambda: sources.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(9_000)}}),
        lambda: sources.json_schema({"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(9)]}),
        lambda: sources.regex("(" * 5_000 + "a" + ")" * 5_000),
        lambda: sources.regex("a" * 1_000_000),
        lambda: sources.regex("((a{100}){100}){100}"),  # too complex only after the first token
        lambda: sources.regex("a{300000}"),
        lambda: sources.ebnf("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000))),
        lambda: sources.ebnf("start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        lambda: sources.choice(["x" * 20] * 50_000),
        lambda: sources.json_schema({"allOf": [{"anyOf": [{"type": "object"}] * 4}] * 12}),
    ],
)
def test_a_hostile_grammar_is_refused_soon(compiler: GrammarCompiler, make: Any) -> None:
    def run() -> None:
        with pytest.raises(InvalidRequest):
            compiler.compile(make())

    computed_within(5, run)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sources.regex("((((a{1,1000}){1,1000}){1,1000}){1,1000})"),
        lambda: sources.regex("(.*a.{200})"),
        lambda: sources.ebnf("start: s\ns: s s | \"a\" | \"a\" s \"a\" | "),
        lambda: sources.ebnf('start: ("a"{1,1000}){1,1000}'),
        lambda: sources.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(999)}}),
        lambda: sources.json_schema({"enum": [f"a value {i}" for i in range(5_000)]}),
        lambda: sources.json_schema({"type": "array", "minItems": 10**9, "items": {"maxLength": 10**9}}),
        lambda: sources.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}),
        lambda: sources.regex("|".join(f"word{i}[a-z]{{1,9}}" for i in range(3_000))),
        lambda: sources.regex(r"(\w{1,500} ){1,500}"),
    ],
)  # fmt: skip
def test_a_grammar_that_explodes_stops_with_an_error_and_not_the_thread(
    compiler: GrammarCompiler, make: Any
) -> None:
    with at_most(1):
        matcher = compiler.compile(make()).matcher()
    mask = np.zeros(NUM_WORDS, np.int32)
    for _ in range(60):
        with at_most(1):
            matcher.fill_mask(mask)
            matcher.accept(ord("a"))
        if matcher.is_ended:
            break


def test_equal_grammars_are_compiled_once_and_the_least_used_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tgi_asgi.text.constrain.compiler.MAX_CACHED", 2)
    compiler = GrammarCompiler(ToyTokenizer(), VOCAB_SIZE)
    first = compiler.compile(sources.choice(["a"]))
    compiler.compile(sources.choice(["b"]))
    assert compiler.compile(sources.choice(["a"])) is first
    compiler.compile(sources.choice(["c"]))
    assert compiler.compile(sources.choice(["a"])) is first
    assert len(compiler._compiled) == 2


def _read(matcher: Matcher, text: bytes) -> str | None:
    """Accept a text, with a mask before each byte; return the matcher's error."""
    mask = np.zeros(NUM_WORDS, np.int32)
    for byte in text:
        matcher.fill_mask(mask)
        assert mask.view(np.uint32)[byte // 32] >> byte % 32 & 1 or matcher.error
        matcher.accept(byte)
    return matcher.error


def test_a_long_bounded_string_goes_on_when_its_lexer_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "_MAX_LEXER_STATES", 1_000)
    compiler = GrammarCompiler(ToyTokenizer(), VOCAB_SIZE)
    matcher = compiler.compile(sources.json_schema({"type": "string", "maxLength": 3_000})).matcher()
    assert _read(matcher, b'"' + b"a" * 600) is None
    assert _read(matcher.copy(), b'a"') is None


def test_what_answers_have_built_takes_no_room_from_those_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler_module, "_MAX_LEXER_STATES", 1_000)
    compiler = GrammarCompiler(ToyTokenizer(), VOCAB_SIZE)
    source = sources.regex("(foo|bar|[a-z]+[0-9]*){1,40}(x[a-z]*y|z{2,30}[a-f0-9]*){0,30}")
    rng = random.Random(1)
    half_way = compiler.compile(source).matcher(list(b"foobar"))
    for _ in range(60):
        words = rng.choices(["foo", "bar", "q1", "abc", "x", "e", "k77"], k=20)
        assert _read(compiler.compile(source).matcher(), "".join(words).encode()) is None
    assert _read(half_way, b"foo12bar") is None
    matchers = [compiler.compile(source).matcher(list(b"foo") * n) for n in range(1, 7)]
    masks = np.zeros((len(matchers), NUM_WORDS), np.int32)
    for byte in b"barq1abc" * 4:
        Matcher.fill_masks(matchers, range(len(matchers)), masks)
        assert all(mask.view(np.uint32)[byte // 32] >> byte % 32 & 1 for mask in masks)
        for matcher in matchers:
            matcher.accept(byte)
            assert matcher.error is None
