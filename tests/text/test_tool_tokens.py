"""Grammars whose markers are single tokens, as in most vocabularies: of calls, reasoning, channels."""

from __future__ import annotations

import pytest

from tests.support.grammars import Marked, takes
from tests.support.tool_calls import SPECS
from tests.support.tool_writers import Call, write
from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.constrain.harmony import harmony_grammar
from tgi_asgi.text.tools import FORMATS, harmony
from tgi_asgi.text.tools.reasoning import STYLES, WRAPPERS, ReasoningStyle, Wrapper

CALLS: list[Call] = [("f", {"a": 1, "b": True, "s": '}"<'}), ("g", {})]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_allowed_and_held_to_where_their_markers_are_tokens(name: str) -> None:
    form = FORMATS[name]
    tokenizer = Marked([*form.markers])
    for must_call in (True, False):
        grammar = answer_grammar(None, ToolUse(form, SPECS, must_call), mark=tokenizer.mark)
        assert takes(tokenizer, grammar, write(name, CALLS))
        if form.marker or must_call:
            assert not takes(tokenizer, grammar, write(name, [("f", {"a": 1}), ("h", {})]))
        if form.marker and not must_call:
            assert takes(tokenizer, grammar, "Let me see.\n" + write(name, CALLS))
            assert takes(tokenizer, grammar, "Let me see.")


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_reasoning_comes_first_where_its_marks_are_tokens(style: ReasoningStyle) -> None:
    form = FORMATS["hermes"]
    tokenizer = Marked([*style.all_markers, *form.markers])
    calls = write("hermes", CALLS)
    for must_call in (True, False):
        use = ToolUse(form, SPECS, must_call)
        grammar = answer_grammar(None, use, style, mark=tokenizer.mark)
        opened = answer_grammar(None, use, style, is_reasoning_open=True, mark=tokenizer.mark)
        assert takes(tokenizer, grammar, f"{style.start}{style.label}hm{style.end}\n{calls}")
        assert takes(tokenizer, grammar, calls)
        assert takes(tokenizer, opened, f"hm{style.end}\n{calls}")


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.end)
def test_text_may_stand_between_its_wrapper_where_that_is_tokens(wrapper: Wrapper) -> None:
    form = FORMATS["cohere_command3"]
    tokenizer = Marked([*wrapper.markers, *form.markers])
    grammar = answer_grammar(None, ToolUse(form, SPECS), mark=tokenizer.mark, wrapper=wrapper)
    start = wrapper.start[0] if wrapper.start else ""
    for text in ("hello", f"{start}hello{wrapper.end}", write(form.name, CALLS)):
        assert takes(tokenizer, grammar, text), text


def test_channels_are_held_to_where_their_marks_are_tokens() -> None:
    tokenizer = Marked([*harmony.MARKERS])
    grammar = harmony_grammar(None, SPECS, tokenizer.mark, must_call=True)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    for header in (
        " to=functions.f<|channel|>commentary json<|message|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    ):
        assert takes(tokenizer, grammar, f'{thought}{header}{{"a": 1}}')
        assert not takes(tokenizer, grammar, f"{thought}{header}{{}}")
    assert not takes(tokenizer, grammar, f"{thought}<|channel|>final<|message|>x")
