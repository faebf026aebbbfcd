"""Reasoning styles, and the text around models' answers, parsed however the text is cut."""

from __future__ import annotations

import pytest

from tests.support.grammars import Marked, accepts, takes
from tests.support.tool_calls import SPECS, parse
from tests.support.tool_writers import write
from tests.support.toy_tokenizer import VOCAB_SIZE, ToyTokenizer
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.constrain.compiler import GrammarCompiler
from tgi_asgi.text.constrain.source import literal
from tgi_asgi.text.tools import FORMATS, CallArguments, CallStart, Content, Piece, Reasoning
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.reasoning import STYLES, WRAPPERS, Wrapper, style_of, wrapper_of

NAMED = {style.name: style for style in STYLES}
HUNYUAN = next(each for each in WRAPPERS if each.start == ("<answer>",))
SOLAR = next(each for each in WRAPPERS if "<|content|>" in each.start)
APRIEL = next(each for each in WRAPPERS if not each.start)
LINES = next(each for each in WRAPPERS if each.start == ("all\n",))
F = [CallStart("f"), CallArguments('{"a": 1}')]


@pytest.mark.parametrize("name", NAMED)
def test_each_style_is_split_off_and_its_prompts_are_known(name: str) -> None:
    style = NAMED[name]
    section = f"{style.start}{style.label}hm{style.end}"
    for size in range(1, len(section) + 8):
        assert parse(AnswerParser(style, None), f"{section}\n\nanswer", size) == [
            Reasoning("hm"),
            Content("answer"),
        ]
        opened = parse(AnswerParser(style, None, is_reasoning_open=True), f"hm{style.end}x", size)
        assert opened == [Reasoning("hm"), Content("x")]
    assert style.is_open(f"assistant{style.start}{style.label}")
    assert not style.is_open("assistant")
    assert style.is_unfinished(f"\n{style.start}{style.label}hm")
    assert not style.is_unfinished(f"{style.start}hm{style.end}so") and not style.is_unfinished("x")
    assert style.is_closed(f"assistant{style.start}{style.end}\n\n")
    assert style_of("nothing", name) is style


def test_an_administrator_may_leave_reasoning_in_the_text() -> None:
    assert style_of("</think>", "none") is None


@pytest.mark.parametrize(
    ("style", "wrapper", "text", "pieces"),
    [
        (
            "think",
            HUNYUAN,
            "<think>\nhm\n</think>\n<answer>\nx\n</answer>",
            [Reasoning("\nhm\n"), Content("x")],
        ),
        ("think", HUNYUAN, "<answer>\nx\n</answer>\n", [Content("x")]),
        ("think", HUNYUAN, "x </answer>", [Content("x </answer>")]),
        ("think", HUNYUAN, "<answer>a </answer> b</answer>", [Content("a </answer> b")]),
        ("think", HUNYUAN, "<answer>\n  x\n</answer>", [Content("x")]),
        (None, LINES, "all\n ", []),
        ("think", HUNYUAN, "<ans is no mark", [Content("<ans is no mark")]),
        ("think", HUNYUAN, "<ans", [Content("<ans")]),
        (
            "solar",
            SOLAR,
            "<|think|>hm<|end|><|begin|>assistant<|content|>x<|end|>",
            [Reasoning("hm"), Content("x")],
        ),
        ("solar", SOLAR, "<|content|>x", [Content("x")]),
        ("apriel", APRIEL, "x\n[END FINAL RESPONSE]", [Content("x")]),
        (None, LINES, "all\nx", [Content("x")]),
        (None, LINES, "allow it", [Content("allow it")]),
    ],
)
def test_what_stands_around_an_answer_is_left_out(
    style: str | None, wrapper: Wrapper, text: str, pieces: list[Piece]
) -> None:
    for size in range(1, len(text) + 1):
        parser = AnswerParser(NAMED[style] if style else None, None, wrapper=wrapper)
        assert parse(parser, text, size) == pieces, size


def test_calls_may_follow_a_wrapped_text() -> None:
    calls = write("hunyuan_a13b", [("f", {"a": 1})])
    text = f"<think>hm</think>\n<answer>\nI look.\n</answer>\n{calls}"
    for size in range(1, len(text) + 1):
        parser = AnswerParser(NAMED["think"], FORMATS["hunyuan_a13b"], SPECS, wrapper=HUNYUAN)
        assert parse(parser, text, size) == [Reasoning("hm"), Content("I look."), *F]


