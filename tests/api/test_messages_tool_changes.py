"""Tools of `/v1/messages` that a conversation adds and removes, and hosted ones, which are skipped."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.test_messages import HI, TOOLS, sdk
from tests.support.scripted_engine import say

LATER: dict[str, Any] = {"name": "later", "input_schema": {"type": "object", "properties": {}}}
CALL_LATER = '<tool_call>\n{"name": "later", "arguments": {}}\n</tool_call>'


def changes(kind: str, **tool: Any) -> dict[str, Any]:
    """Return a system turn that changes the tools, as Anthropic's tool runner sends it."""
    return {"role": "system", "content": [{"type": kind, "tool": tool}]}


@pytest.mark.parametrize(
    ("tools", "turns", "is_offered"),
    [
        (TOOLS, [], False),
        (TOOLS, [changes("tool_addition", type="tool_definition", definition=LATER)], True),
        ([], [changes("tool_addition", type="tool_definition", definition=LATER)], True),
        ([*TOOLS, LATER], [changes("tool_removal", type="tool_reference", name="later")], False),
        (
            [*TOOLS, {**LATER, "defer_loading": True}],
            [
                changes(f"tool_{what}", type="tool_reference", name="later")
                for what in ("removal", "addition")
            ],
            True,
        ),
        (TOOLS, [changes("tool_addition", type="mcp_toolset_reference", server_name="later")], False),
        # Hosted tools, of which toolsets have no name.
        (
            TOOLS,
            [
                changes(
                    "tool_addition",
                    type="tool_definition",
                    definition={"type": "web_search_20260318", "name": "later"},
                )
            ],
            False,
        ),
        (
            TOOLS,
            [
                changes(
                    "tool_addition", type="tool_definition", definition={"type": "browser_toolset_20260801"}
                )
            ],
            False,
        ),
    ],
)
async def test_a_conversation_adds_and_removes_tools(
    tools: list[Any], turns: list[Any], is_offered: bool
) -> None:
    async with sdk(say(CALL_LATER)) as client:
        body: dict[str, Any] = {"model": "m", "messages": [*HI, *turns], "tools": tools}
        message = await client.messages.create(**body, max_tokens=50)
        counted = await client.messages.count_tokens(**body)
    assert [block.type for block in message.content] == (["tool_use"] if is_offered else ["text"])
    assert counted.input_tokens == message.usage.input_tokens


async def test_toolsets_without_a_name_are_skipped_as_other_hosted_tools_are() -> None:
    tools: list[Any] = [{"type": "mcp_toolset", "mcp_server_name": "x"}, LATER]
    async with sdk(say(CALL_LATER)) as client:
        message = await client.messages.create(model="m", messages=HI, tools=tools, max_tokens=50)
    assert [block.type for block in message.content] == ["tool_use"]


async def test_a_choice_of_a_hosted_tool_counts_as_absent() -> None:
    tools: list[Any] = [{"type": "web_search_20250305", "name": "web_search"}, LATER]
    async with sdk(say(CALL_LATER)) as client:
        message = await client.messages.create(
            model="m", messages=HI, tools=tools, tool_choice={"type": "tool", "name": "web_search"},
            max_tokens=50,
        )  # fmt: skip
    assert [block.type for block in message.content] == ["tool_use"]
