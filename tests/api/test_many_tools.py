"""Tools that are together too large for one grammar: those that are not strict may have any arguments."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.client import client_of
from tests.support.processor_time import computed_within
from tests.support.scripted_engine import CHATML, ScriptedEngine, say, scripted_app, toy_info
from tests.support.tool_writers import write
from tgi_asgi.api.tools import Tool, choose
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain import compiler_errors
from tgi_asgi.text.constrain.answer_grammar import ToolUse, answer_grammar
from tgi_asgi.text.tools import FORMATS, ToolSpec


def tools(count: int, **more: Any) -> list[dict[str, Any]]:
    """Return tools of twelve arguments each, of several types."""
    values = [{"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "number"}}]
    return [
        {
            "type": "function",
            "function": {
                "name": f"tool_{number}",
                "parameters": {
                    "type": "object",
                    "properties": {f"argument_{number}_{at}": values[at % 3] for at in range(12)},
                    "required": [f"argument_{number}_0"],
                    "additionalProperties": False,
                },
                **more,
            },
        }
        for number in range(count)
    ]


async def answer(name: str, body: dict[str, Any], *calls: tuple[str, dict[str, Any]]) -> httpx.Response:
    text = write(name, list(calls))
    script = say(*(text[at : at + 5] for at in range(0, len(text), 5)))
    info = toy_info(max_input_tokens=4_000_000, max_total_tokens=4_000_001)
    app = scripted_app(ScriptedEngine(script), Settings(tool_format=name), info=info, chat_template=CHATML)
    async with client_of(app) as client:
        question = {"messages": [{"role": "user", "content": "hi"}], **body}
        return await client.post("/v1/chat/completions", json=question)


@pytest.mark.parametrize("name", ["qwen3_coder", "lfm2"])
async def test_hundreds_of_tools_are_called_with_free_arguments(name: str) -> None:
    called = {"argument_7_1": 2, "argument_7_0": "a"}
    found = await answer(name, {"tools": tools(220)}, ("tool_7", called))
    assert found.status_code == 200, found.text
    assert "tools.tool_0" in found.headers["x-tgi-ignored-keywords"].split(",")
    [call] = found.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "tool_7"
    assert json.loads(call["function"]["arguments"]) == called


@pytest.mark.parametrize(("name", "number"), [("hermes", 3), ("qwen3_coder", 120), ("gemma4", 120)])
async def test_the_tools_of_an_agent_keep_their_rules(name: str, number: int) -> None:
    found = await answer(name, {"tools": tools(number)}, ("tool_1", {"argument_1_0": "a"}))
    assert found.status_code == 200 and "x-tgi-ignored-keywords" not in found.headers


def test_the_tools_of_an_agent_are_read_anew_for_each_request_in_time() -> None:
    specs = [ToolSpec(each["function"]["name"], each["function"]["parameters"]) for each in tools(200)]
    for limit in (20, 2):  # the first time, each is compiled to see if it can be
        computed_within(limit, lambda: answer_grammar(None, ToolUse(FORMATS["hermes"], specs)))


async def test_strict_tools_that_are_too_large_for_one_grammar_are_refused() -> None:
    many = await answer("qwen3_coder", {"tools": tools(220, strict=True)}, ("tool_1", {}))
    assert many.status_code == 400
    assert "tools" in many.json()["error"]["message"]


def test_a_choice_that_names_tools_again_and_again_is_read_in_time() -> None:
    """400,000 names fit into a body."""
    named = [Tool(index, f"tool_{index}") for index in range(1024)]
    choice = computed_within(1, lambda: choose(named, "auto", ["tool_1023"] * 400_000))
    assert choice is not None and [spec.name for spec in choice.specs] == ["tool_1023"]


def unknown_tool(number: int, **more: Any) -> dict[str, Any]:
    """Return a tool with a schema that no other test has had checked."""
    properties = {"x": {"type": "string", "pattern": f"^a{number}$"}}
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}, **more}
    return {"type": "function", "function": function}


@pytest.mark.parametrize(("name", "number"), [("qwen3_coder", 4000), ("hermes", 5000)])
async def test_tools_that_cannot_be_checked_in_time_may_have_any_arguments(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each distinct argument takes milliseconds in some formats, and a long prompt has ten thousand."""
    invalid = {"type": "function", "function": {"name": "g", "parameters": {"type": 1}}}
    await answer(name, {"tools": [invalid]})  # from here on, what stands for such a schema is known
    monkeypatch.setattr(compiler_errors, "MAX_CHECKS_S", -1.0)
    free = await answer(name, {"tools": [unknown_tool(number)]}, ("f", {"x": "a"}))
    assert free.status_code == 200, free.text
    assert "tools.f" in free.headers["x-tgi-ignored-keywords"].split(",")
    strict = await answer(name, {"tools": [unknown_tool(number + 1, strict=True)]}, ("f", {}))
    assert (strict.status_code, strict.json()["error"]["param"]) == (400, "tools")
    assert "takes more than" in strict.json()["error"]["message"]
    constraint = {"json": unknown_tool(number + 2)["function"]["parameters"]}
    refused = await answer(name, {"structured_outputs": constraint})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs")
    monkeypatch.undo()
    later = await answer(name, {"tools": [unknown_tool(number)]}, ("f", {"x": f"a{number}"}))
    assert later.status_code == 200 and "tools.f" not in later.headers.get("x-tgi-ignored-keywords", "")
