"""Tool calls and reasoning on chat: whole, streamed, through OpenAI's SDK, and in TGI's formats."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from pydantic import BaseModel

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, ScriptedEngine, say
from tests.support.tool_app import CALLS, CITY, HI, THINKING, TOOLS, app_of, chat, deltas, pieces_of, sdk
from tests.support.tool_writers import write
from tgi_asgi.settings import Settings
from tgi_asgi.text.tools import FORMATS


async def test_calls_and_the_text_before_them() -> None:
    choice = (await chat(say(*CALLS), tools=TOOLS))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see."
    first, second = message["tool_calls"]
    assert first["type"] == "function" and first["id"].startswith("call_") and first["id"] != second["id"]
    assert first["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert second["function"] == {"name": "now", "arguments": "{}"}


@pytest.mark.parametrize("name", FORMATS)
async def test_every_format_reaches_the_wire_whole_and_streamed(name: str) -> None:
    arguments = {"city": 'Paris, "9e"'}
    script = say(*pieces_of(write(name, [("weather", arguments), ("now", {})])))
    options: dict[str, Any] = {"tools": TOOLS, "settings": {"tool_format": name}}
    message = (await chat(script, **options))["choices"][0]["message"]
    assert message["content"] is None
    called = [
        (each["function"]["name"], json.loads(each["function"]["arguments"]))
        for each in message["tool_calls"]
    ]
    assert called == [("weather", arguments), ("now", {})]
    streamed: dict[int, list[str]] = {}
    choices = await deltas(script, **options)
    for delta in (choice["delta"] for choice in choices):
        assert not delta.get("content")
        for call in delta.get("tool_calls") or ():
            if call.get("id"):
                streamed[call["index"]] = [call["function"]["name"], ""]
            streamed[call["index"]][1] += call["function"].get("arguments") or ""
    assert [(given, json.loads(text)) for given, text in streamed.values()] == called
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_channels_become_reasoning_content_and_calls(stream: bool) -> None:
    template = CHATML + "{# <|channel|>analysis<|message|> #}"
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}<|call|>'
    text = "<|channel|>final<|message|>hello"
    for answer, wanted in ((thought + call, ("hm", "", '{"a": 1}')), (thought + text, ("hm", "hello", ""))):
        script = say(*pieces_of(answer))
        if stream:
            messages = [choice["delta"] for choice in await deltas(script, template=template, tools=TOOLS)]
        else:
            messages = [(await chat(script, template=template, tools=TOOLS))["choices"][0]["message"]]
        received = [
            "".join(message.get(key) or "" for message in messages)
            for key in ("reasoning_content", "content")
        ]
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        received.append("".join(call["function"].get("arguments") or "" for call in calls))
        assert tuple(received) == wanted


async def test_an_administrator_may_leave_reasoning_in_the_text() -> None:
    script = say("<think>", "hm", "</think>", "hello")
    for given, content in (
        ("auto", "hello"),
        ("none", "<think>hm</think>hello"),
        ("mistral", "<think>hm</think>hello"),
    ):
        settings = {"reasoning_format": given}
        message = (await chat(script, template=THINKING, settings=settings))["choices"][0]["message"]
        assert message["content"] == content


async def test_an_answer_of_calls_alone_has_no_content() -> None:
    message = (await chat(say(*CALLS[4:]), tools=TOOLS))["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 2


async def test_an_answer_without_calls_is_text() -> None:
    choice = (await chat(say("No", " tools"), tools=TOOLS))["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "No tools", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_with_tool_choice_none_nothing_is_a_call() -> None:
    choice = (await chat(say(*CALLS), tools=TOOLS, tool_choice="none"))["choices"][0]
    assert choice["message"]["content"] == "".join(CALLS)
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("named", ["now", {"type": "function", "function": {"name": "now"}}])
async def test_a_named_function_ends_with_stop_as_openai_s_does(named: Any) -> None:
    for stream in (False, True):
        if stream:
            choices = await deltas(say(*CALLS[-3:]), tools=TOOLS, tool_choice=named)
        else:
            choices = (await chat(say(*CALLS[-3:]), tools=TOOLS, tool_choice=named))["choices"]
        assert choices[-1]["finish_reason"] == "stop"


async def test_a_stream_of_a_required_call_has_no_text_not_even_an_empty_one() -> None:
    first, *chunks, last = await deltas(say(*CALLS[-3:]), tools=TOOLS, tool_choice="required")
    assert first["delta"] == {"role": "assistant", "content": None}
    assert all(chunk["delta"].keys() == {"tool_calls"} for chunk in chunks)
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


@pytest.mark.parametrize(
    ("said", "content"),
    [(CALLS[4:], None), (["\n", *CALLS[4:]], None), (CALLS, ""), (["Hi"], ""), ([], "")],
)
async def test_only_a_stream_that_begins_with_text_opens_with_one(
    said: list[str], content: str | None
) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    first, *chunks = await deltas(say(*said), **options)
    assert first["delta"] == {"role": "assistant", "content": content}
    assert first["logprobs"] is None
    assert not any("role" in chunk["delta"] for chunk in chunks)


@pytest.mark.parametrize("said", [CALLS[4:], CALLS, ["Hi"], []])
async def test_several_choices_that_may_call_open_without_text(said: list[str]) -> None:
    first, *chunks, last = await deltas(say(*said), tools=TOOLS, n=2)
    assert first["delta"] == {"role": "assistant", "content": None}
    assert all(chunk["delta"].get("content") != "" for chunk in chunks)
    assert last["delta"] == ({"content": ""} if said in (["Hi"], []) else {})


async def test_a_call_that_the_length_cuts_is_shown_as_far_as_it_came() -> None:
    choice = (await chat(say(*CALLS[4:]), tools=TOOLS, max_tokens=6))["choices"][0]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Pa'}


async def test_a_stream_tells_id_and_name_once_and_never_the_markup() -> None:
    *chunks, last = await deltas(say(*CALLS), tools=TOOLS)
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "Let me see."
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    heads = [call for call in calls if "id" in call]
    assert [(call["index"], call["function"]["name"]) for call in heads] == [(0, "weather"), (1, "now")]
    assert all(call["type"] == "function" and call["function"]["arguments"] == "" for call in heads)
    for index, arguments in enumerate(['{"city": "Paris"}', "{}"]):
        rest = [call for call in calls if call["index"] == index and "id" not in call]
        assert all(
            set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in rest
        )
        assert "".join(call["function"]["arguments"] for call in rest) == arguments
    assert [call["index"] for call in calls] == sorted(call["index"] for call in calls)
    assert last["finish_reason"] == "tool_calls"
    assert all(chunk["finish_reason"] is None for chunk in chunks)


@pytest.mark.parametrize("n", [1, 2])
async def test_the_sdk_s_accumulator_gets_what_the_whole_answer_has(n: int) -> None:
    async with sdk(say(*CALLS)) as client:
        options: dict[str, Any] = {"model": "m", "messages": HI, "tools": deepcopy(TOOLS), "n": n}
        whole = await client.chat.completions.create(**options)
        names = []
        for tool in options["tools"]:
            tool["function"]["strict"] = True  # otherwise the SDK's versions before 3 refuse to stream
        async with client.chat.completions.stream(**options) as stream:
            async for event in stream:
                if event.type == "tool_calls.function.arguments.done":
                    names.append((event.name, event.parsed_arguments))
            streamed = await stream.get_final_completion()
    assert len(whole.choices) == len(streamed.choices) == n
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.finish_reason == other.finish_reason == "tool_calls"
        assert one.message.content == other.message.content
        assert one.message.tool_calls is not None and other.message.tool_calls is not None
        assert [call.function.arguments for call in one.message.tool_calls if call.type == "function"] == [
            call.function.arguments for call in other.message.tool_calls
        ]
    assert names[0] == ("weather", {"city": "Paris"})


async def test_the_sdk_parses_an_answer_into_a_model() -> None:
    class Person(BaseModel):
        name: str
        age: int

    async with sdk(say('{"name":', '"Ann","age":', "7}")) as client:
        answer = await client.chat.completions.parse(model="m", messages=HI, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ann", age=7)


async def test_reasoning_is_split_off_and_counted() -> None:
    script = say("<think>", "a", "b", "</think>", "\n\n", "x", "y")
    body = await chat(script, template=THINKING)
    message = body["choices"][0]["message"]
    assert message["content"] == "xy"
    assert message["reasoning_content"] == message["reasoning"] == "ab"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4
    chunks = await deltas(script, template=THINKING)
    for name, text in (("content", "xy"), ("reasoning_content", "ab"), ("reasoning", "ab")):
        assert "".join(chunk["delta"].get(name, "") for chunk in chunks) == text
    hidden = (await chat(script, template=THINKING, include_reasoning=False))["choices"][0]["message"]
    assert hidden == {"role": "assistant", "content": "xy", "refusal": None}


async def test_a_prompt_that_opens_the_reasoning_is_noticed() -> None:
    template = THINKING + "{{ '<think>\\n' }}"
    choice = (await chat(say("a", "</think>", "x"), template=template))["choices"][0]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("a", "x")
    cut = (await chat(say("a", "b", "c"), template=template, max_tokens=2))["choices"][0]
    assert (cut["message"]["reasoning"], cut["message"]["content"]) == ("ab", None)


@pytest.mark.parametrize("content", ["<think>hm", [{"type": "text", "text": "<think>h"}]])
async def test_a_message_that_ends_in_its_reasoning_is_continued_there(content: Any) -> None:
    messages = [*HI, {"role": "assistant", "content": content}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    tokens = (", so.", "</think>", "yes")
    answer = await chat(say(*tokens), template=THINKING, messages=messages, **fields)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (", so.", "yes")


async def test_what_was_held_back_as_a_marker_is_part_of_an_answer_that_ends() -> None:
    script = say("see", " <tool", "_ca")
    message = (await chat(script, tools=TOOLS))["choices"][0]["message"]
    assert message["content"] == "see <tool_ca"
    streamed = [choice["delta"].get("content") for choice in await deltas(script, tools=TOOLS)]
    assert "".join(filter(None, streamed)) == "see <tool_ca"


async def test_an_echo_before_a_call_is_the_continued_text() -> None:
    messages = [*HI, {"role": "assistant", "content": "Let me see"}]
    fields: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = await chat(say(*CALLS[4:12]), messages=messages, tools=TOOLS, **fields)
    message = answer["choices"][0]["message"]
    assert (message["content"], len(message["tool_calls"])) == ("Let me see", 1)


async def test_log_probabilities_are_those_of_the_content_alone() -> None:
    tokens = ["<think>", "a", "</think>", "x", "y", *CALLS[4:]]
    choice = (await chat(say(*tokens), template=THINKING, tools=TOOLS, logprobs=True))["choices"][0]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["x", "y"]


async def test_tools_reach_a_template_that_knows_none_as_text() -> None:
    engine = ScriptedEngine(say("ok"))
    async with client_of(app_of(engine)) as client:
        await client.post("/v1/chat/completions", json={"messages": HI, "tools": TOOLS})
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nYou may call")
    assert '"name": "weather"' in prompt
    assert engine.requests[0].grammar is not None


@pytest.mark.parametrize(
    ("fields", "is_said"), [({}, True), ({"tool_choice": "none"}, False), ({"tools": []}, False)]
)
async def test_tgi_s_tool_prompt_stands_behind_the_last_message(
    fields: dict[str, Any], is_said: bool
) -> None:
    engine = ScriptedEngine(say("ok"))
    async with client_of(app_of(engine)) as client:
        body = {"messages": HI, "tools": TOOLS, "tool_prompt": "Mind the tools.", **fields}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    assert ("<|im_start|>user\nhi\n---\nMind the tools.<|im_end|>" in prompt) is is_said


async def test_parameters_may_go_by_the_name_of_tgi_s_first_clients() -> None:
    engine = ScriptedEngine(say("ok"))
    tool = {"type": "function", "function": {"name": "weather", "arguments": CITY}}
    async with client_of(app_of(engine)) as client:
        await client.post("/v1/chat/completions", json={"messages": HI, "tools": [tool]})
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    assert '"parameters": {"type": "object"' in prompt


async def test_switched_off_grammars_refuse_tools_too() -> None:
    app = app_of(ScriptedEngine(), Settings(disable_grammar_support=True))
    async with client_of(app) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": HI, "tools": TOOLS})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


async def test_tgi_s_shapes_of_calls() -> None:
    settings = {"tgi_compat": True}
    choice = (await chat(say(*CALLS[4:12]), tools=TOOLS, settings=settings))["choices"][0]
    call = {"description": None, "name": "weather", "arguments": '{"city": "Paris"}'}
    assert choice["message"] == {
        "role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": call}],
    }  # fmt: skip
    assert choice["finish_reason"] == "stop"
    chunks = await deltas(say(*CALLS[4:12]), tools=TOOLS, settings=settings)
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls") or []]
    assert all((call["index"], call["id"], call["type"]) == (0, "0", "function") for call in calls)
    assert [call["function"]["name"] for call in calls] == ["weather"] + [None] * (len(calls) - 1)
    assert all(chunk["delta"]["role"] == "assistant" for chunk in chunks)
    chunks = await deltas(say("No", " tools"), tools=TOOLS, settings=settings)
    assert all(chunk["delta"]["tool_calls"] is None for chunk in chunks)


# Of its SDKs for Python and Node.
MISTRAL_S = ("speakeasy-sdk/python 3.7.0 1 1.0.0 mistralai", "mistral-client-typescript/2.2.1")


@pytest.mark.parametrize("agent", MISTRAL_S)
@pytest.mark.parametrize("cut", [0, 1])
async def test_mistral_s_clients_get_each_call_in_one_delta(agent: str, cut: int) -> None:
    tokens = CALLS[: len(CALLS) - cut]
    async with client_of(app_of(ScriptedEngine(say(*tokens)))) as client:
        body = {"messages": HI, "tools": TOOLS, "stream": True}
        answer = await client.post("/v1/chat/completions", json=body, headers={"user-agent": agent})
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
    parts = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for part in parts for call in part.get("tool_calls") or ()]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather"), (1, "now")]
    assert calls[0]["function"]["arguments"] == '{"city": "Paris"}' and all(call["id"] for call in calls)
    assert "".join(part.get("content") or "" for part in parts) == "Let me see."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == len(tokens) + 1  # with the end token
    assert usage["total_tokens"] == usage["prompt_tokens"] + len(tokens) + 1


@pytest.mark.parametrize("any_tool", ["any", {"type": "function", "function": {"name": "any"}}])
@pytest.mark.parametrize("name", ["any", "f"])
async def test_any_means_required_unless_a_tool_has_that_name(name: str, any_tool: object) -> None:
    """As Mistral's SDK sends it, and LangChain's ChatHuggingFace, which makes a function's name of it."""
    tools = [{"type": "function", "function": {"name": each}} for each in (name, "other")]
    engine = ScriptedEngine()
    async with client_of(app_of(engine)) as client:
        for choice in (any_tool, "required", {"type": "function", "function": {"name": name}}):
            body = {"messages": HI, "tools": tools, "tool_choice": choice}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    of_any, of_required, of_name = (request.grammar for request in engine.requests)
    assert of_any is (of_name if name == "any" else of_required) and of_required is not of_name


