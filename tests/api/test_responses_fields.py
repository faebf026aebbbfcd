"""Fields of `/v1/responses` that chats or other servers have: none that changes an answer is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.test_response_store import prompts
from tests.api.test_responses import ALL, post
from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import THINKING, app_of


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"n": 2}, "n"),
        ({"chat_template": "x"}, "chat_template"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"guided_regex": "a", "regex": "b"}, "regex"),
        ({"guided_regex": "a", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"min_p": 2}, "min_p"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"input": None}, "input"),
        ({"input": None, "messages": [{}]}, "messages"),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    status, body = await post(say("a"), **fields)
    assert (status, body["error"]["param"]) == (400, param)


async def test_other_servers_fields_are_those_of_chats() -> None:
    engine = ScriptedEngine(say("a", "b"))
    fields: dict[str, Any] = {
        "guided_regex": "a+", "min_tokens": 2, "min_p": 0.5, "typical_p": 0.5, "stop_token_ids": [7],
        "truncate_prompt_tokens": 3, "no_stop_trim": True, "seed": 1, "n": 1,
    }  # fmt: skip
    async with client_of(app_of(engine, chat_template=THINKING)) as client:
        for path, main in (
            ("/v1/responses", {"input": "hi"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ):
            answer = await client.post(path, json={**main, **fields})
            assert answer.status_code == 200, answer.text
    response, chat = engine.requests
    assert response.sampling == chat.sampling and response.stop == chat.stop
    assert response.grammar is chat.grammar is not None and len(response.prompt_ids) == 3


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"input": "hi", "max_tokens": 5, "max_output_tokens": 5}),
        ("/v1/responses", {"input": "hi", "response_format": {"type": "text"}, "reasoning_effort": ""}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 5, "max_new_tokens": 5}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 5, "thinking_budget_tokens": -1}),
    ],
)
async def test_what_asks_for_nothing_else_is_no_fault(path: str, fields: dict[str, Any]) -> None:
    """SillyTavern sends the names of several servers at once."""
    async with client_of(app_of(ScriptedEngine(say("a")))) as client:
        answer = await client.post(path, json=fields)
    assert answer.status_code == 200, answer.text


async def test_reasoning_may_be_left_out_or_unread() -> None:
    _, hidden = await post(say(*ALL), template=THINKING, include_reasoning=False)
    assert [item["type"] for item in hidden["output"]] == ["message"]
    _, unread = await post(say("<think>", "hm", "</think>"), template=THINKING, separate_reasoning=False)
    assert unread["output"][0]["content"][0]["text"] == "<think>hm</think>"


async def test_a_refusal_names_this_api_s_limit() -> None:
    status, body = await post(say("a"), min_tokens=10, max_output_tokens=5)
    assert status == 400 and "`max_output_tokens` (5)" in body["error"]["message"]


@pytest.mark.parametrize("field", ["max_new_tokens", "max_output_tokens"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_other_apis_do_not_ignore_a_limit_either(path: str, field: str) -> None:
    main = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    async with client_of(app_of(ScriptedEngine(say("a")))) as client:
        answer = await client.post(path, json={**main, field: 3})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert "use `max_tokens`" in answer.json()["error"]["message"]


async def test_an_answer_repeats_how_its_text_and_reasoning_were_asked_for() -> None:
    _, body = await post(say("a"), text={"verbosity": "low"}, reasoning={"generate_summary": "auto"})
    assert body["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert body["reasoning"] == {"effort": None, "summary": "auto"}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_object"},
        {"type": "json_schema", "name": "n", "schema": {"type": "object"}},
        {
            "type": "json_schema", "name": "n", "description": "An object.", "strict": True,
            "schema": {"type": "object", "properties": {}, "additionalProperties": False, "x": None},
        },
    ],
)  # fmt: skip
async def test_an_answer_repeats_the_format_of_its_text_as_it_was_given(given: dict[str, Any]) -> None:
    _, body = await post(say("{", "}"), text={"format": given})
    assert body["text"]["format"] == given


@pytest.mark.parametrize("is_custom", [False, True])
@pytest.mark.parametrize(
    ("stop", "status"),
    [("b", "incomplete"), ("after", "completed"), ("</tool_call>", "completed"), (None, "completed")],
)
async def test_a_call_that_a_stop_string_cuts_is_incomplete(
    stop: str | None, status: str, is_custom: bool
) -> None:
    """Clients run the calls of completed responses."""
    tool = {"type": "custom", "name": "f"} if is_custom else {"type": "function", "name": "f"}
    text = '<tool_call>\n{"name": "f", "arguments": {"input": "abc"}}\n</tool_call>after'
    engine = ScriptedEngine(say(*text[:-5], text[-5:]))
    fields = {"tools": [tool], **({} if stop is None else {"stop": [stop]})}
    async with client_of(app_of(engine)) as client:
        body = (await client.post("/v1/responses", json={"input": "hi", **fields})).json()
    call = body["output"][0]
    assert (call["name"], call["status"], body["status"]) == ("f", status, status)
    assert body["incomplete_details"] == (None if status == "completed" else {"reason": "stop"})


PREWARM: dict[str, Any] = {"prompt_cache_options": {"prewarm": True}}


async def test_a_response_that_prewarms_the_cache_only_reads_its_prompt() -> None:
    _, body = await post(say("a"), **PREWARM, tools=[{"type": "function", "name": "f"}], top_logprobs=1)
    assert (body["status"], body["output"], body["usage"]["output_tokens"]) == ("completed", [], 0)
    assert body["usage"]["input_tokens"] > 0 and body["incomplete_details"] is None
    _, events = await post(say("a"), **PREWARM, stream=True, include=["message.output_text.logprobs"])
    assert [event["type"].split(".")[1] for event in events] == ["created", "in_progress", "completed"]
    assert events[-1]["response"]["usage"]["output_tokens"] == 0


async def test_a_prewarmed_response_can_be_continued_and_leaves_conversations_alone() -> None:
    engine = ScriptedEngine(say("a"))
    async with client_of(app_of(engine)) as client:

        async def body_of(path: str, **fields: Any) -> Any:
            return (await client.post(path, json=fields)).json()

        made = await body_of("/v1/conversations")
        first = await body_of("/v1/responses", input="hi", max_output_tokens=9, **PREWARM)
        await body_of("/v1/responses", previous_response_id=first["id"], input="you")
        await body_of("/v1/responses", conversation=made["id"], input="hi", **PREWARM)
        listed = (await client.get(f"/v1/conversations/{made['id']}/items")).json()
    assert [each.stop.max_tokens for each in engine.requests][::2] == [1, 1]
    assert "you" in prompts(engine)[1] and listed["data"] == []
