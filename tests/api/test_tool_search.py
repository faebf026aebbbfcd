"""A search for tools that the client runs: Codex makes the tools of MCP servers known in this way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.agents.player import TEMPLATE, call, play, play_of
from tests.api.test_responses import post
from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import app_of, pieces_of, sdk
from tests.support.tool_writers import write
from tgi_asgi.api.openai.response_input import read_items
from tgi_asgi.api.openai.response_schema import ResponsesRequest
from tgi_asgi.api.openai.response_tools import read_tools
from tgi_asgi.api.openai.tools import read_choice
from tgi_asgi.errors import InvalidRequest

PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "number"}}}
SEARCH: dict[str, Any] = {
    "type": "tool_search", "execution": "client", "description": "Searches.", "parameters": PARAMETERS,
}  # fmt: skip
COUNT = {"type": "function", "name": "count", "parameters": {"type": "object"}, "defer_loading": True}
FRUIT = {"type": "namespace", "name": "mcp__fruit", "description": "Fruit.", "tools": [COUNT]}
ARGUMENTS = {"query": "fruit", "limit": 2}
CALL = {"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": ARGUMENTS}
FOUND: dict[str, Any] = {
    "type": "tool_search_output", "call_id": "c", "execution": "client", "status": "completed",
    "tools": [FRUIT],
}  # fmt: skip
EVENT: Any = TypeAdapter(ResponseStreamEvent)


def offered(*items: dict[str, Any], tools: Any = (SEARCH,)) -> list[tuple[str | None, str]]:
    """Return the namespaces and names of the tools that the model is shown."""
    return [(tool.namespace, tool.name) for tool in read_tools(ResponsesRequest(tools=[*tools]), items)]


def test_the_model_is_shown_the_client_s_description_and_parameters() -> None:
    [tool] = read_tools(ResponsesRequest(tools=[SEARCH]))
    assert (tool.name, tool.description, tool.parameters) == ("tool_search", "Searches.", PARAMETERS)


@pytest.mark.parametrize("given", [{}, {"description": None, "parameters": None}])
def test_a_search_without_parameters_takes_a_query(given: dict[str, Any]) -> None:
    [tool] = read_tools(ResponsesRequest(tools=[{"type": "tool_search", "execution": "client", **given}]))
    assert tool.description and (tool.parameters or {})["required"] == ["query"]


@pytest.mark.parametrize("execution", [{}, {"execution": "server"}, {"execution": None}])
def test_a_search_that_is_not_the_client_s_is_skipped(execution: dict[str, Any]) -> None:
    assert offered(tools=[{"type": "tool_search", **execution}]) == []
    items: list[dict[str, Any]] = [
        {key: value for key, value in item.items() if key != "execution"} | execution
        for item in (CALL, FOUND)
    ]
    assert read_items(items) == [] and offered(*items) == [(None, "tool_search")]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_of_a_function_that_openai_would_search_names_it_as_its_namespace(stream: bool) -> None:
    """OpenAI's agents SDK knows no deferred function of a call without it."""
    hosted, listed = {"type": "tool_search"}, {"type": "function", "name": "f"}
    script = say(*pieces_of(write("hermes", [("count", {}), ("f", {})])))
    for tools, expected in (
        ([COUNT, listed, hosted], ["count", None]),
        ([COUNT, listed, SEARCH], [None, None]),
        ([COUNT, listed], [None, None]),
    ):
        status, body = await post(script, tools=tools, stream=stream)
        assert status == 200
        items = (body[-1]["response"] if stream else body)["output"]
        assert [item["name"] for item in items] == ["count", "f"]
        assert [item.get("namespace") for item in items] == expected


def test_a_deferred_function_keeps_its_name_in_a_history() -> None:
    listed: Any = [COUNT, {"type": "tool_search"}]
    called = {
        "type": "function_call",
        "call_id": "c",
        "name": "count",
        "namespace": "count",
        "arguments": "{}",
    }
    tools = read_tools(ResponsesRequest(tools=listed), [called])
    [turn] = read_items([called], tools=tools)
    assert turn["tool_calls"][0]["function"]["name"] == "count"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_is_an_item_of_the_sdk_s_type(stream: bool) -> None:
    script = say(*pieces_of(write("hermes", [("tool_search", ARGUMENTS)])))
    status, body = await post(script, tools=[SEARCH], stream=stream)
    assert status == 200
    if stream:
        for event in body:
            EVENT.validate_json(json.dumps(event), strict=True)
        _, _, added, done, completed = body
        assert added["type"] == "response.output_item.added" and added["item"]["status"] == "in_progress"
        body = completed["response"]
        assert body["output"] == [done["item"]]
    Response.model_validate_json(json.dumps(body), strict=True)
    [item] = body["output"]
    assert item.pop("id").startswith("tsc_") and item.pop("call_id").startswith("call_")
    assert item == {key: CALL[key] for key in ("type", "execution", "arguments")} | {"status": "completed"}