@pytest.mark.parametrize("name", ["absent", {"type": "function", "function": {"name": "absent"}}])
async def test_an_unknown_tool_is_tgi_s_error_under_compat(name: object) -> None:
    app = app_of(ScriptedEngine(), Settings(tgi_compat=True))
    async with client_of(app) as client:
        body = {"messages": HI, "tools": TOOLS, "tool_choice": name}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 422
    assert answer.json() == {
        "error": "Tool error: Tool with name absent not found",
        "error_type": "tool_error",
    }


async def test_a_custom_tool_s_call_of_the_history_is_a_function_s_of_one_string() -> None:
    engine = ScriptedEngine()
    call = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "c1", "content": "done"})
    async with client_of(app_of(engine)) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 200
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    assert '{"name": "patch", "arguments": {"input": "*** Begin"}}' in prompt


@pytest.mark.parametrize(
    "form",
    [
        {"type": "grammar", "grammar": "abc"}, {"type": "grammar", "grammar": {"definition": 5}},
        {"type": "grammar", "definition": ["abc"]}, {"type": "grammar"}, {"type": 5}, {},
    ],
)  # fmt: skip
async def test_a_custom_tool_s_format_that_names_no_grammar_is_free_text(form: object) -> None:
    """The model is shown the grammar, but nothing enforces it; the tool can be called without one as well."""
    flat = {"type": "custom", "name": "patch", "format": form}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": HI, "tools": [{"type": "custom", "custom": flat}]},
        "/v1/responses": {"input": "hi", "tools": [flat]},
    }
    for path, body in bodies.items():
        engine = ScriptedEngine()
        async with client_of(app_of(engine)) as client:
            assert (await client.post(path, json=body)).status_code == 200
        prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
        assert "patch" in prompt and "must match" not in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "web_search"}, {"type": "web_search_preview"}])
