from __future__ import annotations

from typing import Any

import pytest

from tests.support.fake_runner import BOS_ID, EOS_ID, FakeTokenizer
from tgi_asgi.engine.output import ChoiceOutput
from tgi_asgi.runner.plan import Sampled
from tgi_asgi.text.stop_scope import HarmonyMarks, ReasoningMarks
from tgi_asgi.types import FinishReason, StopConditions, TokenEvent


def events_of(tokens: bytes | list[int], max_tokens: int = 100, **conditions: Any) -> list[TokenEvent]:
    """Push tokens until the choice ends; return the events."""
    output = ChoiceOutput(
        0, StopConditions(max_tokens=max_tokens, **conditions), FakeTokenizer(), frozenset({EOS_ID})
    )
    events: list[TokenEvent] = []
    for token in tokens:
        events.append(output.push(Sampled(token)))
        if events[-1].finish is not None:
            break
    return events


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def test_every_token_is_an_event_and_only_the_last_has_a_finish() -> None:
    events = events_of(b"abc", max_tokens=3)
    assert [event.text for event in events] == ["a", "b", "c"]
    assert [event.finish for event in events] == [None, None, FinishReason.LENGTH]


def test_a_character_is_shown_when_it_is_whole_and_its_bytes_come_one_by_one() -> None:
    events = events_of("é!".encode(), max_tokens=3)
    assert [event.text for event in events] == ["", "é", "!"]
    assert [event.data for event in events] == [b"\xc3", b"\xa9", b"!"]


def test_half_a_character_at_the_end_is_replaced() -> None:
    assert text_of(events_of("aé".encode(), max_tokens=2)) == "a\ufffd"


def test_eos_gives_no_text_and_wins_over_the_length() -> None:
    events = events_of([*b"a", EOS_ID], max_tokens=2)
    assert (events[-1].finish, events[-1].stop, events[-1].data) == (FinishReason.EOS, None, b"")
    assert events[-1].is_special
    assert text_of(events) == "a"


def test_eos_is_shown_only_if_special_tokens_are_and_stops_are_kept() -> None:
    tokens = [*b"a", EOS_ID]
    assert text_of(events_of(tokens, skip_special_tokens=False, include_stop=True)) == "a<eos>"
    assert text_of(events_of(tokens, skip_special_tokens=False)) == "a"
    assert text_of(events_of(tokens, include_stop=True)) == "a"


def test_special_tokens_in_the_middle_give_text_only_on_request() -> None:
    tokens = [*b"a", BOS_ID, *b"b"]
    assert text_of(events_of(tokens, max_tokens=3)) == "ab"
    assert text_of(events_of(tokens, max_tokens=3, skip_special_tokens=False)) == "a<bos>b"
    assert text_of(events_of(tokens, max_tokens=3, shown_special_ids=frozenset({BOS_ID}))) == "a<bos>b"
    # Also while text before them is held back, which may be the start of a stop string.
    assert (
        text_of(events_of(tokens, max_tokens=3, shown_special_ids=frozenset({EOS_ID}), stop=("ac",))) == "ab"
    )


def test_eos_is_a_token_like_others_if_it_is_ignored() -> None:
    events = events_of([*b"a", EOS_ID, *b"b"], max_tokens=3, ignore_eos=True)
    assert [event.finish for event in events] == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize(("include", "text"), [(False, "say "), (True, "say x")])
def test_a_stop_id_ends_and_names_itself(include: bool, text: str) -> None:
    events = events_of(b"say xyz", stop_token_ids=frozenset({ord("x")}), include_stop=include)
    assert (events[-1].finish, events[-1].stop) == (FinishReason.STOP, ord("x"))
    assert text_of(events) == text
    assert events[-1].data == (b"x" if include else b"")


def test_eos_wins_over_the_same_id_as_a_stop_id() -> None:
    events = events_of([EOS_ID], stop_token_ids=frozenset({EOS_ID}))
    assert (events[-1].finish, events[-1].stop) == (FinishReason.EOS, None)
    events = events_of([EOS_ID], stop_token_ids=frozenset({EOS_ID}), ignore_eos=True)
    assert (events[-1].finish, events[-1].stop) == (FinishReason.STOP, EOS_ID)


def test_a_stop_string_across_tokens_is_cut_and_held_back_until_it_is_sure() -> None:
    events = events_of(b"one EN END two", stop=("END",))
    assert [event.text for event in events] == [*"one ", "", "", "EN ", "", "", ""]
    assert (events[-1].finish, events[-1].stop) == (FinishReason.STOP, "END")


def test_a_kept_stop_string_holds_nothing_back() -> None:
    events = events_of(b"one END two", stop=("END",), include_stop=True)
    assert [event.text for event in events] == list("one END")


def test_a_stop_string_on_the_very_last_token_wins_over_the_length() -> None:
    assert events_of(b"aEND", max_tokens=4, stop=("END",))[-1].finish is FinishReason.STOP


