"""`/v1/responses` with `reasoning.summary`: the thoughts are a summary, too; histories may have only that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.test_responses import post
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import THINKING, app_of, sdk, sdk_of

THOUGHTS = ["<think>", "hm", " so", "</think>", "Hello"]


async def test_events_of_a_summary_come_in_openais_order() -> None:
    _, events = await post(say(*THOUGHTS), template=THINKING, stream=True, reasoning={"summary": "auto"})
    [item] = [e["item"] for e in events if e["type"] == "response.output_item.done"][:1]
    own = [event for event in events if "summary_index" in event]
    assert {(event["item_id"], event["output_index"], event["summary_index"]) for event in own} == {
        (item["id"], 0, 0)
    }
    names = [event["type"].removeprefix("response.reasoning_summary_") for event in own]
    assert names == ["part.added", *["text.delta"] * (len(own) - 3), "text.done", "part.done"]
    assert own[0]["part"] == {"type": "summary_text", "text": ""}
    text = "".join(event["delta"] for event in own[1:-2])
    assert own[-2]["text"] == own[-1]["part"]["text"] == text == item["content"][0]["text"]
    assert item["summary"] == [{"type": "summary_text", "text": text}]
    assert events[-1]["response"]["output"][0] == item
    added = next(event for event in events if event["type"] == "response.output_item.added")
    assert added["item"]["summary"] == added["item"]["content"] == []


async def test_the_sdk_reads_the_same_summary_whole_and_streamed() -> None:
    async with sdk(say(*THOUGHTS), chat_template=THINKING) as client:
        options: dict[str, Any] = {"model": "m", "input": "hi", "reasoning": {"summary": "detailed"}}
        whole = await client.responses.create(**options)
        async with client.responses.stream(**options) as stream:
            streamed = await (await stream.until_done()).get_final_response()
    for response in (whole, streamed):
        thoughts = response.output[0].model_dump()
        assert thoughts["summary"] == [{"type": "summary_text", "text": thoughts["content"][0]["text"]}]
        assert thoughts["summary"][0]["text"].strip() == "hm so"


@pytest.mark.parametrize("reasoning", [None, {}, {"effort": "low"}, {"summary": None}, {"summary": "none"}])
async def test_without_a_request_there_is_no_summary(reasoning: Any) -> None:
    _, events = await post(say(*THOUGHTS), template=THINKING, stream=True, reasoning=reasoning)
    assert not [event for event in events if "summary" in event["type"]]
    assert events[-1]["response"]["output"][0]["summary"] == []


async def test_thoughts_come_back_from_a_summary_alone() -> None:
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{# <think> </think> #}"
    engine = ScriptedEngine(say("a"))
    item = {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "hm"}],
        "encrypted_content": "x",
    }
    async with sdk_of(app_of(engine, chat_template=template)) as client:
        history: Any = [
            {"role": "user", "content": "hi"}, item, {"role": "assistant", "content": "yes"},
        ]  # fmt: skip
        await client.responses.create(model="m", input=history)
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    _, assistant = [json.loads(line) for line in prompt.splitlines()]
    assert assistant["reasoning_content"] == "hm"
