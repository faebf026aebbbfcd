"""OpenAI's tools that clients run: functions for the model, items of their own for the client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.agents.player import TEMPLATE, call, play, play_of
from tests.api.test_responses import post
from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedChannel, ScriptedEngine, say
from tests.support.tool_app import app_of, pieces_of, sdk
from tests.support.tool_writers import write
from tgi_asgi.api.openai.response_input import read_items
from tgi_asgi.api.openai.response_schema import ResponsesRequest
from tgi_asgi.api.openai.response_tools import read_tools
from tgi_asgi.api.openai.tools import read_choice
from tgi_asgi.errors import GenerationFailed, InvalidRequest, TgiError
from tgi_asgi.settings import Settings
from tgi_asgi.text.tools import FORMATS
from tgi_asgi.types import TokenEvent

LOCAL = {"type": "shell", "environment": {"type": "local"}}
HOSTED = {"type": "shell", "environment": {"type": "container_auto"}}
TOOLS: list[Any] = [LOCAL, {"type": "local_shell"}, {"type": "apply_patch"}]
DIFF = '@@ def f():\n-    a = "1"\n+    a = "2"\n     return a'
# The model's arguments, and the item that the client expects.
SHELL = (
    ("shell", {"commands": ["ls", "cat 'a b'"], "timeout_ms": 500, "max_output_length": 9}),
    {"type": "shell_call",
     "action": {"commands": ["ls", "cat 'a b'"], "timeout_ms": 500, "max_output_length": 9},
     "environment": {"type": "local"}},
)  # fmt: skip
BARE_SHELL = (
    ("shell", {"commands": ["ls"]}),
    {"type": "shell_call",
     "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None},
     "environment": {"type": "local"}},
)  # fmt: skip
LOCAL_SHELL = (
    ("local_shell", {"command": ["ls"], "working_directory": "/", "env": {"A": "1"}, "timeout_ms": 5}),
    {"type": "local_shell_call",
     "action": {"type": "exec", "command": ["ls"], "working_directory": "/", "env": {"A": "1"},
                "timeout_ms": 5}},
)  # fmt: skip
BARE_LOCAL_SHELL = (
    ("local_shell", {"command": ["ls"]}),
    {"type": "local_shell_call", "action": {"type": "exec", "command": ["ls"], "env": {}}},
)
UPDATE = (
    ("apply_patch", {"type": "update_file", "path": "a.py", "diff": DIFF}),
    {"type": "apply_patch_call", "operation": {"type": "update_file", "path": "a.py", "diff": DIFF}},
)
DELETE = (
    ("apply_patch", {"type": "delete_file", "path": "a.py", "diff": ""}),
    {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a.py"}},
)
ALL: list[Any] = [SHELL, BARE_SHELL, LOCAL_SHELL, BARE_LOCAL_SHELL, UPDATE, DELETE]
CALLED = [made for made, _ in ALL]
EVENT: Any = TypeAdapter(ResponseStreamEvent)


def own(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without its ids and its status."""
    return {name: value for name, value in item.items() if name not in ("id", "call_id", "status")}


async def test_calls_are_items_of_the_sdk_s_types() -> None:
    status, whole = await post(say(*pieces_of(write("hermes", CALLED))), tools=TOOLS)
    assert (status, whole["status"]) == (200, "completed")
    Response.model_validate_json(json.dumps(whole), strict=True)
    assert [own(item) for item in whole["output"]] == [item for _, item in ALL]
    assert {item["status"] for item in whole["output"]} == {"completed"}
    assert [item["id"].split("_")[0] for item in whole["output"]] == ["sh", "sh", "lsh", "lsh", "apc", "apc"]
    assert len({item["call_id"] for item in whole["output"]}) == len(ALL)


async def test_a_stream_has_the_events_of_whole_items() -> None:
    _, events = await post(say(*pieces_of(write("hermes", CALLED))), tools=TOOLS, stream=True)
    for event in events:
        EVENT.validate_json(json.dumps(event), strict=True)
    _, _, *changes, completed = events
    assert [event["type"].removeprefix("response.output_item.") for event in changes] == ["added", "done"] * 6
    added, done = ([event["item"] for event in changes[first::2]] for first in (0, 1))
    assert done == completed["response"]["output"]
    assert added == [{**item, "status": "in_progress"} for item in done]
    assert [event["output_index"] for event in changes[::2]] == list(range(6))


