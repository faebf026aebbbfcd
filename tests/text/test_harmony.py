"""Harmony's channels: content, reasoning, calls, and the texts that a grammar allows."""

from __future__ import annotations

import pytest

from tests.support.grammars import accepts
from tests.support.tool_calls import parse
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.harmony import harmony_grammar
from tgi_asgi.text.tools import CallArguments, CallStart, Content, Piece, Reasoning, ToolSpec
from tgi_asgi.text.tools.harmony import HarmonyParser, is_open

SPECS = [ToolSpec("f", {"properties": {"a": {"type": "integer"}}, "required": ["a"]}), ToolSpec("g", None)]
THOUGHT = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
EARLY = " to=functions.f<|channel|>commentary json<|message|>"
LATE = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
F: list[Piece] = [CallStart("f"), CallArguments('{"a": 1}')]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (f"{THOUGHT}{FINAL}hello<|return|>", [Reasoning("hm"), Content("hello")]),
        (f"{FINAL}hello", [Content("hello")]),
        (f'{THOUGHT}{EARLY}{{"a": 1}}<|call|>', [Reasoning("hm"), *F]),
        (f'{THOUGHT}{LATE}{{"a": 1}}<|call|>', [Reasoning("hm"), *F]),
        (f'{LATE} {{"a": 1}}', F),
        (f'<|start|>assistant{EARLY}{{"a": 1}}', F),
        (
            f'<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{LATE}{{"a": 1}}',
            [Content("I look."), *F],
        ),
        (f"{THOUGHT}{THOUGHT}{FINAL}x", [Reasoning("hm\n\nhm"), Content("x")]),
        (
            f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{THOUGHT}{FINAL}Done.",
            [Content("I look."), Reasoning("hm"), Content("\n\nDone.")],
        ),
        (f"<|channel|>analysis<|message|><|end|><|start|>assistant{THOUGHT}", [Reasoning("hm")]),
        ("<|channel|>commentary to=functions.g<|message|><|call|>", [CallStart("g"), CallArguments("{}")]),
        (f"{FINAL}a < b <|x|> c", [Content("a < b <|x|> c")]),
        ("plain text", [Content("plain text")]),
        ("assist me", [Content("assist me")]),
        ("<|channel|>analysis<|message|>cut", [Reasoning("cut")]),
        (f"{THOUGHT}<|channel|>fin", [Reasoning("hm")]),
        (
            '<|channel|>commentary to=functions.no<|message|>{"a": 1}<|call|>',
            [Content('<|channel|>commentary to=functions.no<|message|>{"a": 1}')],
        ),
        (f"{LATE}no object<|call|>", [Content(f"{LATE}no object")]),
        (f"{LATE}  no object<|call|>", [Content(f"{LATE}  no object")]),
        ("<|channel|>analysis to=python<|message|>1 + 1<|call|>", [Reasoning("1 + 1")]),
        # A header without a message was once buffered forever.
        (f"{THOUGHT}<|channel|>{'x' * 600}<|end|>{FINAL}y", [Reasoning("hm"), Content("x" * 600 + "\n\ny")]),
        (f"<|start|>assistant {'x' * 600}", [Content(f"assistant {'x' * 600}")]),
        (f"{'<|channel|>' * 50}{'x' * 600}", [Content("x" * 600)]),
    ],
)
def test_channels_are_told_apart_however_the_text_is_cut(text: str, pieces: list[Piece]) -> None:
    for size in range(1, len(text) + 1):
        assert parse(HarmonyParser(SPECS), text, size) == pieces, size


def test_an_answer_may_begin_within_thoughts() -> None:
    assert is_open("<|start|>assistant<|channel|>analysis<|message|>")
    text = f"hm<|end|><|start|>assistant{FINAL}x"
    assert parse(HarmonyParser(is_reasoning_open=True), text, 3) == [Reasoning("hm"), Content("x")]


def test_content_says_where_it_stands() -> None:
    text = f"{THOUGHT}{FINAL}hello world<|return|>"
    for size in (1, 4, len(text)):
        parser = HarmonyParser()
        pieces = [p for at in range(0, len(text), size) for p in parser.push(text[at : at + size])]
        contents = [piece for piece in pieces + parser.finish() if isinstance(piece, Content)]
        assert all(text.startswith(piece.text, piece.start) for piece in contents)


@pytest.mark.parametrize("thought", ["", THOUGHT, THOUGHT + THOUGHT])
def test_a_grammar_lets_thoughts_come_first(compiler: GrammarCompiler, thought: str) -> None:
    auto, forced = harmony_grammar(None, SPECS), harmony_grammar(None, SPECS, must_call=True)
    chosen = harmony_grammar(sources.choice(["yes"]), None)
    assert auto is not None and forced is not None and chosen is not None
    for header in (EARLY, LATE, LATE.replace(" <|constrain|>json", "")):
        for grammar in (auto, forced):
            assert accepts(compiler, grammar, f'{thought}{header}{{"a": 1}}')
            assert not accepts(compiler, grammar, f'{thought}{header}{{"a": "x"}}')
    assert accepts(compiler, auto, f"{thought}{FINAL}anything")
    assert not accepts(compiler, forced, f"{thought}{FINAL}anything")
    assert accepts(compiler, chosen, f"{thought}{FINAL}yes")
    assert not accepts(compiler, chosen, f"{thought}{FINAL}no")


@pytest.mark.parametrize("mark", ["json", "<|constrain|>json", " json", " <|constrain|>json", ""])
def test_a_grammar_lets_nothing_be_added_to_a_tool_s_name(compiler: GrammarCompiler, mark: str) -> None:
    """With `functions.fjson`, which `required` allowed, the answer was a text and no call."""
    forced = harmony_grammar(None, SPECS, must_call=True)
    assert forced is not None
    late = f"<|channel|>commentary to=functions.f{mark}<|message|>"
    early = f" to=functions.f<|channel|>commentary{mark}<|message|>"
    for header in (late, early):
        text = f'{header}{{"a": 1}}'
        assert accepts(compiler, forced, text) == (mark != "json")
        assert mark == "json" or parse(HarmonyParser(SPECS), text, 3) == F


def test_a_header_that_is_cut_is_no_text_if_a_call_must_follow() -> None:
    for must_call, wanted in ((True, []), (False, [Content(" to=functions.f")])):
        parser = HarmonyParser(SPECS, must_call=must_call)
        assert parser.push(" to=functions.f") + parser.finish() == wanted


def test_nothing_constrains_an_answer_without_tools_and_format() -> None:
    assert harmony_grammar(None, None) is None
