"""`/v1/messages`: Anthropic's SDK over a socket, the order of events, keys, and refused requests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from anthropic.types import ThinkingBlock, ToolUseBlock

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, Script, ScriptedEngine, fail_with, say
from tests.support.serving import serving
from tests.support.tool_app import CALLS, CITY, THINKING, app_of
from tgi_asgi.errors import GenerationFailed
from tgi_asgi.settings import Settings

HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {"name": "weather", "input_schema": CITY},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]
ALL = ["<think>", "hm", "</think>", "\n", *CALLS]


@asynccontextmanager
async def sdk(
    script: Script, *, template: str = CHATML, **settings: Any
) -> AsyncIterator[anthropic.AsyncAnthropic]:
    app = app_of(ScriptedEngine(script), Settings(**settings), chat_template=template)
    async with (
        serving(app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="key", max_retries=0) as client,
    ):
        yield client


async def post(body: dict[str, Any], script: Script | None = None) -> tuple[int, Any]:
    async with client_of(app_of(ScriptedEngine(script or say("a", "b")))) as client:
        answer = await client.post("/v1/messages", json={"messages": HI, "max_tokens": 50, **body})
    assert answer.headers["request-id"]
    if not body.get("stream"):
        return answer.status_code, answer.json()
    pairs = [event.split("\n") for event in answer.text.split("\n\n") if event]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in events]
    return answer.status_code, events


@pytest.mark.parametrize(("method", "status"), [("GET", 405), ("POST", 401)])
async def test_what_never_reaches_the_handler_has_the_request_s_id_too(method: str, status: int) -> None:
    keys = ("right",) if status == 401 else ()
    async with client_of(app_of(ScriptedEngine(), Settings(api_key=keys))) as client:
        answer = await client.request(method, "/v1/messages", json={})
    assert answer.status_code == status
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == answer.json()["request_id"]


@pytest.mark.parametrize(
    ("method", "path", "version"),
    [("POST", "/v1/messages/batches", None), ("GET", "/v1/messages/x/y", None),
     ("GET", "/v1/files", "2023-06-01"), ("POST", "/v1/v1/messages", None), ("POST", "/messages", None)],
)  # fmt: skip
async def test_unknown_paths_of_the_api_have_its_envelope(
    method: str, path: str, version: str | None
) -> None:
    headers = {} if version is None else {"anthropic-version": version}
    async with client_of(app_of(ScriptedEngine())) as client:
        answer = await client.request(method, path, headers=headers, json={})
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
    assert path in body["error"]["message"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == body["request_id"]


async def test_a_whole_message_through_the_sdk() -> None:
    async with sdk(say("Hel", "lo")) as client:
        message = await client.messages.create(model="m", messages=HI, max_tokens=50, system="Be brief.")
    (block,) = message.content
    assert block.type == "text" and block.text == "Hello"
    assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, "m")
    assert message.usage.output_tokens == 3 and message.usage.input_tokens > 0
    assert message.id.startswith("msg_")


async def test_the_sdk_s_stream_adds_up_to_the_whole_message() -> None:
    async with sdk(say(*ALL), template=THINKING) as client:
        options: dict[str, Any] = {"model": "m", "messages": HI, "max_tokens": 90, "tools": TOOLS}
        whole = await client.messages.create(**options)
        async with client.messages.stream(**options) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            streamed = await stream.get_final_message()
    assert text == "Let me see."
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert message.stop_reason == "tool_use"
        thinking, _, weather, now = message.content
        assert isinstance(thinking, ThinkingBlock) and thinking.thinking == "hm"
        assert thinking.signature  # without it, many clients drop the thoughts or send them back as text
        assert isinstance(weather, ToolUseBlock) and isinstance(now, ToolUseBlock)
        assert (weather.name, weather.input) == ("weather", {"city": "Paris"})
        assert (now.name, now.input) == ("now", {})
        assert message.usage.output_tokens == len(ALL) + 1
        details = message.usage.output_tokens_details
        assert details is not None and details.thinking_tokens == ALL.index("\n")


async def test_events_come_in_order() -> None:
    _, events = await post({"stream": True})
    assert [event["type"] for event in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["content"] == [] and events[0]["message"]["stop_reason"] is None
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    assert [event["delta"]["text"] for event in events[2:4]] == ["a", "b"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "stop"),
    [({"max_tokens": 1}, ("max_tokens", None)), ({"stop_sequences": ["b"]}, ("stop_sequence", "b"))],
)
async def test_the_reason_to_stop(fields: dict[str, Any], stop: tuple[str, str | None]) -> None:
    _, message = await post(fields)
    assert (message["stop_reason"], message["stop_sequence"]) == stop


async def test_tokens_that_the_cache_had_are_counted_apart() -> None:
    engine, usages = ScriptedEngine(say("a")), []
    for engine.num_cached in (0, 4):
        async with client_of(app_of(engine)) as client:
            answer = await client.post("/v1/messages", json={"messages": HI, "max_tokens": 50})
        usages.append(answer.json()["usage"])
    assert [usage["cache_read_input_tokens"] for usage in usages] == [0, 4]
    assert usages[0]["input_tokens"] == usages[1]["input_tokens"] + 4


async def test_an_answer_that_fills_the_context_says_so() -> None:
    _, message = await post({"max_tokens": 9_000}, say(*"ab" * 2_100, finish=None))
    assert message["stop_reason"] == "model_context_window_exceeded"


async def test_max_tokens_0_only_reads_the_prompt() -> None:
    _, message = await post({"max_tokens": 0})
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")
    assert message["usage"]["output_tokens"] == 0 and message["usage"]["input_tokens"] > 0
    _, events = await post({"max_tokens": 0, "stream": True})
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]
    assert events[1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[1]["usage"]["output_tokens"] == 0


async def test_a_failure_after_the_start_is_an_event() -> None:
    script = fail_with(GenerationFailed("broken"), say("a", "b"))
    async with client_of(app_of(ScriptedEngine(script))) as client:
        body = {"messages": HI, "max_tokens": 50, "stream": True}
        answer = await client.post("/v1/messages", json=body)
    *_, last = answer.text.removesuffix("\n\n").split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error"
    error = {"type": "api_error", "message": "broken"}
    shown = {"type": "error", "error": error, "request_id": answer.headers["request-id"]}
    assert json.loads(data.removeprefix("data: ")) == shown


async def test_half_a_call_is_none() -> None:
    _, message = await post({"tools": TOOLS, "max_tokens": 6}, script=say(*CALLS[4:]))
    assert message["stop_reason"] == "max_tokens"
    assert message["content"] == []


async def test_blocks_become_the_messages_of_a_chat() -> None:
    engine = ScriptedEngine(say("ok"))
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{% if tools %}{% endif %}"
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
            {"type": "text", "text": "So?"},
        ]},
    ]  # fmt: skip
    async with client_of(app_of(engine, chat_template=template)) as client:
        body = {"messages": turns, "max_tokens": 9, "system": [{"type": "text", "text": "Be kind."}]}
        assert (await client.post("/v1/messages", json=body)).status_code == 200
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    system, user, assistant, tool, last = [json.loads(line) for line in prompt.splitlines()]
    assert (system["role"], system["content"]) == ("system", "Be kind.")
    assert user["content"] == "hi"
    assert assistant["reasoning_content"] == "hm"
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert (tool["role"], tool["content"], tool["tool_call_id"]) == ("tool", "42", "t1")
    assert last["content"] == "So?"


async def test_turns_of_one_role_in_a_row_are_one() -> None:
    """As in Anthropic's API; the template refuses two users in a row."""
    template = (
        "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m.role }}:{{ m.content }}"
        "{{ '|' + m.reasoning_content if m.reasoning_content is defined }}]{% endfor %}"
        "{% if tools %}{% endif %}"
    )
    result = {"type": "tool_result", "tool_use_id": "a", "content": "42"}
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    body = {
        "model": "tgi",
        "max_tokens": 9,
        "messages": [
            {"role": "user", "content": "One."},
            {"role": "user", "content": [{"type": "text", "text": "Two."}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": ""}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}, call]},
            {"role": "user", "content": [result]},
            {"role": "user", "content": "Three."},
        ],
    }
    engine = ScriptedEngine()
    async with client_of(app_of(engine, chat_template=template)) as client:
        answer = await client.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    call_in_text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'  # the template shows no calls
    assert prompt == f"[user:One.\nTwo.][assistant:Yes.\n{call_in_text}][tool:42][user:Three.]"


async def test_tokens_are_counted() -> None:
    async with sdk(say("a")) as client:
        counted = await client.messages.count_tokens(model="m", messages=HI)
        message = await client.messages.create(model="m", messages=HI, max_tokens=5)
    assert counted.input_tokens == message.usage.input_tokens


async def test_anthropic_s_header_carries_the_key() -> None:
    async with sdk(say("a"), api_key=("key",)) as client:
        assert (await client.messages.create(model="m", messages=HI, max_tokens=5)).content
    async with sdk(say("a"), api_key=("another",)) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model="m", messages=HI, max_tokens=5)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "`max_tokens`"),
        ({"thinking": {"type": "some"}}, "thinking.type"),
        ({"thinking": {}}, "thinking.type"),
        ({"stop_sequences": [""]}, "`stop_sequences[0]`"),
        ({"tools": [{"name": "a b"}]}, "`tools[0].name`"),
        ({"tools": [{"input_schema": {}}]}, "`tools[0].name` is required"),
        (
            {"messages": [*HI, {"role": "system", "content": [{"type": "tool_removal"}]}]},
            "`messages[1].content[0].tool`",
        ),
        (
            {"messages": [*HI, {"role": "user", "content": [{"type": "tool_removal"}]}]},
            "messages[1].content[0].type",
        ),
        ({"system": "x", "messages": [{"role": "user", "content": []}]}, "`messages[0].content`"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "the model reads nothing but text",
        ),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "absent"}}, "tool_choice"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice.type"),
        ({"temperature": 3}, "temperature"),
        ({"output_config": {"format": {"type": "text"}}}, "`output_config.format`"),
        ({"output_format": {"type": "json_schema", "schema": {"type": "some"}}}, "`output_format`"),
    ],
)
async def test_a_refusal_is_in_anthropic_s_envelope(fields: dict[str, Any], word: str) -> None:
    status, body = await post(fields)
    assert status == 400
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert word in body["error"]["message"]


