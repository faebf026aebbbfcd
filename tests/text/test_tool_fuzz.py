"""Random arguments, written in each format, are parsed back unchanged however the text is cut."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.processor_time import computed_within
from tests.support.tool_calls import parse
from tests.support.tool_writers import Call, write
from tgi_asgi.text.tools import FORMATS, CallArguments, CallStart, Content, ToolSpec
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.base import Piece
from tgi_asgi.text.tools.gemma_format import GemmaFormat
from tgi_asgi.text.tools.harmony import HarmonyParser
from tgi_asgi.text.tools.reasoning import STYLES

PROPERTIES: dict[str, Any] = {
    "text": {"type": "string"},
    "number": {"type": "number"},
    "count": {"type": "integer"},
    "is_it": {"type": "boolean"},
    "many": {"type": "array"},
    "some": {"type": "object"},
    "any": {},
}
SPECS = [ToolSpec("f", {"type": "object", "properties": PROPERTIES}), ToolSpec("get_it", None)]
# Contents of values: letters, quotes, and parts of many formats' marks.
MARKS = ("<tool_call>", "</", *"{}[]),\"'\\\n=:é🙂", "<|", "```")
TEXTS = st.lists(st.sampled_from(("a", "B c", "1", *MARKS)), max_size=6).map("".join)
# Texts that a format cannot contain: it does not quote texts, so its own end mark ends them.
BOUND = {
    "qwen3_coder": "</", "seed_oss": "</", "minimax_m2": "</", "deepseek_v32": "</", "deepseek_v4": "</",
    "glm45": "</", "hy_v3": "</", "minicpm5": "]",
}  # fmt: skip
KEYS = st.text("abc_", min_size=1, max_size=3)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXTS,
        "number": NUMBERS,
        "count": st.integers(),
        "is_it": st.booleans(),
        "many": st.lists(VALUES, max_size=3),
        "some": st.dictionaries(KEYS, VALUES, max_size=3),
        # A value without a declared type: unquoted text is parsed as the type that it looks like.
        "any": st.booleans() | NUMBERS | st.text("xyz", min_size=1),
    },
)
NOTHING: st.SearchStrategy[Call] = st.just(("get_it", {}))
CALLS = st.lists(st.tuples(st.just("f"), ARGUMENTS) | NOTHING, min_size=1, max_size=3)


@given(CALLS, st.integers(1, 40), st.sampled_from(("", "Let me see.", "\n")))
@settings(max_examples=50)
def test_random_calls_come_back_equal(calls: list[Call], size: int, before: str) -> None:
    """All formats get the same calls, because to make random ones takes longer than to read them."""
    texts = texts_of([given for _, given in calls])
    for name, form in FORMATS.items():
        if name in BOUND and any(BOUND[name] in text for text in texts):
            continue
        shown = before if form.marker and not form.may_begin else ""
        pieces = parse(AnswerParser(None, form, SPECS), shown + write(name, calls), size)
        found: list[Call] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                found.append((piece.name, {}))
            elif isinstance(piece, CallArguments):
                found[-1] = (found[-1][0], json.loads(piece.text))
        assert found == calls, name
        assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == shown.strip(), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_is_passed_on_while_it_is_written(name: str) -> None:
    """A file that an agent writes takes minutes; a client that sees nothing of it gives up."""
    text = write(name, [("f", {"text": "line " * 200, "number": 1})])
    half = text[: text.index("line") + 500]
    pieces = parse(AnswerParser(None, FORMATS[name], SPECS), half, 7)
    assert isinstance(pieces[-1], CallArguments)
    assert json.loads(pieces[-1].text + '"}')["text"].count("line") > 95


# Formats whose arguments are not written as JSON, and what junk for them is made of.
OWN_FORMS = ("gemma4", "functiongemma", "pythonic", "olmo3", "lfm2")
PARTS = [*"{}[](),:=\"'\\é \n", "<|", "text", "1.5", "true", "\\x4", "41", "\\ud83d"]


@pytest.mark.parametrize("written", ['{text:1,o:{k:[1,{k:<|"|>line li', '{o:[<|"|>line li'])
def test_gemma_s_texts_within_others_are_passed_on_while_they_are_written(written: str) -> None:
    pieces = parse(AnswerParser(None, FORMATS["gemma4"], SPECS), f"<|tool_call>call:f{written}", 3)
    assert isinstance(pieces[-1], CallArguments)
    assert pieces[-1].text.endswith('"line li')


@pytest.mark.parametrize("name", OWN_FORMS)
@given(st.data())
@settings(max_examples=60)
def test_arguments_that_end_are_json_whatever_a_model_wrote(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    head, quote = ("call:f{text:", form.markers[2]) if isinstance(form, GemmaFormat) else ("[f(text=", '"')
    parts = st.sampled_from([*PARTS, quote, head, *form.markers])
    text = form.marker + head + "".join(data.draw(st.lists(parts, max_size=16)))
    whole = parse(AnswerParser(None, form, SPECS), text, len(text))
    for size in range(1, 8):
        assert parse(AnswerParser(None, form, SPECS), text, size) == whole
    for piece in whole[:-1]:  # the answer may have been cut in the last
        if isinstance(piece, CallArguments):
            assert isinstance(json.loads(piece.text), dict)
            piece.text.encode()


@pytest.mark.parametrize("name", FORMATS)
def test_no_run_of_blanks_holds_the_server_up(name: str) -> None:
    """The server parses answers on one thread: a call that ends in 500 blanks blocked it for many seconds."""
    text = write(name, [("f", {"text": "v w", "number": 1}), ("get_it", {})])

    def run() -> None:
        for place in re.finditer(r"\W(?=\w|$)|\w(?=\W)", text):
            parse(AnswerParser(None, FORMATS[name], SPECS), text[: place.end()] + " " * 500 + "#", 16)

    computed_within(5, run)


@pytest.mark.parametrize("before", ["", "<think>", "<think></think>text"])
def test_a_run_of_blanks_that_is_held_back_is_read_in_time(before: str) -> None:
    """Markers may follow it: all that was held was read again with each token."""

    def run() -> list[Piece]:
        parser = AnswerParser(STYLES[0], FORMATS["hermes"], SPECS)
        parser.push(before)
        return [piece for _ in range(8_000) for piece in parser.push(80 * " ")] + parser.push("#")

    assert len(computed_within(0.5, run)) == 1


@pytest.mark.parametrize("behind", ['"' + 60_000 * "x", 20_000 * " "], ids=["text", "blanks"])
def test_what_follows_arguments_is_read_in_time(behind: str) -> None:
    """An id may follow. The parser used to match all of it again at each of its characters."""
    call = '{"name": "f", "arguments": {"text": "v"}, "id":'

    def run() -> list[Piece]:
        return parse(AnswerParser(None, FORMATS["hermes"], SPECS), f"<tool_call>{call}{behind}", 16)

    assert [type(piece) for piece in computed_within(3, run)[:2]] == [CallStart, CallArguments]


@pytest.mark.parametrize("behind", [16_000 * "\n", "<parameter=" + 16_000 * "a"], ids=["blanks", "name"])
def test_what_follows_a_function_s_name_is_read_in_time(behind: str) -> None:
    """No grammar holds a model that omits the marker before `<function=`."""

    def run() -> None:
        parser = AnswerParser(None, FORMATS["qwen3_coder"], SPECS)
        for at in range(len(behind)):
            parser.push(("" if at else "<function=f>") + behind[at])

    computed_within(5, run)


@pytest.mark.parametrize("kind", ["string", "array"])
def test_a_long_value_of_a_tool_with_many_arguments_is_read_in_time(kind: str) -> None:
    """Each token was compared with the ends of all arguments, in everything that the value had so far."""
    properties = {f"name_{number}": {"type": kind} for number in range(300)}

    def run() -> None:
        parser = AnswerParser(None, FORMATS["qwen3_coder"], [ToolSpec("f", {"properties": properties})])
        parser.push("<tool_call>\n<function=f>\n<parameter=name_0>\n[")
        for _ in range(2_000):
            parser.push('"some text')
            parser.push(' in a line", ')

    computed_within(1, run)


def texts_of(value: Any) -> list[str]:
    """Return all texts within a value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts_of(item)]
    return [text for item in value.values() for text in texts_of(item)] if isinstance(value, dict) else []