async def test_a_choice_of_tools_that_are_hosted_elsewhere_counts_as_absent(choice: object) -> None:
    hosted = [{"type": "web_search"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": HI},
        "/v1/responses": {"input": "hi"},
    }
    async with client_of(app_of(ScriptedEngine())) as client:
        for path, body in bodies.items():
            answer = await client.post(path, json={**body, "tools": hosted, "tool_choice": choice})
            assert answer.status_code == 200, answer.json()


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]])
async def test_a_template_without_a_system_role_gets_the_tools_with_the_first_message(content: Any) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    engine = ScriptedEngine(say(*CALLS))
    body = {"messages": [{"role": "user", "content": content}], "tools": TOOLS}
    async with client_of(app_of(engine, chat_template=refusing + CHATML)) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
        messages = [{"role": "system", "content": "Be kind."}, *HI]
        await client.post("/v1/chat/completions", json={**body, "messages": messages})
    with_system = engine.tokenizer.decode(list(engine.requests[1].prompt_ids), skip_special_tokens=False)
    assert with_system.endswith("\n\nBe kind.\n\nhi<|im_end|>\n<|im_start|>assistant\n")
    prompt = engine.tokenizer.decode(list(engine.requests[0].prompt_ids), skip_special_tokens=False)
    shown = "hi" if content == "hi" else "h\ni"
    assert "</tools>" in prompt and prompt.endswith(f"\n\n{shown}<|im_end|>\n<|im_start|>assistant\n")


async def test_stop_strings_are_not_matched_in_reasoning() -> None:
    script = say("<think>", "a", "\n\n", "b", "</think>", "\n\n", "x", "\n\n", "y")
    body: dict[str, Any] = {"template": THINKING, "stop": ["\n\n"], "logprobs": True}
    [choice] = (await chat(script, **body))["choices"]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == ("x", "a\n\nb")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\n\n")
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["x"]
    streamed = [choice["delta"] for choice in await deltas(script, **body)]
    assert "".join(delta.get("content", "") for delta in streamed) == "x"
    assert "".join(delta.get("reasoning", "") for delta in streamed) == "a\n\nb"


async def test_hosted_tools_are_left_out_of_the_allowed_ones() -> None:
    mcp = {"type": "mcp", "server_label": "x"}
    for allowed, is_called in (([mcp, TOOLS[0]], True), ([mcp], False)):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
        body = await chat(say(*CALLS), tools=[*TOOLS, mcp], tool_choice=choice)
        assert ("tool_calls" in body["choices"][0]["message"]) is is_called
