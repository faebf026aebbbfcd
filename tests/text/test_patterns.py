"""Regexes in the dialects of clients: ECMA-262's and Python's."""

from __future__ import annotations

import re

import pytest

from tests.support.grammars import accepts
from tests.support.processor_time import at_most
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.formats import PATTERNS, PLAIN_PATTERNS
from tgi_asgi.text.constrain.patterns import rust_regex
from tgi_asgi.text.constrain.plain_strings import whole_pattern
from tgi_asgi.text.constrain.source import GrammarSource

EMAIL = r'^(([^<>()[\]\\.,;:\s@"]+(\.[^<>()[\]\\.,;:\s@"]+)*)|(".+"))@(([a-zA-Z\-0-9]+\.)+[a-zA-Z]{2,})$'
CHARACTERS = ["a", "b", "z", "&", "[", "]", "-", "~", "!", "+", "+]", "b]", "a]", "&]", ":]", "A"]


@pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")
@pytest.mark.parametrize(
    "pattern",
    [
        "[[]",
        "[^[]",
        "[a[b]",
        "[a[b]]",
        "[a-z&&[^b]]",
        "[a&&b]",
        "[!--]",
        "[--a]",
        "[~~a]",
        r"[\[b]",
        r"[&\&]",
    ],
)
def test_a_class_is_a_list_of_characters_wherever_a_regex_is_given(
    compiler: GrammarCompiler, pattern: str
) -> None:
    """Rust's dialect has classes within classes, and operators between them."""
    anchored = f"^{pattern}$"
    plain = [sources.regex(pattern), GrammarSource(f"start: TEXT\nTEXT: {whole_pattern(anchored)}")]
    value = sources.json_schema({"type": "string", "pattern": anchored})
    name = sources.json_schema({"type": "object", "patternProperties": {anchored: {"const": 1}}})
    for text in CHARACTERS:
        is_right = re.fullmatch(pattern, text) is not None
        assert [accepts(compiler, source, text) for source in plain] == [is_right] * 2, text
        assert accepts(compiler, value, f'"{text}"') == is_right, text
        if is_right:
            assert not accepts(compiler, name, f'{{"{text}":2}}'), text


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r'{"a": \d{2}}', '{"a": 12}', '{"a": 1}'),
        ("/{id}/x{1,}", "/{id}/xx", "/{id}/"),
        ("a{2}{b}", "aa{b}", "a{2}{b}"),
        (r"\u{41}\x{42}\p{Lu}", "ABC", "u{41}"),
        (r"[{]\{{", "{{{", "{{"),
        ("{,a}{,b", "{,a}{,b", "{"),
    ],
)
def test_a_brace_without_a_count_is_a_character(
    compiler: GrammarCompiler, pattern: str, good: str, bad: str
) -> None:
    for source in (
        sources.regex(pattern),
        GrammarSource(f"start: TEXT\nTEXT: {whole_pattern(f'^{pattern}$')}"),
    ):
        assert accepts(compiler, source, good)
        assert not accepts(compiler, source, bad)


@pytest.mark.parametrize("pattern", ["a{,2}", "b{,}a{,1}", r"a\Z", r"^(?:a|b\Z)\Z", r"a{,2}\Z|\{,2}"])
def test_counts_without_a_minimum_and_the_end_are_pythons(compiler: GrammarCompiler, pattern: str) -> None:
    plain = sources.regex(pattern)
    value = sources.json_schema({"type": "string", "pattern": pattern})
    for text in ["", "a", "aa", "aaa", "b", "bbb", "bba", "bbaa", "Z", "aZ", "a{,2}", "{,2}"]:
        assert accepts(compiler, plain, text) == (re.fullmatch(pattern, text) is not None), text
        assert accepts(compiler, value, f'"{text}"') == (re.search(pattern, text) is not None), text


@pytest.mark.parametrize("pattern", [r"\S", r"[^\s@]", r"[\S]", r"[\Sx]", r"[\s\S]", r"[^\S\n]", r"\s"])
def test_what_is_no_blank_is_no_blank_of_unicode(compiler: GrammarCompiler, pattern: str) -> None:
    is_blank = pattern in (r"[^\S\n]", r"\s")  # of ASCII only
    plain = sources.regex(pattern)
    value = sources.json_schema({"type": "string", "pattern": f"^{pattern}$"})
    argument = GrammarSource(f"start: TEXT\nTEXT: {whole_pattern(f'^{pattern}$')}")
    for text in ["a", "é", "語", " ", "\u0085", "\u00a0", "\u1680", "\u2007", "\u2029", "\u202f", "\u3000"]:
        is_right = re.fullmatch(pattern, text) is not None and (text.isascii() or not is_blank)
        assert accepts(compiler, plain, text) == is_right, text
        assert accepts(compiler, argument, text) == is_right, text
        assert is_blank or accepts(compiler, value, f'"{text}"') == is_right, text


def test_the_common_pattern_of_an_address_is_enforced(compiler: GrammarCompiler) -> None:
    source = sources.json_schema({"type": "string", "pattern": EMAIL})
    assert accepts(compiler, source, '"ada.l@example.org"')
    assert not accepts(compiler, source, '"a[b@example.org"')


@pytest.mark.parametrize(
    "pattern", [r"^[^\x00-\x1f\x7f]+$", "^[^\n\r]+$", r"^[^\u0000]+$", r"^[\x00-\x7f]+$"]
)
def test_a_class_may_exclude_or_span_control_characters(compiler: GrammarCompiler, pattern: str) -> None:
    source = sources.json_schema({"type": "string", "pattern": pattern})
    assert accepts(compiler, source, '"ab"')
    assert accepts(compiler, source, r'"a\tb"') == (re.search(pattern, "a\tb") is not None)
    assert accepts(compiler, source, '"é"') == (re.search(pattern, "é") is not None)


@pytest.mark.parametrize("pattern", ["\x01", r"a\x01", r"[\x01]", r"\[\x01]", r"[\x01-\x01]", r"\u0002-a"])
def test_a_certain_control_character_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="control characters"):
        sources.json_schema({"type": "string", "pattern": pattern})


@pytest.mark.parametrize("pattern", ["\\", "a\\", "a" + 3 * "\\", "[a]\\"])
def test_a_lone_backslash_at_the_end_is_refused(pattern: str) -> None:
    """llguidance's converter drops it, and the answer would match another regex."""
    with pytest.raises(InvalidRequest, match="ends with a lone"):
        sources.regex(pattern)


def test_an_escaped_backslash_at_the_end_is_one(compiler: GrammarCompiler) -> None:
    assert accepts(compiler, sources.regex("a\\\\"), "a\\")


def test_classes_without_an_end_are_read_once() -> None:
    with at_most(1):
        assert rust_regex(r"\p{" * 100_000) == r"\p\{" * 100_000
        assert rust_regex("[" * 100_000).startswith(r"[\[\[")
        assert rust_regex("[" * 100_000 + "\\").endswith("\\")


def test_the_server_s_own_patterns_are_in_both_dialects() -> None:
    assert all(rust_regex(each) == each for each in [*PATTERNS.values(), *PLAIN_PATTERNS.values()])
