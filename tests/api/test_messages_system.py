"""System turns of `/v1/messages` in newer clients' forms: reminders that end, and settings without a text."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tgi_asgi.api.anthropic.request import read_conversation
from tgi_asgi.api.anthropic.schema import CountRequest
from tgi_asgi.api.anthropic.tools import read_tools
from tgi_asgi.errors import InvalidRequest

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}


def read(*turns: dict[str, Any], tools: Any = None) -> tuple[list[tuple[str, Any]], list[str]]:
    """Return the messages of a conversation, and the names of its tools."""
    request = msgspec.convert({"messages": turns, "tools": tools}, CountRequest)
    offered = read_tools(request.tools, request.messages)
    messages = read_conversation(request, offered).messages
    return [(each["role"], each["content"]) for each in messages], [tool.name for tool in offered]


def reminder(clear_at: str | None, content: Any = "Be brief.") -> dict[str, Any]:
    return {"role": "system", "content": content, "clear_at": clear_at}


@pytest.mark.parametrize("clear_at", [None, "never", "next_user_message"])
def test_a_reminder_is_shown_until_the_next_turn_of_the_user(clear_at: str | None) -> None:
    ends = clear_at == "next_user_message"
    assert read(HI, reminder(clear_at))[0] == [("user", "hi"), ("system", "Be brief.")]
    shown = read(HI, reminder(clear_at), HELLO, HI)[0]
    assert [role for role, _ in shown] == ["user", *(() if ends else ("system",)), "assistant", "user"]


def test_changes_of_the_tools_outlive_their_turn() -> None:
    """Only a turn's text has an end."""
    removal = [{"type": "tool_removal", "tool": {"type": "tool_reference", "name": "now"}}]
    messages, names = read(HI, reminder("next_user_message", removal), HI, tools=[{"name": "now"}])
    assert (messages, names) == ([("user", "hi\nhi")], [])


@pytest.mark.parametrize(
    "system",
    ["", [], [{"type": "text", "text": ""}], [{"type": "text", "text": "x-anthropic-billing-header: a"}]],
)
def test_a_system_prompt_without_a_text_is_no_message(system: Any) -> None:
    """An empty one would replace the model's default."""
    request = msgspec.convert({"messages": [HI], "system": system}, CountRequest)
    assert [each["role"] for each in read_conversation(request, []).messages] == ["user"]


@pytest.mark.parametrize("turn", [{}, {"content": []}, {"content": ""}])
def test_a_turn_that_only_sets_the_effort_shows_nothing(turn: dict[str, Any]) -> None:
    effort = {"role": "system", "output_config": {"effort": "low"}, **turn}
    assert read(HI, effort)[0] == [("user", "hi")]


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "system"}, "content"),
        ({"role": "system", "output_config": {}}, "content"),
        ({"role": "user"}, "content"),
        ({"role": "assistant", "content": None, "output_config": {"effort": "low"}}, "content"),
        ({"role": "user", "content": "hi", "clear_at": "never"}, "clear_at"),
    ],
)
def test_other_turns_need_a_content_and_have_no_end(turn: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(HI, turn)
    assert caught.value.param == f"messages[1].{param}"