@pytest.mark.parametrize("name", FORMATS)
async def test_every_format_writes_a_patch(name: str) -> None:
    app = app_of(ScriptedEngine(say(*pieces_of(write(name, [UPDATE[0]])))), Settings(tool_format=name))
    async with client_of(app) as client:
        answer = (await client.post("/v1/responses", json={"input": "hi", "tools": TOOLS})).json()
    assert [own(item) for item in answer["output"]] == [UPDATE[1]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_cut_off_is_an_unfinished_call_of_a_function(stream: bool) -> None:
    tokens = pieces_of(write("hermes", [UPDATE[0]]))[:-10]
    status, body = await post(
        say(*tokens, "x", "y"), tools=TOOLS, max_output_tokens=len(tokens), stream=stream
    )
    assert status == 200
    if stream:
        for event in body:
            EVENT.validate_json(json.dumps(event), strict=True)
        changes = ["output_item.added", "arguments.delta", "arguments.done", "output_item.done", "incomplete"]
        assert all(event["type"].endswith(kind) for event, kind in zip(body[2:], changes, strict=True))
        body = body[-1]["response"]
    Response.model_validate_json(json.dumps(body), strict=True)
    [item] = body["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "apply_patch", "incomplete")
    assert item["arguments"].startswith('{"type": "update_file"') and not item["arguments"].endswith("}")


async def test_a_failed_answer_has_no_call_that_was_not_announced() -> None:
    async def fail_in_the_call(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        tokens = pieces_of(write("hermes", [UPDATE[0]]))[:-10]
        async for step in say("hm", *tokens, finish=None)(channel):
            yield step
            if channel.stats.generated_tokens > len(tokens):
                yield GenerationFailed("lost")

    _, events = await post(fail_in_the_call, tools=TOOLS, stream=True)
    for event in events:
        EVENT.validate_json(json.dumps(event), strict=True)
    assert events[-1]["type"] == "response.failed"
    added = [event["item"]["type"] for event in events if event["type"] == "response.output_item.added"]
    assert [item["type"] for item in events[-1]["response"]["output"]] == added == ["message"]


@pytest.mark.parametrize("arguments", [{"commands": "ls"}, {}, {"commands": [1]}])
async def test_arguments_of_another_form_are_a_function_s(arguments: dict[str, Any]) -> None:
    _, body = await post(say(*pieces_of(write("hermes", [("shell", arguments)]))), tools=TOOLS)
    [item] = body["output"]
    assert (item["type"], json.loads(item["arguments"])) == ("function_call", arguments)


async def test_a_function_with_the_name_of_such_a_tool_is_a_function() -> None:
    tools = [{"type": "function", "name": "shell", "parameters": {"type": "object"}}]
    _, body = await post(say(*pieces_of(write("hermes", [BARE_SHELL[0]]))), tools=tools)
    assert body["output"][0]["type"] == "function_call"


async def test_a_shell_and_a_function_of_that_name_are_two_tools() -> None:
    tools = [LOCAL, {"type": "function", "name": "shell", "parameters": {"type": "object"}}]
    (_, arguments), item = BARE_SHELL
    made = write("hermes", [("shell", arguments), ("builtin__shell", arguments)])
    _, body = await post(say(*pieces_of(made)), tools=tools)
    assert [own(each) for each in body["output"]] == [
        {"type": "function_call", "name": "shell", "arguments": json.dumps(arguments)}, item
    ]  # fmt: skip
    shown = read_tools(ResponsesRequest(tools=tools))
    assert [tool.name for tool in shown] == ["builtin__shell", "shell"]
    [message] = read_items(body["output"], tools=shown)
    assert [called["function"]["name"] for called in message["tool_calls"]] == ["shell", "builtin__shell"]
    chosen = read_choice(shown, {"type": "shell"}, offered={"shell", "function"}, is_parallel=True)
    assert chosen is not None and [spec.name for spec in chosen.specs] == ["builtin__shell"]


def test_the_model_is_shown_functions_with_the_arguments_of_the_items() -> None:
    tools = {tool.name: tool for tool in read_tools(ResponsesRequest(tools=TOOLS))}
    required = {name: (tool.parameters or {})["required"] for name, tool in tools.items()}
    assert required == {
        "shell": ["commands"],
        "local_shell": ["command"],
        "apply_patch": ["type", "path", "diff"],
    }
    for name, arguments in CALLED:
        assert arguments.keys() <= (tools[name].parameters or {})["properties"].keys()


def test_skills_of_the_local_environment_are_described() -> None:
    skill = {"name": "pdf", "description": "Read PDFs.", "path": "/skills/pdf"}
    [tool] = read_tools(
        ResponsesRequest(tools=[{**LOCAL, "environment": {"type": "local", "skills": [skill]}}])
    )
    assert "pdf (/skills/pdf): Read PDFs." in (tool.description or "")


@pytest.mark.parametrize("environment", [None, {"type": "local"}])
def test_a_shell_is_local_unless_it_has_a_container(environment: Any) -> None:
    assert [
        tool.name for tool in read_tools(ResponsesRequest(tools=[{**LOCAL, "environment": environment}]))
    ] == ["shell"]
    assert read_tools(ResponsesRequest(tools=[HOSTED])) == []


FUNCTION, SEARCH = {"type": "function", "name": "f"}, {"type": "web_search"}
ALLOWED = {"type": "allowed_tools", "mode": "required"}


@pytest.mark.parametrize(
    ("given", "choice", "names", "must_call"),
    [
        ([LOCAL, FUNCTION], {"type": "shell"}, ["shell"], True),
        ([FUNCTION, {"type": "apply_patch"}], {"type": "apply_patch"}, ["apply_patch"], True),
        ([LOCAL, FUNCTION], {"type": "function", "name": "shell"}, ["shell"], True),
        ([*TOOLS, FUNCTION], {**ALLOWED, "tools": [{"type": "shell"}, FUNCTION]}, ["shell", "f"], True),
        ([*TOOLS, SEARCH], {**ALLOWED, "tools": [{"type": "apply_patch"}, SEARCH]}, ["apply_patch"], True),
        ([HOSTED, FUNCTION], {"type": "shell"}, ["f"], False),
    ],
)
def test_a_choice_names_them_by_their_type(
    given: Any, choice: Any, names: list[str], must_call: bool
) -> None:
    tools = read_tools(ResponsesRequest(tools=given))
    chosen = read_choice(tools, choice, offered={tool["type"] for tool in given}, is_parallel=True)
    assert chosen is not None
    assert ([spec.name for spec in chosen.specs], chosen.must_call) == (names, must_call)


@pytest.mark.parametrize("choice", [{"type": "shell"}, {"type": ["shell"]}])
async def test_a_choice_of_a_tool_that_was_not_offered_is_refused(choice: Any) -> None:
    status, body = await post(say("a"), tools=[{"type": "apply_patch"}], tool_choice=choice)
    assert (status, body["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize(("made", "item"), ALL)
def test_a_call_of_the_history_is_what_the_model_wrote(made: Any, item: dict[str, Any]) -> None:
    """Clients may write null for what is absent, and in any order; templates show the model's order."""
    name, arguments = made
    key = "action" if "action" in item else "operation"
    null = {"timeout_ms": None, "user": None, "max_output_length": None}
    for fields in (item[key], null | dict(reversed(item[key].items()))):
        [message] = read_items([{**item, key: fields, "call_id": "c"}])
        [called] = message["tool_calls"]
        assert (called["id"], called["function"]["name"]) == ("c", name)
        assert json.dumps(called["function"]["arguments"]) == json.dumps(arguments)


EXIT = {"type": "exit", "exit_code": 3}


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ({"type": "shell_call_output",
          "output": [{"stdout": "a\n", "stderr": "", "outcome": EXIT},
                     {"stdout": "", "stderr": "b", "outcome": {"type": "timeout"}}]},
         "a\nexit code: 3\n\nstderr:\nb\ntimed out"),
        ({"type": "shell_call_output", "output": "a"}, "a"),
        ({"type": "local_shell_call_output", "output": "a"}, "a"),
        ({"type": "apply_patch_call_output", "status": "failed", "output": "no such file"}, "no such file"),
        ({"type": "apply_patch_call_output", "status": "failed"}, "[failed]"),
        ({"type": "apply_patch_call_output", "status": "completed", "output": None}, "[completed]"),
    ],
)  # fmt: skip
def test_outputs_are_results_of_tools(output: dict[str, Any], text: str) -> None:
    assert read_items([{**output, "call_id": "c"}]) == [
        {"role": "tool", "content": text, "tool_call_id": "c"}
    ]


def test_the_id_of_a_local_shell_s_output_may_be_the_call_s() -> None:
    """OpenAI's type of this output has no `call_id`."""
    calls: list[Any] = [{**BARE_LOCAL_SHELL[1], "call_id": name} for name in ("c", "d")]
    outputs: list[Any] = [
        {"type": "local_shell_call_output", "id": name, "output": name} for name in ("d", "c")
    ]
    _, *results = read_items([*calls, *outputs])
    assert [(each["tool_call_id"], each["content"]) for each in results] == [("d", "d"), ("c", "c")]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "shell_call", "call_id": "c"}, "input[0].action"),
        ({"type": "shell_call", "call_id": "c", "action": {"commands": "ls"}}, "input[0].action"),
        ({"type": "shell_call", "action": {"commands": ["ls"]}}, "input[0].call_id"),
        ({"type": "apply_patch_call", "call_id": "c", "operation": {"type": "move", "path": "a"}},
         "input[0].operation"),
        ({"type": "shell_call_output", "call_id": "c", "output": [1]}, "input[0]"),
        ({"type": "local_shell_call_output", "call_id": "c"}, "input[0]"),
        ({"type": "apply_patch_call_output", "call_id": 1}, "input[0].call_id"),
    ],
)  # fmt: skip
def test_an_item_of_another_form_is_refused_by_name(item: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_items([item])
    assert caught.value.param == param


async def test_a_stored_call_is_continued_and_listed() -> None:
    engine = ScriptedEngine(say(*pieces_of(write("hermes", [SHELL[0]]))))
    async with client_of(app_of(engine)) as client:
        first = (await client.post("/v1/responses", json={"input": "hi", "tools": TOOLS})).json()
        [made] = first["output"]
        output = {"type": "shell_call_output", "call_id": made["call_id"],
                  "output": [{"stdout": "a.py", "stderr": "", "outcome": EXIT}]}  # fmt: skip
        engine.script = say("ok")
        for before in (
            {"previous_response_id": first["id"], "input": [output]},
            {
                "input": [
                    {"role": "user", "content": "hi"},
                    {"type": "item_reference", "id": made["id"]},
                    output,
                ]
            },
        ):
            answer = await client.post("/v1/responses", json={**before, "tools": TOOLS})
            assert answer.status_code == 200, answer.text
        listed = (await client.get(f"/v1/responses/{answer.json()['id']}/input_items")).json()["data"]
    whole, other = (
        engine.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
        for request in engine.requests[1:]
    )
    assert whole == other and json.dumps(SHELL[0][1]) in whole and "a.py\nexit code: 3" in whole
    for item in listed:
        if item["type"] != "item_reference":
            TypeAdapter(ResponseItem).validate_json(json.dumps(item), strict=True)


async def test_an_agent_s_turns_over_a_socket() -> None:
    """An agent sends back what it has parsed, and runs what it gets."""
    steps = [
        call("apply_patch", type="create_file", path="a.txt", diff="+one"),
        call("shell", commands=["cat a.txt"]),
    ]
    results: dict[str, Any] = {
        "apply_patch_call": {"type": "apply_patch_call_output", "status": "completed", "output": "created"},
        "shell_call": {
            "type": "shell_call_output",
            "output": [{"stdout": "one\n", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}],
        },
    }
    turns: list[Any] = [{"role": "user", "content": play_of(steps)}]
    kinds = []
    async with sdk(play, chat_template=TEMPLATE) as client:
        for _ in range(3):
            async with client.responses.stream(model="m", input=turns, tools=TOOLS) as stream:
                final = await stream.get_final_response()
            for item in final.output:
                kinds.append(item.type)
                turns.append(item.model_dump(exclude_unset=True))
                if item.type in results:
                    turns.append({**results[item.type], "call_id": item.call_id})  # type: ignore[union-attr]
    assert [kind for kind in kinds if kind.endswith("call")] == ["apply_patch_call", "shell_call"]
    assert final.output_text == "The last result is: one\nexit code: 0"
