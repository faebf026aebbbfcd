"""Items of newer clients of `/v1/responses`: messages between agents, settings, results without an id."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.client import client_of
from tests.support.processor_time import computed_within
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import app_of
from tgi_asgi.api.openai.response_input import read_items
from tgi_asgi.errors import InvalidRequest

HI = {"role": "user", "content": "hi"}


def calls(*names: str) -> list[dict[str, Any]]:
    return [
        {"type": "function_call", "call_id": f"c-{name}", "name": name, "arguments": "{}"} for name in names
    ]


def test_messages_between_agents_are_read() -> None:
    """As Codex sends them with `features.multi_agent_v2`: what OpenAI would have encrypted is plain here."""
    content = [
        {"type": "input_text", "text": "Sender: /root\nPayload:\n"},
        {"type": "encrypted_content", "encrypted_content": "Count the files."},
    ]
    item = {"type": "agent_message", "author": "/root", "recipient": "/root/bob", "content": content}
    [_, message] = read_items([HI, item])
    assert message == {"role": "user", "content": ["Sender: /root\nPayload:\n", "Count the files."]}


@pytest.mark.parametrize("content", [None, [{"type": "encrypted_content"}], [{"type": "output_audio"}], [1]])
def test_a_message_between_agents_that_cannot_be_read_is_refused_by_name(content: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_items([{"type": "agent_message", "content": content}])
    assert str(caught.value.param).startswith("input[0].content")


def test_results_without_an_id_belong_to_the_calls_before_them_in_their_order() -> None:
    results: list[dict[str, Any]] = [
        {"type": "function_call_output", "output": "1"},
        {"type": "function_call_output", "call_id": None, "output": "2"},
    ]
    messages = read_items([HI, *calls("f", "g"), *results])
    assert [message["tool_call_id"] for message in messages[2:]] == ["c-f", "c-g"]


def test_the_id_of_a_result_is_a_string() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_items([*calls("f"), {"type": "function_call_output", "call_id": 1, "output": "1"}])
    assert caught.value.param == "input[1].call_id"


def test_thousands_of_texts_after_a_call_are_read_once() -> None:
    texts = [{"role": "assistant", "content": f"text {number}"} for number in range(50_000)]
    [message] = computed_within(2, lambda: read_items([*calls("f"), *texts]))  # 300,000 took minutes
    assert message["content"] == [text["content"] for text in texts]


FORM = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "integer"}}
PLAIN = {"type": "text"}


def update(**settings: Any) -> dict[str, Any]:
    return {"type": "configuration_update", **settings}


@pytest.mark.parametrize(
    ("text", "updates", "is_constrained"),
    [
        (PLAIN, [update(text={"format": FORM})], True),
        (FORM, [update(reasoning={"effort": "low"})], True),
        (FORM, [update(text={"format": PLAIN})], False),
        (PLAIN, [update(text={"format": FORM}), update(text={"format": PLAIN})], False),
    ],
)
async def test_the_last_update_of_the_format_counts(
    text: dict[str, Any], updates: list[dict[str, Any]], is_constrained: bool
) -> None:
    engine = ScriptedEngine(say("1"))
    async with client_of(app_of(engine)) as client:
        body = {"input": [*updates, HI], "text": {"format": text}}
        first = await client.post("/v1/responses", json=body)
        assert first.status_code == 200, first.text
        later = {"previous_response_id": first.json()["id"], "input": "again"}
        assert (await client.post("/v1/responses", json=later)).status_code == 200
    constrained = [request.grammar is not None for request in engine.requests]
    assert constrained == [is_constrained, is_constrained and "text" in updates[-1]]


async def test_an_update_sets_the_effort() -> None:
    engine = ScriptedEngine(say("ok"))
    items = [
        update(reasoning={"effort": "low"}),
        HI,
        update(reasoning={"effort": "high"}),
        update(reasoning={}),
    ]
    async with client_of(app_of(engine, chat_template="{{ reasoning_effort }}")) as client:
        body = {"input": items, "reasoning": {"effort": "minimal"}}
        assert (await client.post("/v1/responses", json=body)).status_code == 200
    assert engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False) == "high"


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"text": {"format": {"type": "some"}}}, "input[0].text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "input[0].text.format.schema"),
        ({"text": 5}, "input[0]"),
        ({"reasoning": {"effort": "much"}}, "input[0].reasoning.effort"),
    ],
)
async def test_an_update_is_refused_by_name(settings: dict[str, Any], param: str) -> None:
    async with client_of(app_of(ScriptedEngine())) as client:
        answer = await client.post("/v1/responses", json={"input": [update(**settings), HI]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