async def test_a_thread_is_refused_so_that_the_sdk_sends_the_whole_history() -> None:
    status, body = await post({"thread": {"type": "create"}})
    assert status == 400
    assert body["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


@pytest.mark.parametrize("field", ["output_config", "output_format"])
async def test_an_answer_s_format_becomes_its_grammar(field: str) -> None:
    form = {"type": "json_schema", "schema": CITY}
    engine = ScriptedEngine(say('{"city":"Paris"}'))
    async with client_of(app_of(engine)) as client:
        fields = {field: form if field == "output_format" else {"format": form}}
        answer = await client.post("/v1/messages", json={"messages": HI, "max_tokens": 50, **fields})
    assert answer.status_code == 200
    assert engine.requests[0].grammar is not None


PLAIN: dict[str, Any] = {"type": "text", "media_type": "text/plain", "data": "The grass is green."}
BLOCKS: dict[str, Any] = {"type": "content", "content": [{"type": "text", "text": "The sky is blue."}]}
FOUND: dict[str, Any] = {
    "type": "search_result", "title": "Seas", "source": "https://sea.example",
    "content": [{"type": "text", "text": "The sea is deep."}],
}  # fmt: skip


async def prompt_of(content: list[dict[str, Any]], role: str = "user") -> str:
    """Return the prompt that a turn makes, with another turn of the user after it."""
    engine = ScriptedEngine(say("a"))
    body = {"messages": [{"role": role, "content": content}, *HI], "max_tokens": 5}
    async with client_of(app_of(engine)) as client:
        answer = await client.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    return engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)


