"""Messages in an order that a chat template shows: joined, moved or added to where it would lose some."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.text.test_chat import ASSISTANT, CHATML, LLAMA3, MISTRAL, QWEN, SPECIAL, SYSTEM, USER
from tgi_asgi.text.chat.template import ChatTemplate

FIRST_ONLY = """{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('must be at the beginning') }}
{%- endif %}{{ message.role }}: {{ message.content }}
{% endfor %}"""
DROPS = """{{ messages[0].content if messages[0].role == 'system' }}
{%- for message in messages if message.role != 'system' %}{{ message.content }}{% endfor %}"""
REMINDER = {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}


@pytest.mark.parametrize(
    "messages",
    [[SYSTEM, REMINDER, USER], [SYSTEM, USER, ASSISTANT, REMINDER, USER], [SYSTEM, USER, REMINDER]],
)
@pytest.mark.parametrize("source", [FIRST_ONLY, DROPS, MISTRAL])
def test_system_messages_are_joined_where_the_template_wants_one(
    source: str, messages: list[dict[str, Any]]
) -> None:
    template = ChatTemplate(source, SPECIAL)
    assert not template.accepts_scattered_system
    others = [message for message in messages if message["role"] != "system"]
    joined = {"role": "system", "content": "Be  brief.\n\n\na\nb"}
    before = json.dumps(messages)
    assert template.render(messages) == template.render([joined, *others])
    assert "a\nb" in template.render(messages)
    assert json.dumps(messages) == before


def test_a_system_message_that_is_not_the_first_comes_first_where_it_must() -> None:
    late = {"role": "developer", "content": "Be kind."}
    template = ChatTemplate(FIRST_ONLY.replace("== 'system'", "in ['system', 'developer']"), SPECIAL)
    assert template.render([USER, late]).startswith("developer: Be kind.")


@pytest.mark.parametrize("source", [CHATML, LLAMA3, QWEN])
def test_system_messages_stay_where_the_template_shows_them(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    assert template.accepts_scattered_system
    text = template.render([USER, SYSTEM, ASSISTANT, {"role": "system", "content": "And kind."}])
    assert text.index("Be  brief.") < text.index("Hello.") < text.index("And kind.")


HELLO = {"role": "user", "content": "Hello."}
PARTS: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "And?"}]}


@pytest.mark.parametrize(
    ("messages", "joined"),
    [
        ([HELLO, HELLO], ["Hello.\n\nHello."]),
        ([SYSTEM, HELLO, REMINDER, HELLO, ASSISTANT, HELLO], ["Hello.\n\nHello.", "Hello."]),
        ([HELLO, {"role": "user", "content": ""}, {"role": "user", "content": None}], ["Hello."]),
        ([HELLO, PARTS], [[{"type": "text", "text": "Hello."}, *PARTS["content"]]]),
    ],
)
def test_the_users_successive_messages_are_joined_where_turns_must_alternate(
    messages: list[dict[str, Any]], joined: list[Any]
) -> None:
    template, before = ChatTemplate(MISTRAL, SPECIAL), json.dumps(messages)
    arranged = template.arranged(messages)
    assert [message["content"] for message in arranged if message["role"] == "user"] == joined
    assert json.dumps(messages) == before


ALTERNATES = """{%- set turns = namespace(number=0) %}{% for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{%- if (m.role == 'user') != (turns.number % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}
{%- set turns.number = turns.number + 1 %}{% endif %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('system must be first') }}{% endif %}
{%- if not (m.role == 'system' and messages[-1].role == 'tool') %}[{{ m.role }}:{{ m.content }}]{% endif %}
{%- for call in m.tool_calls or () %}({{ call.function.arguments.q }}){% endfor %}{% endfor %}"""


def called(query: str, content: str | None = None) -> dict[str, Any]:
    call = {"id": query, "function": {"name": "f", "arguments": {"q": query}}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


RESULT = {"role": "tool", "tool_call_id": "a", "content": "ok"}


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        (
            [HELLO, called("a"), RESULT, HELLO],
            "[user:Hello.][assistant:](a)[tool:ok][assistant:OK.][user:Hello.]",
        ),
        ([{"role": "assistant", "content": "Hi."}, HELLO], "[user:][assistant:Hi.][user:Hello.]"),
        (
            [HELLO, {"role": "assistant", "content": "Hm."}, called("a", "So."), called("b"), RESULT],
            "[user:Hello.][assistant:Hm.\n\nSo.](a)[assistant:](b)[tool:ok]",
        ),
        # The client interrupted the tool.
        ([HELLO, called("a"), HELLO], "[user:Hello.][assistant:](a)[assistant:OK.][user:Hello.]"),
        # The template shows no instructions before the results of tools.
        (
            [{"role": "system", "content": "S."}, HELLO, HELLO, called("a"), RESULT],
            "[user:Hello.\n\nS.\n\nHello.][assistant:](a)[tool:ok]",
        ),
        ([{"role": "system", "content": "S."}, HELLO], "[system:S.][user:Hello.]"),
    ],
)
def test_turns_are_arranged_where_they_must_alternate(messages: list[dict[str, Any]], shown: str) -> None:
    template, before = ChatTemplate(ALTERNATES, SPECIAL), json.dumps(messages)
    assert template.render(messages) == template.render(template.arranged(messages)) == shown
    assert json.dumps(messages) == before
    kept = ChatTemplate("{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}", SPECIAL)
    assert kept.arranged(messages) == messages


def test_a_hundred_thousand_messages_are_joined_at_once() -> None:
    """Joining them two by two would copy 15 GB."""
    [joined] = ChatTemplate(MISTRAL, SPECIAL).arranged([{"role": "user", "content": "a"}] * 100_000)
    assert joined["content"] == "\n\n".join("a" * 100_000)


@pytest.mark.parametrize(
    ("messages", "content"),
    [
        ([SYSTEM, HELLO], "Be  brief.\n\n\nHello."),
        ([SYSTEM, PARTS], [{"type": "text", "text": "Be  brief.\n\n\n"}, *PARTS["content"]]),
        ([SYSTEM, ASSISTANT, HELLO], "Be  brief.\n"),
        ([SYSTEM], "Be  brief.\n"),
    ],
)
def test_instructions_are_the_users_where_the_template_has_no_system_role(
    messages: list[dict[str, Any]], content: Any
) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = ChatTemplate(refusing + CHATML, SPECIAL)
    assert template.arranged(messages)[0] == {"role": "user", "content": content}


@pytest.mark.parametrize("source", [CHATML, LLAMA3, QWEN])
def test_the_users_messages_stay_apart_where_the_template_shows_all(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    assert template.arranged([USER, USER]) == [USER, USER]
