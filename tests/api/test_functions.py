"""OpenAI's calls of functions as they were before `tools`: histories, requests and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.test_call_histories import HI, SINGLE, prompt_of
from tests.support.asgi import request, send
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import CITY, app_of, chat, deltas
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain.grammar import Grammar

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
FUNCTIONS: list[Any] = [
    {"name": "weather", "description": "The weather", "parameters": CITY},
    {"name": "now"},
]
CALL = [
    "Let me see.\n",
    "<tool",
    "_call>",
    '\n{"name": "weather", "argu',
    'ments": {"city": "Pa',
    'ris"}}\n</tool_call>',
]
GIVEN = {"name": "weather", "arguments": '{"city": "Paris"}'}


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
    messages: list[Any] = [HI, answer, {"role": "tool", "tool_call_id": "c", "content": "x"}]
    text, _ = await prompt_of(SHOWING, messages, tools=None)
    assert text.splitlines()[1:] == ["assistant:c g {} ", "tool:xc "]


async def test_functions_are_tools_of_which_one_may_be_called() -> None:
    """The prompt and the grammar are the same as with `tools`."""
    tools = [{"type": "function", "function": each} for each in FUNCTIONS]
    one_call = {"parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "weather"}}
    for old, new in (
        ({}, one_call),
        ({"function_call": "auto"}, one_call),
        ({"function_call": "none"}, {"tool_choice": "none"}),
        ({"function_call": {"name": "weather"}}, {"tool_choice": named}),
    ):
        engine = ScriptedEngine(say("ok"))
        for fields in ({"functions": FUNCTIONS, **old}, {"tools": tools, **new}):
            body = {"messages": [HI], **fields}
            assert (await send(app_of(engine), request("POST", "/v1/chat/completions", body))).status == 200
        first, second = engine.requests
        assert first.prompt_ids == second.prompt_ids
        assert _source_of(first.grammar) == _source_of(second.grammar)


def _source_of(grammar: Any) -> Any:
    assert grammar is None or isinstance(grammar, Grammar)
    return grammar and grammar.source


@pytest.mark.parametrize(("choice", "finish"), [("auto", "function_call"), ({"name": "weather"}, "stop")])
async def test_a_call_is_the_message_s_function_call(choice: Any, finish: str) -> None:
    fields: dict[str, Any] = {"functions": FUNCTIONS, "function_call": choice}
    said = CALL if choice == "auto" else CALL[1:]
    whole = (await chat(say(*said), **fields))["choices"][0]
    assert whole["message"]["function_call"] == GIVEN
    assert "tool_calls" not in whole["message"] and whole["finish_reason"] == finish
    choices = await deltas(say(*said), **fields)
    assert all("tool_calls" not in each["delta"] for each in choices)
    calls = [each["delta"]["function_call"] for each in choices if "function_call" in each["delta"]]
    assert calls[0] == {"name": "weather", "arguments": ""}
    assert all(list(call) == ["arguments"] for call in calls[1:])
    assert "".join(call["arguments"] for call in calls) == GIVEN["arguments"]
    assert choices[-1]["finish_reason"] == finish
    content = "".join(each["delta"].get("content") or "" for each in choices)
    assert content == (whole["message"]["content"] or "") == ("Let me see." if choice == "auto" else "")


async def test_an_answer_without_a_call_is_text() -> None:
    choice = (await chat(say("ok"), functions=FUNCTIONS))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ok", "stop")
    assert "function_call" not in choice["message"]


@pytest.mark.parametrize(
    ("fields", "settings"),
    [({"tools": [{"type": "function", "function": FUNCTIONS[1]}]}, {}), ({}, {"tgi_compat": True})],
)
async def test_functions_are_refused_beside_tools_and_under_compat(
    fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    app = app_of(ScriptedEngine(), Settings(**settings))
    body = {"messages": [HI], "functions": FUNCTIONS, **fields}
    call = await send(app, request("POST", "/v1/chat/completions", body))
    assert call.status in (400, 422)
    assert "`functions`" in json.dumps(call.json()["error"])


async def test_the_refusal_of_an_unknown_function_names_no_field_that_was_not_sent() -> None:
    body = {"messages": [HI], "functions": FUNCTIONS, "function_call": {"name": "other"}}
    call = await send(app_of(ScriptedEngine(), Settings()), request("POST", "/v1/chat/completions", body))
    error = call.json()["error"]
    assert (call.status, error["param"]) == (400, "function_call")
    assert "'other'" in error["message"]
    assert "`tools`" not in error["message"]
