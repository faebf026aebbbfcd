"""The stop matcher against a slow reference that searches the whole text after every push."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgi_asgi.text.stop import StopMatcher

_STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)
_PUSHES = st.lists(st.text("abc", max_size=4), max_size=12)


def _reference(stops: tuple[str, ...], text: str) -> tuple[int, str] | None:
    """Return the earliest match in the text, the longest if several start there."""
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    start, _, stop = min(found)
    return start, stop


def _held_length(stops: tuple[str, ...], text: str) -> int:
    """Return the length of the text's longest suffix that is a proper prefix of a stop string."""
    heads = {stop[:size] for stop in stops for size in range(1, len(stop))}
    return max((len(head) for head in heads if text.endswith(head)), default=0)


@given(_STOPS, _PUSHES, st.booleans())
def test_equals_the_reference_after_every_push(
    stops: tuple[str, ...], pushes: list[str], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    text, released = "", ""
    for push in pushes:
        text += push
        released += matcher.push(push)
        match = _reference(stops, text)
        if match is not None:
            start, stop = match
            assert matcher.matched == stop
            assert released == text[: start + len(stop) if include else start]
            assert matcher.push("more") == matcher.flush() == ""
            return
        assert matcher.matched is None
        assert released == (text if include else text[: len(text) - _held_length(stops, text)])
    assert released + matcher.flush() == text


@given(_STOPS, st.lists(st.tuples(st.text("abc", max_size=4), st.booleans()), max_size=12), st.booleans())
def test_hidden_text_takes_part_in_matches_and_is_never_released(
    stops: tuple[str, ...], pushes: list[tuple[str, bool]], include: bool
) -> None:
    plain, mixed = StopMatcher(stops, include), StopMatcher(stops, include)
    released, shown = "", ""
    is_shown: list[bool] = []  # by character of the text
    for push, hides in pushes:
        is_shown += [not hides] * len(push)
        released += plain.push(push)
        shown += mixed.hide(push) if hides else mixed.push(push)
        assert mixed.matched == plain.matched
        assert shown == "".join(char for char, known in zip(released, is_shown, strict=False) if known)
        if mixed.matched is not None:
            break
    released += plain.flush()
    assert shown + mixed.flush() == "".join(c for c, known in zip(released, is_shown, strict=False) if known)


@given(st.text("ab", min_size=1, max_size=4), st.text("abc", max_size=30), st.data())
def test_cuts_do_not_change_where_one_stop_string_cuts(stop: str, text: str, data: st.DataObject) -> None:
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    matcher = StopMatcher((stop,), include=False)
    released = "".join(
        matcher.push(text[a:b]) for a, b in zip([0, *at], [*at, len(text)], strict=True)
    )  # fmt: skip
    assert released + matcher.flush() == text.partition(stop)[0]
    assert matcher.matched == (stop if stop in text else None)


def test_held_text_is_released_as_soon_as_it_cannot_match() -> None:
    matcher = StopMatcher(("</answer>",), include=False)
    assert [matcher.push(part) for part in ("a <", "/ans", "WER", "</answer", ">x")] == [
        "a ", "", "</ansWER", "", "",
    ]  # fmt: skip
    assert matcher.matched == "</answer>"


def test_only_the_longest_partial_match_is_held() -> None:
    matcher = StopMatcher(("aab",), include=False)
    assert [matcher.push(char) for char in "aaa"] == ["", "", "a"]
    assert matcher.flush() == "aa"


def test_include_keeps_the_stop_string_and_drops_what_follows_it() -> None:
    matcher = StopMatcher(("END",), include=True)
    assert [matcher.push(part) for part in ("one E", "ND two", " three")] == ["one E", "ND", ""]
    assert matcher.matched == "END"


@pytest.mark.parametrize(("stops", "matched"), [(("bc", "abcd"), "abcd"), (("a", "ab"), "ab")])
def test_the_earliest_start_wins_and_then_the_longest(stops: tuple[str, ...], matched: str) -> None:
    matcher = StopMatcher(stops, include=False)
    assert matcher.push("xabcd") == "x"
    assert matcher.matched == matched


def test_no_stop_strings_pass_everything() -> None:
    matcher = StopMatcher((), include=False)
    assert matcher.push("anything") == "anything"
    assert matcher.flush() == ""