@given(ARGUMENTS, st.integers(1, 40), st.booleans())
@settings(max_examples=60)
def test_a_random_call_in_a_channel_comes_back_equal(
    given: dict[str, Any], size: int, is_early: bool
) -> None:
    channel = (
        " to=functions.f<|channel|>commentary json<|message|>"
        if is_early
        else "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    )
    thoughts = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    pieces = parse(HarmonyParser(SPECS), f"{thoughts}{channel}{json.dumps(given)}<|call|>", size)
    kinds = [type(piece).__name__ for piece in pieces]
    assert kinds == ["Reasoning", "CallStart", "CallArguments"]
    last = pieces[-1]
    assert isinstance(last, CallArguments) and json.loads(last.text) == given


@pytest.mark.parametrize(("name", "head"), [("olmo3", "<function_calls>"), ("lfm2", "<|tool_call_start|>")])
@pytest.mark.parametrize("loop", ["ab", "[", ","])
def test_a_head_that_has_no_end_is_text(name: str, head: str, loop: str) -> None:
    """All of a head is matched again after each character: without a bound, an answer would take minutes."""
    parser = AnswerParser(None, FORMATS[name], SPECS)
    shown = "".join(
        piece.text
        for text in (head, *[loop] * 1000)
        for piece in parser.push(text)
        if isinstance(piece, Content)
    )
    assert shown.count(loop) > 500, "before the answer's end"


@pytest.mark.parametrize("loop", ["_", " "])
def test_the_beginning_of_a_call_without_a_marker_has_an_end(loop: str) -> None:
    form = FORMATS["pythonic"]
    assert form.begins("[" + loop * 20, ["f"]) is None
    assert form.begins("[" + loop * 500, ["f"]) is False
