"""`/v1/responses`: OpenAI's SDK over a socket, the order of events, and refused requests."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.support.asgi import request, send
from tests.support.client import client_of
from tests.support.scripted_engine import (
    CHATML,
    Script,
    ScriptedEngine,
    at_once,
    fail_with,
    say,
    scripted_app,
)
from tests.support.tool_app import CALLS, CITY, THINKING, app_of, sdk, sdk_of
from tgi_asgi.api.openai.response_input import read_items
from tgi_asgi.errors import GenerationFailed, InvalidRequest, Overloaded, TgiError
from tgi_asgi.settings import MIB

TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "parameters": CITY, "strict": True},
    {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False},
]
NOT: dict[str, Any] = {"properties": {"a": {"not": {}}}}
HALF = "y" * (MIB // 2)
ALL = ["<think>", "hm", "</think>", "\n", *CALLS]


async def post(script: Script, *, template: str = CHATML, **body: Any) -> tuple[int, Any]:
    async with client_of(app_of(ScriptedEngine(script), chat_template=template)) as client:
        answer = await client.post("/v1/responses", json={"input": "hi", **body})
    if not body.get("stream"):
        return answer.status_code, answer.json()
    lines = answer.text.split("\n\n")
    assert lines.pop() == ""
    events = []
    for line in lines:
        name, data = line.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return answer.status_code, events


async def test_a_whole_response_through_the_sdk() -> None:
    async with sdk(say("Hel", "lo")) as client:
        response = await client.responses.create(
            model="m", input="hi", instructions="Be brief.", metadata={"a": "b"}
        )
    assert (response.status, response.output_text, response.model) == ("completed", "Hello", "m")
    assert response.id.startswith("resp_") and response.instructions == "Be brief."
    assert response.usage is not None and response.usage.output_tokens == 3
    assert response.usage.total_tokens == response.usage.input_tokens + 3
    assert response.metadata == {"a": "b"}


async def test_tokens_that_the_cache_had_are_among_those_of_the_input() -> None:
    engine = ScriptedEngine(say("a"))
    engine.num_cached = 4
    async with client_of(app_of(engine)) as client:
        usage = (await client.post("/v1/responses", json={"input": "hi"})).json()["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 4 < usage["input_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


async def test_the_sdk_s_stream_adds_up_to_the_whole_response() -> None:
    async with sdk(say(*ALL), chat_template=THINKING) as client:
        whole = await client.responses.create(model="m", input="hi", tools=TOOLS)
        types: list[str] = []
        async with client.responses.stream(model="m", input="hi", tools=TOOLS) as stream:
            async for event in stream:
                types.append(event.type)
            streamed = await stream.get_final_response()
    for response in (whole, streamed):
        assert [item.type for item in response.output] == [
            "reasoning",
            "message",
            "function_call",
            "function_call",
        ]
        assert response.output_text == "Let me see."
        _, _, weather, now = response.output
        assert weather.type == now.type == "function_call"
        assert (weather.name, weather.arguments) == ("weather", '{"city": "Paris"}')
        assert (now.name, now.arguments) == ("now", "{}")
        assert weather.call_id != now.call_id
        assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens > 0
    assert types[:2] == ["response.created", "response.in_progress"]
    assert types[-1] == "response.completed"
    assert types.count("response.output_item.added") == types.count("response.output_item.done") == 4


async def test_events_come_in_order_and_say_where_they_belong() -> None:
    _, events = await post(say("a", "b"), stream=True)
    assert [event["type"] for event in events] == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    assert events[2]["item"]["content"] == []
    assert events[3]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert [event["delta"] for event in events[4:6]] == ["a", "b"]
    assert {event["item_id"] for event in events[3:8]} == {events[2]["item"]["id"]}
    assert events[6]["text"] == events[7]["part"]["text"] == "ab"
    (item,) = events[-1]["response"]["output"]
    assert item["status"] == "completed" and item["content"][0]["text"] == "ab"


async def test_each_event_says_where_its_item_is() -> None:
    """The SDK and agents put the deltas together by these numbers; a call has no content."""
    _, events = await post(say(*ALL), template=THINKING, stream=True, tools=TOOLS)
    items: list[Any] = []
    for event in events:
        items += [event["item"]] if event["type"] == "response.output_item.added" else []
        if "output_index" in event:
            assert event["output_index"] == len(items) - 1
        if "item_id" in event:
            assert event["item_id"] == items[-1]["id"]
            assert event.get("content_index") == (0 if "content" in items[-1] else None)
    assert [item["id"].split("_")[0] for item in items] == ["rs", "msg", "fc", "fc"]


async def test_the_answer_has_what_the_request_said() -> None:
    named: dict[str, Any] = {
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "user": "u",
        "max_tool_calls": 3,
    }
    status, body = await post(say("a"), tools=[{"type": "function", "name": "now"}], **named)
    assert status == 200 and {name: body[name] for name in named} == named
    assert body["tools"] == [
        {"type": "function", "name": "now", "description": None, "parameters": None, "strict": False}
    ]
    assert body["created_at"] <= body["completed_at"]
    assert (body["service_tier"], body["frequency_penalty"], body["presence_penalty"]) == ("default", 0, 0)
    Response.model_validate_json(json.dumps(body), strict=True)
    status, cut = await post(say("a", "b"), max_output_tokens=1)
    assert (status, cut["completed_at"], cut["user"]) == (200, None, None)
    status, refused = await post(say("a"), user="u" * 257)
    assert (status, refused["error"]["param"]) == (400, "user")


async def test_sampling_and_stop_strings_are_those_of_chats() -> None:
    engine = ScriptedEngine(say("Hel", "lo"))
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.25, "seed": 7, "top_k": 3, "repetition_penalty": 1.5,
        "presence_penalty": 1.0, "frequency_penalty": -0.5, "stop": ["l"],
    }  # fmt: skip
    async with client_of(app_of(engine)) as client:
        answer = (await client.post("/v1/responses", json={"input": "hi", **fields})).json()
        await client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], **fields}
        )
    assert answer["output"][0]["content"][0]["text"] == "He" and answer["status"] == "completed"
    assert (answer["presence_penalty"], answer["frequency_penalty"]) == (1.0, -0.5)
    response, chat = engine.requests
    assert response.sampling == chat.sampling and response.stop == chat.stop


async def test_vllms_additions_are_those_of_chats() -> None:
    engine = ScriptedEngine(say("a"))
    fields: dict[str, Any] = {
        "structured_outputs": {"regex": "a+"}, "ignore_eos": True, "logit_bias": {"5": -100}, "seed": 1,
        "priority": 3, "skip_special_tokens": False, "stop": "b", "include_stop_str_in_output": True,
    }  # fmt: skip
    async with client_of(app_of(engine)) as client:
        assert (await client.post("/v1/responses", json={"input": "hi", **fields})).status_code == 200
        await client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], **fields}
        )
    response, chat = engine.requests
    assert response.sampling == chat.sampling and response.grammar is chat.grammar is not None
    assert response.stop == chat.stop and response.stop.ignore_eos and response.stop.include_stop
    assert response.priority == chat.priority == 3 and not response.stop.skip_special_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response": {"id": "resp_1"}}, "previous_response"),
        ({"previous_input_messages": [{}]}, "previous_input_messages"),
        ({"structured_outputs": {"regex": "a"}, "text": {"format": {"type": "json_object"}}},
         "text.format"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ],
)  # fmt: skip
async def test_vllms_additions_are_never_ignored(fields: dict[str, Any], param: str) -> None:
    status, body = await post(say("a"), **fields)
    assert (status, body["error"]["param"]) == (400, param)


async def test_a_response_that_the_length_cuts_is_incomplete() -> None:
    _, body = await post(say("a", "b", "c"), max_output_tokens=2)
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete"
    _, events = await post(say("a", "b", "c"), max_output_tokens=2, stream=True)
    assert events[-1]["type"] == "response.incomplete"


async def test_an_answer_without_text_has_an_empty_message() -> None:
    _, body = await post(say())
    assert body["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("displaced", retry_after_s=1), "rate_limit_exceeded"),
        (InvalidRequest("the grammar cannot go on"), "invalid_prompt"),
    ],
)
async def test_a_failure_after_the_start_has_a_code_of_the_sdk(error: TgiError, code: str) -> None:
    _, events = await post(fail_with(error, say("a", "b")), stream=True)
    assert events[-1]["response"]["error"]["code"] == code


async def test_a_failure_after_the_start_is_an_event() -> None:
    _, events = await post(fail_with(GenerationFailed("broken"), say("a", "b")), stream=True)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "ab"


async def test_the_sdk_parses_a_response_into_a_model() -> None:
    class Person(BaseModel):
        name: str

    async with sdk(say('{"name":', '"Ann"}')) as client:
        response = await client.responses.parse(model="m", input="hi", text_format=Person)
    assert response.output_parsed == Person(name="Ann")


async def test_log_probabilities_travel_with_the_text() -> None:
    include = ["message.output_text.logprobs"]
    _, body = await post(say("a", "b"), include=include, top_logprobs=1)
    assert [entry["token"] for entry in body["output"][0]["content"][0]["logprobs"]] == ["a", "b"]
    _, events = await post(say("a", "b"), include=include, stream=True)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [[entry["token"] for entry in delta["logprobs"]] for delta in deltas] == [["a"], ["b"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [say("a", *CALLS, "b"), at_once(say("a", *CALLS, "b"))])
async def test_log_probabilities_are_those_of_their_item(script: Script, stream: bool) -> None:
    include = ["message.output_text.logprobs"]
    _, body = await post(script, tools=TOOLS, include=include, stream=stream)
    output = (body[-1]["response"] if stream else body)["output"]
    parts = [part for item in output for part in item.get("content", ())]
    named = ["".join(entry["token"] for entry in part["logprobs"]) for part in parts]
    assert named == ["aLet me see.\n", "b"]


async def test_items_become_the_messages_of_a_chat() -> None:
    engine = ScriptedEngine(say("ok"))
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{% if tools %}{% endif %}"
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
    ]
    async with client_of(app_of(engine, chat_template=template)) as client:
        answer = await client.post("/v1/responses", json={"input": items, "instructions": "Now."})
    assert answer.status_code == 200, answer.text
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    messages = [json.loads(line) for line in prompt.splitlines()]
    assert [message["role"] for message in messages] == [
        "system",
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
    ]
    assert [call["function"]["name"] for call in messages[3]["tool_calls"]] == ["f", "g"]
    assert messages[3]["reasoning_content"] == "hm"
    assert [message["content"] for message in messages[4:]] == ["1", "2"]


def test_reasoning_belongs_to_the_answer_that_it_led_to() -> None:
    def thought(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}

    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    messages = read_items(
        [
            {"role": "user", "content": "hi"}, thought("cut off"),
            {"role": "user", "content": "again"}, thought("a"), {"role": "assistant", "content": "So."},
            thought("b"), call, {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"role": "assistant", "content": "Done."},
        ]
    )  # fmt: skip
    assert [message.get("reasoning_content") for message in messages] == [None, None, "a\nb", None, None]


@pytest.mark.parametrize(
    ("before", "after", "content"),
    [
        ([], ["Wait."], "Wait."),  # as litellm translates Anthropic's turns
        (["Well."], [], "Well."),
        (["Well."], ["Wait."], ["Well.", "Wait."]),
        ([], ["One.", "Two."], ["One.", "Two."]),
        ([""], ["Wait."], "Wait."),
        (["Well."], [""], "Well."),
    ],
)
def test_texts_before_and_after_calls_are_one_turn(
    before: list[str], after: list[str], content: str | list[str]
) -> None:
    def text(given: str) -> dict[str, Any]:
        return {"type": "message", "role": "assistant", "content": given}

    calls = [{"type": "function_call", "call_id": c, "name": "f", "arguments": "{}"} for c in ("c1", "c2")]
    outputs = [{"type": "function_call_output", "call_id": c, "output": "1"} for c in ("c1", "c2")]
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    turn = [*map(text, before), calls[0], *map(text, after), thought, calls[1]]
    messages = read_items([{"role": "user", "content": "hi"}, *turn, *outputs, text("Done.")])
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["content"] == content
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["c1", "c2"]
    assert messages[1]["reasoning_content"] == "hm"
    assert messages[4]["content"] == "Done."


@pytest.mark.parametrize("kept", [("type", "id", "summary", "encrypted_content"), ("type", "id", "content")])
async def test_thoughts_come_back_in_the_field_that_a_client_keeps(kept: tuple[str, ...]) -> None:
    """Many clients send back `encrypted_content` only, and without it no reasoning at all."""
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{# <think> </think> #}"
    engine = ScriptedEngine(say("<think>", "hm\n", "</think>", "Hello"))
    async with sdk_of(app_of(engine, chat_template=template)) as client:
        options: dict[str, Any] = {"model": "m", "include": ["reasoning.encrypted_content"], "store": False}
        whole = await client.responses.create(input="hi", **options)
        async with client.responses.stream(input="hi", **options) as stream:
            streamed = await (await stream.until_done()).get_final_response()
        for response in (whole, streamed):
            thoughts, message = [item.model_dump() for item in response.output]
            assert thoughts["encrypted_content"]
            sent = {name: thoughts[name] for name in kept}
            history: Any = [{"role": "user", "content": "hi"}, sent, message]
            await client.responses.create(input=history, **options)
        plain = await client.responses.create(model="m", input="hi")
    assert plain.output[0].model_dump().get("encrypted_content") is None
    for made in engine.requests[2:4]:
        prompt = engine.tokenizer.decode(list(made.prompt_ids), skip_special_tokens=False)
        _, assistant = [json.loads(line) for line in prompt.splitlines()]
        assert assistant["reasoning_content"].strip() == "hm"


@pytest.mark.parametrize("content", ["gAAAAABo", "tgi-%", "tgi-_w==", 5, None])
async def test_thoughts_that_others_encrypted_are_left_out(content: Any) -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": content}
    status, _ = await post(say("a"), input=[{"role": "user", "content": "hi"}, item])
    assert status == 200


async def test_a_text_model_says_that_it_reads_no_images() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    status, body = await post(say("a"), input=[{"role": "user", "content": [image]}])
    assert status == 400 and body["error"]["message"].endswith("the model reads nothing but text")


@pytest.mark.parametrize("kind", ["mcp_approval_request", "mcp_approval_response"])
async def test_approvals_of_hosted_tools_are_left_out(kind: str) -> None:
    item = {"type": kind, "id": "mcpr_1", "approve": True, "name": "f", "arguments": "{}"}
    status, _ = await post(say("a"), input=[{"role": "user", "content": "hi"}, item])
    assert status == 200


def searching(namespace: str) -> dict[str, Any]:
    """Return a namespace with a function `search`, as Codex offers the tools of an MCP server."""
    return {
        "type": "namespace",
        "name": namespace,
        "description": "Find things.",
        "tools": [{"type": "function", "name": "search", "parameters": CITY, "strict": False}],
    }


async def test_namespaces_may_have_tools_of_the_same_name() -> None:
    call = '<tool_call>\n{"name": "mcp__b__search", "arguments": {"city": "Paris"}}\n</tool_call>'
    engine = ScriptedEngine(say(call))
    tools: list[Any] = [searching("mcp__a"), searching("mcp__b"), *TOOLS]
    async with sdk_of(app_of(engine)) as client:
        first = await client.responses.create(model="m", input="hi", tools=tools)
        [item] = first.output
        assert item.type == "function_call"
        assert (item.namespace, item.name, item.arguments) == ("mcp__b", "search", '{"city": "Paris"}')
        made = [item.model_dump(), {"type": "function_call_output", "call_id": item.call_id, "output": "4"}]
        history: Any = [{"role": "user", "content": "hi"}, *made]
        await client.responses.create(model="m", input=history, tools=tools)
    prompt = engine.tokenizer.decode(list(engine.requests[1].prompt_ids), skip_special_tokens=False)
    assert prompt.count("mcp__a__search") == 1
    assert prompt.count("mcp__b__search") == 2  # in the list, and in the history
    assert '"weather"' in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": [{"type": "thing"}]}, "input[0].type"),
        ({"input": [{"content": "hi"}]}, "input[0].role"),
        ({"input": [{"id": "x", "type": None, "content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"name": "web_search"}]}, "tools[0].type"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"top_k": -2}, "top_k"),
        ({"truncation": "some"}, "truncation"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "absent"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": NOT, "strict": True}}},
            "text.format",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": {"a": 2**70}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"a" * 65: "x"}}, "metadata"),
        ({"metadata": {f"{i}": "x" for i in range(17)}}, "metadata"),
        ({"tools": [{"type": "hosted", "x": "y" * MIB}]}, "tools"),
        ({"tools": [{"type": "hosted", "x": HALF}], "tool_choice": {"x": HALF}}, "tool_choice"),
        ({"reasoning": {"summary": "y" * MIB}}, "reasoning"),
        ({"tools": [{"type": "hosted", "x": 2**70}]}, "tools"),
        ({"chat_template_kwargs": {"tools": 5}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"temperature": 3}, "temperature"),
        ({"input": [{"role": "alien", "content": "x"}], "instructions": "x"}, "input[0].role"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ],
)
async def test_the_field_at_fault_is_named(fields: dict[str, Any], param: str) -> None:
    """Both `param` and the message use this API's name for the field, not the chat API's."""
    status, body = await post(say("a"), **fields)
    assert status == 400
    assert body["error"]["param"] == param
    quoted = re.findall(r"`([\w.\[\]]+)`", body["error"]["message"])
    assert param in quoted
    assert not {"messages", "max_completion_tokens", "response_format", "reasoning_effort"} & {
        re.split(r"\W", path)[0] for path in quoted
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_no_depth_of_nesting_is_a_500(stream: bool) -> None:
    """An answer repeats some fields, and JSON can be read to a greater depth than it can be written."""
    fields = (
        '"text":{"format":{"type":"json_schema","name":"x","schema":{"a":%s}}}',
        '"tools":[{"type":"hosted","x":%s}]',
        '"tools":[{"type":"hosted"}],"tool_choice":{"type":"hosted","x":%s}',
        '"metadata":{"a":%s}',
    )
    app = scripted_app(ScriptedEngine())
    for field in fields:
        for depth in (100, *range(236, 262), 1000, 10_000):
            body = f'{{"input":"hi","stream":{str(stream).lower()},{field % ("[" * depth + "]" * depth)}}}'
            call = await send(app, request("POST", "/v1/responses", body.encode()))
            assert call.status in (200, 400), (field, depth)
            assert call.is_complete


async def test_a_refusal_is_the_sdk_s_exception() -> None:
    async with sdk(say("a")) as client:
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model="m", input="hi", previous_response_id="resp_1")