async def test_a_call_that_is_cut_off_is_an_unfinished_call_of_a_function() -> None:
    tokens = pieces_of(write("hermes", [("tool_search", ARGUMENTS)]))[:-6]
    _, body = await post(say(*tokens, "x"), tools=[SEARCH], max_output_tokens=len(tokens))
    [item] = body["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "tool_search", "incomplete")


def test_the_tools_that_are_found_are_offered_once() -> None:
    listed = {"type": "function", "name": "f"}
    twice = {**FOUND, "tools": [FRUIT, listed]}
    assert offered(FOUND, twice, tools=[SEARCH, listed]) == [
        (None, "tool_search"), (None, "f"), ("mcp__fruit", "count"),
    ]  # fmt: skip


def test_the_model_reads_the_names_of_the_tools_that_were_found() -> None:
    other = {**FRUIT, "name": "mcp__nuts"}
    tools = read_tools(ResponsesRequest(tools=[SEARCH]), [{**FOUND, "tools": [FRUIT, other]}])
    [called, result, nothing] = read_items(
        [CALL, {**FOUND, "tools": [FRUIT, other]}, {**FOUND, "tools": []}], tools=tools
    )
    assert called["tool_calls"][0]["function"] == {"name": "tool_search", "arguments": ARGUMENTS}
    assert result["content"] == "[tool: mcp__fruit__count]\n[tool: mcp__nuts__count]"
    assert nothing["content"] == "[no tools found]"


def test_a_choice_names_it_by_its_type() -> None:
    tools = read_tools(ResponsesRequest(tools=[SEARCH, COUNT]))
    chosen = read_choice(
        tools, {"type": "tool_search"}, offered={"tool_search", "function"}, is_parallel=True
    )
    assert chosen is not None and chosen.must_call and [spec.name for spec in chosen.specs] == ["tool_search"]


@pytest.mark.parametrize(
    ("tools", "items", "param"),
    [
        ([{**SEARCH, "parameters": "none"}], [], "tools[0].parameters"),
        ([SEARCH], [{**CALL, "arguments": 5}], "input[0].arguments"),
        ([SEARCH], [{**FOUND, "tools": [{"type": "function"}]}], "tools[1].name"),
    ],
)
def test_another_form_is_refused_by_name(tools: Any, items: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_items(items, tools=read_tools(ResponsesRequest(tools=tools), items))
    assert caught.value.param == param


async def test_found_tools_are_offered_when_a_stored_answer_is_continued() -> None:
    engine = ScriptedEngine(say("ok"))
    async with client_of(app_of(engine)) as client:
        user = {"role": "user", "content": "hi"}
        first = (
            await client.post("/v1/responses", json={"input": [user, CALL, FOUND], "tools": [SEARCH]})
        ).json()
        again = {"previous_response_id": first["id"], "input": "go on", "tools": [SEARCH]}
        assert (await client.post("/v1/responses", json=again)).status_code == 200
    prompts = [
        engine.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
        for request in engine.requests
    ]
    assert all('"name": "count"' in prompt for prompt in prompts)


async def test_an_agent_finds_a_tool_and_calls_it() -> None:
    steps = [call("tool_search", query="fruit"), call("count", path="fruit.txt")]
    turns: list[Any] = [{"role": "user", "content": play_of(steps)}]
    tools: list[Any] = [SEARCH]
    async with sdk(play, chat_template=TEMPLATE) as client:
        for _ in range(3):
            final = await client.responses.create(model="m", input=turns, tools=tools, store=False)
            for item in final.output:
                turns.append(item.model_dump(exclude_unset=True))
                if item.type == "tool_search_call":
                    turns.append({**FOUND, "call_id": item.call_id})
                elif item.type == "function_call":
                    assert (item.namespace, item.name) == ("mcp__fruit", "count")
                    output = {"type": "function_call_output", "call_id": item.call_id, "output": "7 pears"}
                    turns.append(output)
    assert final.output_text == "The last result is: 7 pears"