@pytest.mark.parametrize("answer", ["f\n", ">>>f\n", "all\nI look.>>>f\n"])
def test_a_format_may_begin_with_a_name_where_the_prompt_has_its_marker(answer: str) -> None:
    text = answer + '{"a": 1}'
    for size in range(1, len(text) + 1):
        parser = AnswerParser(None, FORMATS["functionary_v3.2"], SPECS, wrapper=LINES)
        *before, start, arguments = parse(parser, text, size)
        assert [start, arguments] == F
        assert before == ([Content("I look.")] if "look" in answer else [])


def test_templates_show_what_stands_around_answers() -> None:
    assert wrapper_of("<think></think> and write your response between <response></response>") is not None
    assert wrapper_of("<tool_output><response></think>") is not None
    assert wrapper_of("<response></think>") is None  # MiniMax's tool results


def test_a_grammar_lets_the_wrapper_stand_around_the_answer() -> None:
    compiler = GrammarCompiler(ToyTokenizer(), VOCAB_SIZE)
    tools = ToolUse(FORMATS["hunyuan_a13b"], SPECS)
    grammar = answer_grammar(sources.choice(["yes"]), tools, NAMED["think"], wrapper=HUNYUAN)
    assert grammar is not None
    for text in ("yes", "<think>hm</think>\n<answer>\nyes\n</answer>", "<answer>yes</answer>"):
        assert accepts(compiler, grammar, text), text
    assert accepts(compiler, grammar, write("hunyuan_a13b", [("f", {"a": 1})]))
    for text in ("<answer>no</answer>", "</answer>yes"):
        assert not accepts(compiler, grammar, text), text


CALLED = [CallStart("f"), CallArguments('{"a": 1}')]
EARLY = [name for name, form in FORMATS.items() if form.leaves_reasoning(literal) is not None]


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_beginning_of_a_call_ends_reasoning_that_the_model_has_not_ended(name: str, size: int) -> None:
    form = FORMATS[name]
    calls = write(name, [("f", {"a": 1})])

    def read(text: str) -> list[Piece]:
        early = form.leaves_reasoning(literal)
        return parse(
            AnswerParser(NAMED["think"], form, SPECS, is_reasoning_open=True, early=early), text, size
        )

    for blanks in ("", "\n\n", " "):
        assert read(f"hm{blanks}{calls}") == [Reasoning("hm"), *CALLED]
        assert read(f"hm</think>{blanks}{calls}") == [Reasoning("hm"), *CALLED]
    mention = f"I may write {form.marker} next. {form.marker}\n"
    assert read(f"{mention}So.\n{calls}") == [Reasoning(f"{mention}So."), *CALLED]
    assert read(f"{mention}</think>\n\nDone.") == [Reasoning(mention), Content("Done.")]
    assert read(mention) == [Reasoning(mention)]
    assert read(f"hm</think>So {form.marker}")[0] == Reasoning("hm")
    begun = calls[: calls.index(form.marker) + len(form.marker) + 1]
    assert read(f"hm {begun}") == [Reasoning(f"hm {begun}")]


@pytest.mark.parametrize("name", EARLY)
@pytest.mark.parametrize("must_call", [True, False])
@pytest.mark.parametrize("is_marked", [True, False])
def test_a_grammar_lets_a_call_end_the_reasoning(name: str, must_call: bool, is_marked: bool) -> None:
    form, style = FORMATS[name], NAMED["think"]
    tokenizer = Marked([*style.all_markers, *form.markers] if is_marked else [])
    use = ToolUse(form, SPECS, must_call)
    grammar = answer_grammar(None, use, style, is_reasoning_open=True, mark=tokenizer.mark)
    may_be_early = form.leaves_reasoning(tokenizer.mark) is not None  # not if a token is part of the marker
    for text, is_allowed in (("hm\n\n", may_be_early), ("hm</think>\n", True)):
        assert takes(tokenizer, grammar, text + write(name, [("f", {"a": 1}), ("g", {})])) == is_allowed
        assert not takes(tokenizer, grammar, text + write(name, [("h", {})]))
    if not is_marked:
        assert takes(tokenizer, grammar, f"{form.marker} is a mark.</think>{write(name, [('g', {})])}")
