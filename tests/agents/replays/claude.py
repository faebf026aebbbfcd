"""Claude Code's requests to `/v1/messages`."""

from __future__ import annotations

from typing import Any

from tests.agents.replays.base import PIXEL, TEXT, WHOLE, Replay, object_schema, render_call

CLAUDE = "claude-code 2.1.329"
LONG_NAME = "mcp__a_server_with_quite_a_long_name__and_a_tool_whose_name_is_long_as_well"  # 76 characters

CACHED = {"cache_control": {"type": "ephemeral"}}
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def tool(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a tool as Claude Code offers it."""
    schema = {"$schema": DRAFT, **object_schema(**properties), "required": list(properties)[:1]}
    return {"name": name, "description": f"Do {name}.", "input_schema": schema, **more}


READ = tool(
    "Read",
    {
        "file_path": {**TEXT, "maxLength": 256, "pattern": "^/"},
        "offset": {"type": "integer", "minimum": -WHOLE, "maximum": WHOLE},
        "limit": {"type": "integer", "exclusiveMinimum": 0, "maximum": WHOLE},
        "all": {"type": "boolean", "default": False},
        "found": {
            "type": "array",
            "maxItems": 32,
            "items": {"type": "object", "properties": {}, "additionalProperties": {}},
        },
    },
)
PLACEHOLDER = {
    "name": "DeferredToolPlaceholder",
    "description": "Never call this.",
    "input_schema": {"type": "object", "properties": {}},
    "defer_loading": True,
}
WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}


def text(content: str, **more: Any) -> dict[str, Any]:
    """Return a text block."""
    return {"type": "text", "text": content, **more}


ASKED = {"role": "user", "content": [text("The branch is main."), text("Edit the file.")]}
BILLING = "x-anthropic-billing-header: cc_version=2.1.329.582;"  # its end differs between conversations
SYSTEM = [text(BILLING), text("You are an agent.", **CACHED), text("Be brief.", **CACHED)]
LATER = {"role": "system", "content": [text("The folder is /tmp.", **CACHED)]}


def claude(messages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return a body of `POST /v1/messages`; its max_tokens exceeds the tests' context."""
    return {
        "model": "toy/model",
        "system": SYSTEM,
        "messages": messages,
        "tools": [READ, tool(LONG_NAME, {"url": {**TEXT, "format": "uri"}}, defer_loading=True), PLACEHOLDER],
        "metadata": {"user_id": '{"device_id": "54cc", "session_id": "054f"}'},
        "max_tokens": 32_000,
        "thinking": {"type": "adaptive", "display": "updates"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
        **changes,
    }


def result(number: int, content: Any, **more: Any) -> dict[str, Any]:
    """Return a block with a tool's result."""
    return {"tool_use_id": f"toolu_{number}", "type": "tool_result", "content": content, **more}


def use(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    """Return a block with a tool call."""
    return {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": arguments}


BETA = "/v1/messages?beta=true"
SHOWN = {"type": "image", "source": {"type": "base64", "data": PIXEL, "media_type": "image/png"}}
REPLAYS = [
    Replay(
        CLAUDE,
        "first",
        BETA,
        claude([ASKED, LATER]),
        f"<think>\nhm\n</think>\n\nNow.\n{render_call('Read', file_path='/a')}",
        [("thoughts", "hm"), ("text", "Now."), ("call", "Read", '{"file_path": "/a"}')],
        in_prompt=["You are an agent.", "Be brief.", "The folder is /tmp.", LONG_NAME, "Edit the file."],
        not_in_prompt=["x-anthropic-billing-header"],
    ),
    Replay(
        CLAUDE,
        "results",
        BETA,
        claude(
            [
                ASKED,
                {"role": "system", "content": "The folder is /tmp."},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        text("Now."),
                        use(1, "Read", file_path="/a.png"),
                        use(2, "ToolSearch", query="select:Fetch"),
                        use(3, "Nope") | CACHED,
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        result(2, [{"type": "tool_reference", "tool_name": "Fetch"}]),
                        result(3, "No such tool", is_error=True),
                        result(1, [SHOWN], **CACHED),
                        text("Go on."),
                    ],
                },
                {"role": "system", "content": "The mode has changed."},
            ]
        ),
        in_prompt=[
            "The folder is /tmp.",
            "[image omitted]",  # the results in the order of their calls
            "[tool: Fetch]",
            "No such tool",
            "Go on.",
        ],
        not_in_prompt=[PIXEL],
    ),
    Replay(
        CLAUDE,
        "a hosted tool",
        BETA,
        claude([ASKED], tools=[WEB_SEARCH], tool_choice={"type": "auto"}),
        not_in_prompt=["web_search"],
    ),
    Replay(
        CLAUDE,
        "a hosted tool that must be called, for Anthropic's own model names",
        BETA,
        claude(
            [ASKED],
            tools=[WEB_SEARCH],
            tool_choice={"type": "tool", "name": "web_search"},
            thinking={"type": "disabled"},
            temperature=1,
        ),
        not_in_prompt=["web_search"],
    ),
    Replay(
        CLAUDE,
        "a budget for thoughts, for Anthropic's own model names",
        BETA,
        claude([ASKED], thinking={"budget_tokens": 31_999, "type": "enabled", "display": "updates"}),
    ),
]
