"""Summaries instead of answers: `/v1/responses/compact`, `compaction_trigger`, and the items they lead to."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.responses import ResponseOutputItem
from pydantic import TypeAdapter

from tests.api.test_response_store import TEMPLATE, TOOLS, chat, post, prompts, respond
from tests.api.test_responses import post as stream_of
from tests.support.scripted_engine import ScriptedEngine, fail_with, say
from tests.support.tool_app import CALLS, THINKING, app_of, sdk_of
from tgi_asgi.api import summary
from tgi_asgi.api.openai.response_input import read_items
from tgi_asgi.api.thoughts import sealed
from tgi_asgi.errors import GenerationFailed

TRIGGER = {"type": "compaction_trigger"}
ASKED = summary.asking()["content"]
SHOWN = "A summary of the conversation so far:\n\nThey met."
HISTORY: list[Any] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Paris"}'},
    {"type": "function_call_output", "call_id": "c", "output": "sunny"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
]


async def test_a_compacted_conversation_has_the_users_messages_and_a_summary() -> None:
    engine = ScriptedEngine(say("They ", "met."))
    async with sdk_of(app_of(engine, chat_template=TEMPLATE)) as client:
        compacted = await client.responses.compact(
            model="m", input=HISTORY, instructions="Help.", extra_body={"tools": TOOLS}
        )
        assert compacted.object == "response.compaction"
        *kept, item = compacted.model_dump(warnings=False)["output"]  # the SDK expects no user's messages
        assert [(each["type"], each["role"], each["content"][0]["text"]) for each in kept] == [
            ("message", "user", "one"), ("message", "user", "three"),
        ]  # fmt: skip
        assert (item["type"], compacted.usage.output_tokens) == ("compaction", 3)
        assert compacted.usage.input_tokens == len(engine.requests[0].prompt_ids)
        await client.responses.create(model="m", input=[*kept, item, {"role": "user", "content": "four"}])
    asked, later = prompts(engine)
    places = [asked.index(text) for text in ("Help.", "Be brief.", "one", "sunny", "two", "three", ASKED)]
    assert places == sorted(places)
    assert later.endswith(
        "".join(f"<|im_start|>user\n{text}<|im_end|>\n" for text in ("one", "three", SHOWN, "four"))
        + "<|im_start|>assistant\n"
    )


async def test_a_trigger_makes_the_answer_one_item() -> None:
    script = say("They ", "met.")
    _, events = await stream_of(script, stream=True, input=[*HISTORY, TRIGGER], tools=TOOLS)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-2:] == ["output_item.done", "completed"]
    assert set(kinds[3:-2]) == {"compaction.compacting"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    added, done, [item] = events[2]["item"], events[-2]["item"], events[-1]["response"]["output"]
    assert done == item and added == {**item, "encrypted_content": ""}
    TypeAdapter(ResponseOutputItem).validate_python(item)
    _, whole = await stream_of(script, input=[*HISTORY, TRIGGER], tools=TOOLS)
    assert {**whole["output"][0], "id": item["id"]} == item and whole["status"] == "completed"


async def test_what_a_summary_replaces_is_not_shown_again() -> None:
    engine = ScriptedEngine(say("They met."))
    app = app_of(engine, chat_template=TEMPLATE)
    first = await respond(app, [*HISTORY[1:], TRIGGER])
    await respond(app, "four", previous_response_id=first["id"])
    later = prompts(engine)[1]
    assert [text in later for text in ("one", "sunny", "two", "three", SHOWN, "four")] == [
        True, False, False, True, True, True,
    ]  # fmt: skip
    assert ASKED not in later


def test_the_last_summary_replaces_the_earlier_ones() -> None:
    """With thousands of them, too: each in turn would be compared with all messages before it."""
    user, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
    summaries = [{"type": "compaction", "encrypted_content": sealed(text)} for text in ("old", "They met.")]
    messages = read_items([user, answer, *[summaries[0]] * 20_000, user, answer, summaries[1], answer])
    assert [message["content"] for message in messages] == ["one", "one", SHOWN, "two"]
    assert [message["role"] for message in messages] == ["user", "user", "user", "assistant"]


async def test_a_conversation_is_compacted_without_being_changed() -> None:
    engine = ScriptedEngine(say("They met."))
    async with sdk_of(app_of(engine)) as client:
        conversation = await client.conversations.create(items=HISTORY[1:2])
        compacted = await client.responses.compact(
            model="m", extra_body={"conversation": conversation.id, "store": True}
        )
        items = await client.conversations.items.list(conversation.id)
        assert len(items.data) == 1
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(compacted.id)
    assert prompts(engine) == [
        chat("one").replace("<|im_start|>assistant\n", f"<|im_start|>user\n{ASKED}<|im_end|>\n")
        + "<|im_start|>assistant\n"
    ]


async def test_tools_formats_stop_strings_and_thoughts_do_not_get_into_a_summary() -> None:
    engine = ScriptedEngine(say("<think>", "hm", "</think>", "They met."))
    app = app_of(engine, chat_template=THINKING)
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
    answer = await respond(
        app, [*HISTORY[:2], TRIGGER], tools=TOOLS, tool_choice="required", text=form, stop="met",
        separate_reasoning=False,
    )  # fmt: skip
    assert [item["type"] for item in answer["output"]] == ["compaction"]
    assert answer["tool_choice"] == "required"
    assert engine.requests[0].grammar is None and engine.requests[0].stop.stop == ()
    await respond(app, [answer["output"][0], {"role": "user", "content": "four"}])
    assert SHOWN in prompts(engine)[1]


async def test_calls_that_a_model_makes_nevertheless_are_text() -> None:
    engine = ScriptedEngine(say(*CALLS))
    answer = await respond(app_of(engine), [*HISTORY[:2], TRIGGER], tools=TOOLS)
    assert [item["type"] for item in answer["output"]] == ["compaction"]


async def test_without_a_summary_the_conversation_is_not_replaced() -> None:
    body = {"model": "m", "input": [*HISTORY[:2], TRIGGER]}
    answer = await respond(app_of(ScriptedEngine(say(" ", "\n"))), said=body["input"])
    assert (answer["status"], answer["output"]) == ("failed", [])
    assert answer["error"]["message"] == "the model wrote no summary"
    async with sdk_of(app_of(ScriptedEngine(say(" ")))) as client:
        with pytest.raises(openai.APIStatusError, match="the model wrote no summary"):
            await client.responses.compact(model="m", input="one")
    script = fail_with(GenerationFailed("boom"), say("They ", "met."))
    _, events = await stream_of(script, stream=True, input=body["input"])
    assert (events[-1]["type"], events[-1]["response"]["output"]) == ("response.failed", [])


async def test_a_summary_that_is_cut_off_says_so() -> None:
    engine = ScriptedEngine(say("They ", "met ", "again."))
    answer = await respond(app_of(engine), [*HISTORY[:2], TRIGGER], max_output_tokens=2)
    assert (answer["status"], answer["incomplete_details"]) == (
        "incomplete", {"reason": "max_output_tokens"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [TRIGGER, {"role": "user", "content": "one"}]}, "input[0]"),
        ({"input": 5}, "input"),
    ],
)
async def test_a_trigger_comes_last(fields: dict[str, Any], param: str) -> None:
    answer = await post(app_of(ScriptedEngine(say("a"))), {"model": "m", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "one"}, "model"),
        ({"model": "m"}, "input"),
        ({"model": "m", "input": "one", "stream": True}, "stream"),
        (
            {"model": "m", "input": "one", "prompt_cache_options": {"prewarm": True}},
            "prompt_cache_options.prewarm",
        ),
        ({"model": "m", "input": [TRIGGER]}, "input"),
        ({"model": "m", "input": [{"type": "message", "role": "critic"}]}, "input[0].role"),
        ({"model": "m", "input": "one", "previous_response_id": "resp_x"}, "previous_response_id"),
    ],
)
async def test_what_cannot_be_compacted_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    async with sdk_of(app_of(ScriptedEngine(say("a")))) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.post("/responses/compact", body=fields, cast_to=object)
    assert refused.value.param == param
