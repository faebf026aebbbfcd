"""OpenAI's calls of functions as they were before `tools`: histories, requests and answers."""

from __future__ import annotations

from typing import Any

from tests.api.test_call_histories import HI, SINGLE, prompt_of

SHOWING = """{% for m in messages %}{{ m.role }}:{{ m.content or "" }}{% for call in m.tool_calls or [] %}
{{- call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}
{{- m.tool_call_id or "" }} {{ m.name or "" }}\n{% endfor %}"""
CALLED: list[dict[str, Any]] = [
    HI,
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
    {"role": "function", "name": "f", "content": "one"},
    {"role": "assistant", "content": "so", "function_call": {"name": "f", "arguments": '{"a": 2}'}},
    {"role": "function", "name": "f", "content": "two"},
]


async def test_a_function_call_of_the_history_is_a_tool_call_that_the_next_message_answers() -> None:
    text, _ = await prompt_of(SHOWING, CALLED, tools=None)
    assert text.splitlines() == [
        "user:hi ",
        'assistant:call_1 f {"a": 1} ',
        "tool:onecall_1 f",
        'assistant:socall_3 f {"a": 2} ',
        "tool:twocall_3 f",
    ]
    text, _ = await prompt_of(SINGLE, CALLED)
    assert '{"a": 1}one{"a": 2}two' in text


async def test_tool_calls_go_before_a_function_call_beside_them() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call], "function_call": {"name": "f"}}
    messages = [HI, answer, {"role": "tool", "tool_call_id": "c", "content": "x"}]
    text, _ = await prompt_of(SHOWING, messages, tools=None)
    assert text.splitlines()[1:] == ["assistant:c g {} ", "tool:xc "]