async def test_documents_of_plain_text_are_part_of_the_prompt() -> None:
    cited = {"title": "Meadows", "context": "From a book.", "citations": {"enabled": True}}
    text = {"type": "text", "text": "What is green?"}
    prompt = await prompt_of([{"type": "document", "source": PLAIN, **cited}, text])
    assert "Meadows\n\nFrom a book.\n\nThe grass is green.\nWhat is green?" in prompt
    assert "The sky is blue.\nWhat is green?" in await prompt_of(
        [{"type": "document", "source": BLOCKS}, text]
    )


async def test_search_results_are_part_of_the_prompt() -> None:
    assert "Seas\nhttps://sea.example\n\nThe sea is deep." in await prompt_of([FOUND])


async def test_documents_in_tool_results_are_text_where_they_can_be() -> None:
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}
    content = [{"type": "document", "source": PLAIN}, FOUND, pdf]
    prompt = await prompt_of([{"type": "tool_result", "tool_use_id": "t", "content": content}])
    assert "The grass is green.\nSeas\nhttps://sea.example\n\nThe sea is deep.\n[document omitted]" in prompt


@pytest.mark.parametrize("kind", ["base64", "url", "file", None])
async def test_other_documents_are_refused_by_name(kind: str | None) -> None:
    content = [{"type": "document", "source": {"type": kind, "data": "JVBE"}}]
    status, answer = await post({"messages": [{"role": "user", "content": content}]})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "messages[0].content[0].source.type" in answer["error"]["message"]


