"""Codex CLI's requests to `/v1/responses`."""

from __future__ import annotations

from typing import Any

from tests.agents.replays.base import PIXEL, TEXT, Replay, object_schema, render_call

CODEX = "codex 0.169.0"
PATCH = "*** Begin Patch\n*** Add File: a.txt\n+a\n*** End Patch\n"


def message(role: str, *texts: str, kind: str = "input_text") -> dict[str, Any]:
    """Return a message as Codex sends it."""
    content = [{"type": kind, "text": text} for text in texts]
    return {"type": "message", "id": f"msg_{role}", "role": role, "content": content}


def function(name: str, **properties: Any) -> dict[str, Any]:
    """Return a function as Codex offers it."""
    return {
        "type": "function",
        "name": name,
        "description": f"Do {name}.",
        "strict": False,
        "parameters": object_schema(**properties),
    }


SHELL = function(
    "exec_command",
    cmd=TEXT,
    prefix={"type": "array", "items": TEXT},
    how={"type": "string", "enum": ["a", "b"]},
)
AGENTS = {
    "type": "namespace",
    "name": "agents",
    "description": "Others.",
    "tools": [function("spawn", message=TEXT)],
}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" LF'}
APPLY_PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files with a patch.",
    "format": GRAMMAR,
}
FREE_TEXT = {"type": "custom", "name": "exec", "description": "Run JavaScript."}
SEARCH = {
    "type": "tool_search",
    "execution": "client",
    "description": "Find tools.",
    "parameters": object_schema(query=TEXT),
}
HOSTED = [
    {"type": "web_search", "external_web_access": True, "search_content_types": ["text", "image"]},
]
FIRST = [
    message("developer", "You are an agent.", "Be brief."),
    message("developer", "These skills are known."),
    message("user", "The folder is /tmp."),
    message("user", "Edit the file."),
]
SHELL_CALL = {
    "type": "function_call",
    "id": "fc_1",
    "status": "completed",
    "call_id": "call_1",
    "name": "exec_command",
    "arguments": '{"cmd": "ls"}',
}


def codex(items: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Return a body of `POST /v1/responses`."""
    return {
        "model": "toy/model",
        "stream": True,
        "input": items,
        "tools": [SHELL, AGENTS, SEARCH, *HOSTED],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
        "client_metadata": {"session_id": "0199"},
        **changes,
    }


IMAGE = {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "high"}
REPLAYS = [
    Replay(
        CODEX,
        "first",
        "/v1/responses",
        codex(FIRST),
        f"<think>\nhm\n</think>\n\nNow.\n{render_call('exec_command', cmd='ls')}",
        [("thoughts", "hm"), ("text", "Now."), ("call", "exec_command", '{"cmd": "ls"}')],
        in_prompt=[
            "You are an agent.",
            "Be brief.",
            "These skills are known.",
            "exec_command",
            "tool_search",
            "Edit the file.",
        ],
        not_in_prompt=["web_search"],
    ),
    Replay(
        CODEX,
        "results",
        "/v1/responses",
        codex(
            [
                *FIRST,
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "hm"}],
                    "encrypted_content": None,
                },
                {**message("assistant", "Now.", kind="output_text"), "status": "completed"},
                SHELL_CALL,
                {
                    **SHELL_CALL,
                    "call_id": "call_2",
                    "name": "spawn",
                    "namespace": "agents",
                    "arguments": "{}",
                },
                {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "a.txt"},
                {"type": "function_call_output", "id": "fco_2", "call_id": "call_2", "output": [IMAGE]},
                message("developer", "The mode has changed."),
            ]
        ),
        in_prompt=["You are an agent.", "Edit the file.", "a.txt", "[image omitted]"],
        not_in_prompt=[PIXEL],
    ),
    Replay(
        CODEX,
        "a custom tool",
        "/v1/responses",
        codex(
            FIRST,
            tools=[SHELL, APPLY_PATCH, SEARCH, *HOSTED],
            reasoning={"effort": "medium"},
            text={"verbosity": "low"},
        ),
        render_call("apply_patch", input=PATCH),
        [("custom", "apply_patch", PATCH)],
        in_prompt=["apply_patch", "Edit files with a patch.", '"input"'],
    ),
    Replay(
        CODEX,
        "a custom tool's result, and a schema for the answer",
        "/v1/responses",
        codex(
            [
                *FIRST,
                {
                    "type": "custom_tool_call",
                    "id": "ctc_1",
                    "status": "completed",
                    "call_id": "call_1",
                    "name": "apply_patch",
                    "input": PATCH,
                },
                {
                    "type": "custom_tool_call_output",
                    "id": "ctco_1",
                    "call_id": "call_1",
                    "output": "Updated a.txt",
                },
            ],
            tools=[SHELL, APPLY_PATCH, SEARCH, *HOSTED],
            service_tier="priority",
            reasoning={"effort": "high"},
            text={
                "verbosity": "low",
                "format": {
                    "type": "json_schema",
                    "strict": True,
                    "schema": object_schema(ok={"type": "boolean"}),
                    "name": "codex_output_schema",
                },
            },
        ),
        '{"ok": true}',
        [("text", '{"ok": true}')],
        in_prompt=["apply_patch", "+a\\n", "Updated a.txt"],
    ),
    Replay(
        CODEX,
        "tools as an item, for OpenAI's own model names",
        "/v1/responses",
        {
            name: value
            for name, value in codex(
                [
                    {
                        "type": "additional_tools",
                        "id": "at_1",
                        "role": "developer",
                        "tools": [{"type": "namespace", "name": "functions", "tools": [FREE_TEXT, SHELL]}],
                    },
                    *FIRST,
                ],
                parallel_tool_calls=False,
                reasoning={"effort": "low", "context": "all_turns"},
            ).items()
            if name != "tools"
        },
        in_prompt=["You are an agent.", "Edit the file."],
    ),
]
