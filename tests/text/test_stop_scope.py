"""Stop strings are searched in an answer's content, wherever its tokens end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.processor_time import computed_within
from tgi_asgi.text.stop_scope import HarmonyMarks, ReasoningMarks
from tgi_asgi.text.tools.answer import AnswerParser
from tgi_asgi.text.tools.base import Content
from tgi_asgi.text.tools.reasoning import STYLES

THINK = ReasoningMarks("<think>", "</think>", is_open=False)
OPEN = ReasoningMarks("<think>", "</think>", is_open=True)
HARMONY = HarmonyMarks(is_open=False)


def searched(marks: ReasoningMarks | HarmonyMarks, *tokens: str) -> str:
    """Return the part of an answer that is searched; check that nothing is lost or reordered."""
    scope, parts = marks.scope(), []
    shown = ""
    for token in tokens:
        before, text = scope.push(token)
        shown += before + text
        parts.append(text)
    parts.append(scope.flush())
    assert shown + parts[-1] == "".join(tokens)
    return "".join(parts)


@pytest.mark.parametrize(
    ("marks", "answer", "content"),
    [
        (THINK, "<think>a\n\nb</think>\n\nc <think>d</think>", "c <think>d</think>"),
        (THINK, "\n<think>a</think>c", "c"),
        (THINK, "c</think>d", "c</think>d"),
        (THINK, "\n\nc", "\n\nc"),
        (THINK, "<thin", "<thin"),
        (THINK, "<thinner", "<thinner"),
        (THINK, "<think>a", ""),
        (THINK, "", ""),
        (OPEN, "a</think", ""),
        (OPEN, "a</thi</think>\n \nc\n\n", "c\n\n"),
        (OPEN, "</think>c", "c"),
        (OPEN, "<think>a</think>c", "c"),
        (OPEN, "a</think>\n\n<think>b</think> c", "c"),
        (THINK, "<think>a</think><think>b</think>\n<thing>", "<thing>"),
    ],
)
def test_the_section_is_left_out(marks: ReasoningMarks | HarmonyMarks, answer: str, content: str) -> None:
    for size in range(1, len(answer) + 1):
        tokens = [answer[at : at + size] for at in range(0, len(answer), size)]
        assert searched(marks, *tokens) == content


def test_a_blank_decides_that_no_section_begins() -> None:
    scope = THINK.scope()
    assert scope.push("<") == ("", "")
    assert scope.push(" ") == ("", "< ")


def test_a_run_of_blanks_is_held_back_in_time() -> None:
    def run() -> list[tuple[str, str]]:
        scope = THINK.scope()
        return [scope.push(80 * " ") for _ in range(8_000)] + [scope.push("c")]

    *held, content = computed_within(0.5, run)
    assert set(held) == {("", "")}
    assert content == ("", 640_000 * " " + "c")


def test_only_messages_to_the_user_are_searched_in_channels() -> None:
    analysis = ["<|channel|>", "analysis", "<|message|>", "a", "b", "<|end|>"]
    header = ["<|start|>", "assistant", "<|channel|>", "final", "<|message|>"]
    assert searched(HARMONY, *analysis, *header, "c", "d", "<|end|>", *header, "e") == "cde"
    assert searched(HARMONY, *analysis[1:2], "c") == "analysisc"  # no channel: all is text
    assert searched(HarmonyMarks(is_open=True), *analysis[3:], *header, "c") == "c"


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", "\n", "a", " b"]), max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_what_clients_see_as_content_is_searched(tokens: list[str], is_open: bool, is_joined: bool) -> None:
    tokens = ["".join(tokens)] if is_joined else tokens
    parser = AnswerParser(STYLES[0], None, is_reasoning_open=is_open)
    pieces = [piece for token in tokens for piece in parser.push(token)] + parser.finish()
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    assert searched(OPEN if is_open else THINK, *tokens).rstrip() == content.rstrip()