@pytest.mark.parametrize(
    "kind",
    ["code_execution_tool_result", "web_fetch_tool_result", "mcp_tool_use", "mcp_tool_listing", "fallback"],
)
async def test_what_servers_ran_is_left_out_of_histories(kind: str) -> None:
    prompt = await prompt_of(
        [{"type": "text", "text": "Done."}, {"type": kind, "content": "secret"}], "assistant"
    )
    assert "Done." in prompt and "secret" not in prompt


async def test_models_are_listed_in_the_form_of_the_client() -> None:
    async with sdk(say("a")) as client:
        listed = [model async for model in client.models.list()]
        one = await client.models.retrieve(listed[0].id)
        with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
            await client.models.retrieve("other")
    assert one == listed[0] and len(listed) == 1
    assert (one.type, one.display_name, one.lifecycle) == ("model", one.id, "active")
    assert one.created_at.tzinfo is not None and one.max_input_tokens
    async with client_of(app_of(ScriptedEngine())) as plain:
        answer = await plain.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
        answer = await plain.get("/v1/models")
    assert answer.json()["object"] == "list" and "anthropic-version" in answer.headers["vary"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/models", 401), ("GET", "/v1/models/toy/model", 401), ("POST", "/v1/models", 405)],
)
async def test_what_never_lists_models_has_the_client_s_envelope(method: str, path: str, status: int) -> None:
    headers = {"anthropic-version": "2023-06-01"} | ({"x-api-key": "right"} if status == 405 else {})
    async with client_of(app_of(ScriptedEngine(), Settings(api_key=("right",)))) as client:
        answer = await client.request(method, path, headers=headers)
        other = await client.request(method, path, headers={"authorization": "Bearer wrong"})
    assert (answer.status_code, answer.json()["type"]) == (status, "error")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert "code" in other.json()["error"] and "request-id" not in other.headers
    assert answer.json()["request_id"] == answer.headers["request-id"] and "request_id" not in other.json()


async def test_thinking_may_be_omitted_from_the_answer() -> None:
    async with sdk(say(*ALL), template=THINKING) as client:
        arguments: Any = dict(model="m", max_tokens=50, messages=HI, tools=TOOLS)
        arguments["thinking"] = {"type": "adaptive", "display": "omitted"}
        whole = await client.messages.create(**arguments)
        async with client.messages.stream(**arguments) as stream:
            streamed = await stream.get_final_message()
    message: Any
    for message in (whole, streamed):
        thinking, text, *_ = message.content
        assert isinstance(thinking, ThinkingBlock) and thinking.thinking == "" and thinking.signature
        assert text.type == "text" and text.text == "Let me see."
        details = message.usage.output_tokens_details
        assert details is not None and details.thinking_tokens > 0


@pytest.mark.parametrize("display", ["omitted", "summarized"])
async def test_the_next_request_brings_the_thoughts_back(display: str) -> None:
    """Claude Code asks to omit them, and sends back blocks without text."""
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{# <think> </think> #}"
    engine = ScriptedEngine(say("<think>", "hm\n", "</think>", "Hello"))
    body: dict[str, Any] = {"max_tokens": 50, "thinking": {"type": "adaptive", "display": display}}
    async with client_of(app_of(engine, chat_template=template)) as client:
        answer = (await client.post("/v1/messages", json={**body, "messages": HI})).json()
        turn = {"role": "assistant", "content": answer["content"]}
        assert answer["content"][0]["thinking"] == ("" if display == "omitted" else "hm\n")
        await client.post("/v1/messages", json={**body, "messages": [*HI, turn, *HI]})
    prompt = engine.tokenizer.decode(list(engine.requests[1].prompt_ids), skip_special_tokens=False)
    _, assistant, _ = [json.loads(line) for line in prompt.splitlines()]
    assert assistant["reasoning_content"].strip() == "hm"


async def test_thinking_between_tools_is_thinking() -> None:
    assert (await post({"thinking": {"type": "between_tools"}}))[0] == 200


@pytest.mark.parametrize(("is_error", "content"), [(True, None), (True, ""), (True, "no"), (False, "")])
async def test_a_failed_tool_s_empty_result_says_so_to_the_model(is_error: bool, content: str | None) -> None:
    engine = ScriptedEngine(say("a"))
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": is_error, "content": content}
    use = {"type": "tool_use", "id": "t", "name": "now", "input": {}}
    messages = [*HI, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    async with client_of(app_of(engine)) as client:
        body = {"messages": messages, "max_tokens": 5}
        assert (await client.post("/v1/messages", json=body)).status_code == 200
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    assert ("[the tool failed]" in prompt) == (is_error and not content)