@pytest.mark.parametrize("end", [[], [EOS_ID]])
def test_what_was_held_back_is_released_at_the_end(end: list[int]) -> None:
    tokens = [*b"a EN", *end]
    assert text_of(events_of(tokens, max_tokens=len(tokens), stop=("END",))) == "a EN"


def test_stops_are_not_matched_before_min_tokens_nor_with_text_from_before() -> None:
    # "EN" comes before min_tokens, so the "D" after it does not complete a stop string.
    events = events_of(b"ENDENDEND", min_tokens=5, stop=("END",))
    assert text_of(events) == "ENDEND"
    assert len(events) == 9


def test_stops_are_not_matched_in_reasoning() -> None:
    marks = ReasoningMarks("<think>", "</think>", is_open=False)
    answer = b"<think>a END b</think>\n\nc\n\nd"
    events = events_of(answer, stop=("END", "\n\n"), reasoning=marks)
    assert text_of(events) == "<think>a END b</think>\n\nc"
    assert events[-1].stop == "\n\n"
    events = events_of(answer[:5], max_tokens=5, stop=("END", "<thi"), reasoning=marks)  # it never began
    assert (text_of(events), events[-1].stop) == ("", "<thi")
    events = events_of(answer, max_tokens=24, min_tokens=24, stop=("a",), reasoning=marks)
    assert text_of(events) == answer[:24].decode()


def test_a_control_token_that_is_a_stop_string_ends_reasoning() -> None:
    marks = ReasoningMarks("<think>", "</think>", is_open=True)
    output = ChoiceOutput(
        0, StopConditions(9, stop=("<bos>",), reasoning=marks), FakeTokenizer(), frozenset()
    )
    events = [output.push(Sampled(token_id)) for token_id in (97, BOS_ID)]
    assert (text_of(events), events[-1].finish, events[-1].stop) == ("a", FinishReason.STOP, "<bos>")


def test_what_is_held_back_comes_before_the_reasoning_that_follows_it() -> None:
    marks = HarmonyMarks(is_open=False)
    answer = (
        b"<|channel|>final<|message|>a EN<|end|><|start|>assistant<|channel|>analysis<|message|>END<|end|>"
    )
    assert text_of(events_of(answer, len(answer), stop=("END",), reasoning=marks)) == answer.decode()


def test_logprobs_pass_through() -> None:
    output = ChoiceOutput(3, StopConditions(max_tokens=2), FakeTokenizer(), frozenset())
    event = output.push(Sampled(97, -0.25, [(97, -0.25), (98, -2.0)]))
    assert (event.index, event.token_id, event.logprob) == (3, 97, -0.25)
    assert event.top == [(97, -0.25), (98, -2.0)]


def test_the_last_token_of_a_grammar_ends_the_choice_with_its_text() -> None:
    stop = StopConditions(max_tokens=1, min_tokens=1, ignore_eos=True)
    output = ChoiceOutput(0, stop, FakeTokenizer(), frozenset({EOS_ID}))
    event = output.push(Sampled(ord("}"), is_last=True))
    assert (event.text, event.finish) == ("}", FinishReason.EOS)  # takes precedence over the length


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("token_id", [EOS_ID, ord("x")])
def test_what_ends_a_choice_unseen_has_no_bytes_in_the_text(token_id: int, include_stop: bool) -> None:
    stop = StopConditions(
        max_tokens=9,
        stop_token_ids=frozenset({ord("x")}),
        include_stop=include_stop,
        skip_special_tokens=False,
    )
    tokenizer = FakeTokenizer()
    event = ChoiceOutput(0, stop, tokenizer, frozenset({EOS_ID})).push(Sampled(token_id))
    shown = tokenizer.token_bytes(token_id) if include_stop else b""
    assert (event.data, event.text.encode()) == (shown, shown)


def test_a_stop_string_wins_over_the_end_of_a_grammar() -> None:
    output = ChoiceOutput(0, StopConditions(max_tokens=9, stop=("}",)), FakeTokenizer(), frozenset())
    event = output.push(Sampled(ord("}"), is_last=True))
    assert (event.text, event.finish, event.stop) == ("", FinishReason.STOP, "}")


@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_ends_at_its_text_as_a_stop_string_though_it_is_not_shown(include: bool) -> None:
    events = events_of([*b"a <", BOS_ID, *b"b"], stop=("<bos>",), include_stop=include)
    assert (events[-1].finish, events[-1].stop) == (FinishReason.STOP, "<bos>")
    assert (len(events), text_of(events)) == (4, "a <")
    early = events_of([BOS_ID, *b"a"], max_tokens=2, stop=("<bos>",), min_tokens=1, include_stop=include)
    assert early[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_go_on_after_a_special_token_that_is_not_shown(include: bool) -> None:
    tokens = [*b"a", BOS_ID, *b"us b", BOS_ID, *b"user"]
    events = events_of(tokens, stop=("<bos>user",), include_stop=include)
    assert (events[-1].finish, events[-1].stop) == (FinishReason.STOP, "<bos>user")
    assert text_of(events) == ("aus buser" if include else "aus b")
