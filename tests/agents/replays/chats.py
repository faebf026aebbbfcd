"""Requests of clients that use `/v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from tests.agents.replays.base import TEXT, WHOLE, Replay, object_schema, render_call

OPENCODE = "opencode 1.18.33"
AIDER = "aider 0.86.2"
LLAMA_INDEX = "llama-index-llms-openai-like 0.8.1"
AI_SDK = "ai 7.0.173, @ai-sdk/openai-compatible 3.0.92"

CHAT = "/v1/chat/completions"


def chat_tool(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a function tool in the format of chat completions."""
    return {"type": "function", "function": {"name": name, "parameters": object_schema(**properties), **more}}


def message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    """Return a message of a chat."""
    return {"role": role, "content": content, **more}


def called(name: str, arguments: str) -> dict[str, Any]:
    """Return the part of an assistant's message that calls a function."""
    return {
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
        ]
    }


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
EDIT = chat_tool(
    "edit",
    {"path": TEXT, "at": {"type": "integer", "exclusiveMinimum": 0, "maximum": WHOLE}},
    description="Edit.",
)
ADD = chat_tool("add", {"a": {"title": "A", "type": "integer"}}, strict=False)
BRIEF = message("system", "Be brief.")
ASK = message("user", "Edit the file.")
REPLAYS = [
    Replay(
        OPENCODE,
        "a title",
        CHAT,
        {
            "model": "toy",
            "max_tokens": 8192,
            "messages": [BRIEF, message("user", "A title for:"), ASK],
            **STREAMED,
        },
    ),
    Replay(
        OPENCODE,
        "a result",
        CHAT,
        {
            "model": "toy",
            "max_tokens": 8192,
            "messages": [
                BRIEF,
                ASK,
                message("assistant", "", **called("edit", '{"path": "/a", "at": 1}')),
                message("tool", "Edited.", tool_call_id="call_1"),
            ],
            "tools": [EDIT],
            "tool_choice": "auto",
            **STREAMED,
        },
        render_call("edit", path="/b", at=2),
        [("call", "edit", '{"path": "/b", "at": 2}')],
        in_prompt=["Be brief.", "Edit the file.", "Edited."],
    ),
    Replay(
        AIDER,
        "examples and the question",
        CHAT,
        {
            "model": "toy/model",
            "messages": [BRIEF, ASK, message("assistant", "Ok."), ASK],
            "temperature": 0,
            "stream": True,
        },
    ),
    Replay(
        LLAMA_INDEX,
        "an agent",
        CHAT,
        {
            "model": "toy/model",
            "messages": [
                BRIEF,
                ASK,
                message("assistant", None, **called("add", '{"a": 1}')),
                message("tool", "3", tool_call_id="call_1"),
            ],
            "temperature": 0.1,
            "stream": True,
            "tools": [ADD],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
        },
    ),
    Replay(
        AI_SDK,
        "a tool that must be called",
        CHAT,
        {"model": "toy/model", "messages": [ASK], "tools": [EDIT], "tool_choice": "required", **STREAMED},
        render_call("edit", path="/b", at=2),
        [("call", "edit", '{"path": "/b", "at": 2}')],
    ),
    Replay(
        AI_SDK,
        "an object",
        CHAT,
        {
            "model": "toy/model",
            "messages": [ASK],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "schema": object_schema(ok={"type": "boolean"}),
                    "strict": True,
                    "name": "response",
                },
            },
            **STREAMED,
        },
        '{"ok": true}',
        [("text", '{"ok": true}')],
    ),
]
