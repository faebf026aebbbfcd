"""Anthropic's tools that have a type instead of a schema: those that clients run are functions here."""

from __future__ import annotations

import json
from typing import Any

import anthropic.types
import pytest

from tests.api.test_messages import HI, post, sdk
from tests.support.scripted_engine import say
from tgi_asgi.api.anthropic.typed_tools import definition_of
from tgi_asgi.api.tools import whole_arguments

TYPED: list[Any] = [
    anthropic.types.ToolBash20250124Param(type="bash_20250124", name="bash"),
    anthropic.types.ToolTextEditor20250124Param(type="text_editor_20250124", name="str_replace_editor"),
    anthropic.types.ToolTextEditor20250728Param(
        type="text_editor_20250728", name="str_replace_based_edit_tool", max_characters=9000
    ),
    anthropic.types.MemoryTool20250818Param(type="memory_20250818", name="memory"),
]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize("tool", TYPED, ids=lambda tool: tool["type"])
async def test_typed_tools_are_called_by_their_names(tool: Any) -> None:
    given = {"command": "view", "path": "/memories"}
    async with sdk(say(call(tool["name"], **given))) as client:
        message = await client.messages.create(
            model="m", messages=HI, tools=[tool], tool_choice={"type": "tool", "name": tool["name"]},
            max_tokens=50,
        )  # fmt: skip
    assert message.stop_reason == "tool_use"
    [block] = message.content
    assert isinstance(block, anthropic.types.ToolUseBlock)
    assert (block.name, block.input) == (tool["name"], given)


def test_editors_have_the_commands_of_their_date() -> None:
    schemas = {}
    for date in ("20241022", "20250124", "20250429", "20250728"):
        found = definition_of(f"text_editor_{date}")
        assert found is not None
        schemas[date] = found[1]["properties"]
    undo = {date for date, schema in schemas.items() if "undo_edit" in schema["command"]["enum"]}
    assert undo == {"20241022", "20250124"}
    assert {date for date, schema in schemas.items() if "insert_text" not in schema} == undo


@pytest.mark.parametrize(
    "kind", ["computer_20250124", "web_search_20250305", "code_execution_20250825", "bash"]
)
def test_other_types_have_no_definition(kind: str) -> None:
    assert definition_of(kind) is None


def test_half_of_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert whole_arguments('{"a": "x\\ud83d", "b": "\\ud83d\\ude00 \\udc00"}') == {
        "a": "x\ufffd",
        "b": "😀 \ufffd",
    }
    assert whole_arguments('{"\\\\ud83d": 1}') == {"\\ud83d": 1}
    for cut in ('{"a": "x', '{"a": "\\ud8', '{"a": NaN}', "[" * 100_000, ""):
        assert whole_arguments(cut) is None


async def test_a_call_with_half_a_pair_is_in_the_answer() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "x\\ud83d"}}\n</tool_call>'
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    status, answer = await post({"tools": tools}, say(text))
    assert (status, answer["stop_reason"]) == (200, "tool_use")
    assert [block["input"] for block in answer["content"]] == [{"a": "x\ufffd"}]
