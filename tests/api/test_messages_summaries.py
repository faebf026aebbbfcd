"""Summaries in the histories of `/v1/messages`: what the model is shown of a conversation that has one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say
from tests.support.tool_app import app_of

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
FAILED: dict[str, Any] = {"type": "compaction", "content": None}
SUMMARY = {"type": "compaction", "content": "They ask about Mars.", "signature": "s"}
EARLIER = {"type": "compaction", "content": "They greeted.", "signature": "s"}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


USER = turn("user", "And Venus?")


async def prompt_of(messages: list[dict[str, Any]]) -> str:
    """Return the prompt of a request for a message, after a check that one for its tokens counts the same."""
    engine = ScriptedEngine(say("a"))
    async with client_of(app_of(engine, chat_template=TEMPLATE)) as client:
        answer = await client.post("/v1/messages", json={"messages": messages, "max_tokens": 5})
        counted = await client.post("/v1/messages/count_tokens", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    [request] = engine.requests
    assert counted.json() == {"input_tokens": len(request.prompt_ids)}
    return engine.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        # First, in place of what it summarises.
        ([turn("assistant", [SUMMARY]), USER], "user: They ask about Mars.\nAnd Venus?;"),
        # Where the server made it, in an answer.
        (
            [turn("user", "Hi"), turn("assistant", [SUMMARY, text("Red.")]), USER],
            "user: They ask about Mars.;assistant: Red.;user: And Venus?;",
        ),
        # The last one counts, and an answer may wait for it.
        (
            [turn("assistant", [EARLIER]), turn("user", "Mars?"), turn("assistant", [SUMMARY])],
            "user: They ask about Mars.;",
        ),
        # One that failed replaces nothing.
        (
            [turn("user", "Hi"), turn("assistant", [FAILED]), turn("assistant", [FAILED, text("Ho")]), USER],
            "user: Hi;assistant: Ho;user: And Venus?;",
        ),
    ],
)
async def test_a_summary_replaces_what_came_before_it(messages: list[dict[str, Any]], shown: str) -> None:
    assert await prompt_of(messages) == shown


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        (
            [turn("assistant", [text("a"), {"type": "compaction", "content": 5}])],
            "messages[0].content[1].content",
        ),
        ([USER, turn("user", [SUMMARY])], "messages[1].content[0].type"),
    ],
)
async def test_what_is_no_summary_is_refused_by_its_path(messages: list[dict[str, Any]], path: str) -> None:
    async with client_of(app_of(ScriptedEngine(say("a")))) as client:
        answer = await client.post("/v1/messages", json={"messages": messages, "max_tokens": 5})
    assert answer.status_code == 400 and path in answer.json()["error"]["message"]
