"""Summaries in the histories of `/v1/messages`: what the model is shown of a conversation that has one."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.support.client import client_of
from tests.support.scripted_engine import Script, ScriptedEngine, say
from tests.support.serving import serving
from tests.support.tool_app import app_of
from tgi_asgi.api import summary

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


def asked(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(list(engine.requests[-1].prompt_ids), skip_special_tokens=False)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_request_for_a_summary_gets_it_as_its_only_block(is_stream: bool) -> None:
    engine = ScriptedEngine(say("<think>", "hm", "</think>", "They ", "met."))
    options: dict[str, Any] = {
        "model": "m", "max_tokens": 50, "messages": [turn("user", "Hi"), turn("assistant", "Ho")],
        "compaction": {"type": "summarize"}, "tools": [{"name": "t", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any"}, "stop_sequences": ["met"],
    }  # fmt: skip
    app = app_of(engine, chat_template=f"{TEMPLATE}{{# <think> </think> #}}")
    async with (
        serving(app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client,
    ):
        if is_stream:
            async with client.beta.messages.stream(**options) as stream:
                message = await stream.get_final_message()
        else:
            message = await client.beta.messages.create(**options)
        block: dict[str, Any] = message.content[0].to_dict()
        assert len(message.content) == 1
        assert (block["type"], block["content"]) == ("compaction", "They met.")
        assert message.stop_reason == "compaction"
        assert engine.requests[0].stop.stop == ()
        assert asked(engine).endswith(f"assistant: Ho;user: {summary.asking()['content']};")
        # The next request has the block in place of the messages.
        options = {**options, "messages": [turn("assistant", [block]), USER]}
        del options["compaction"], options["tools"], options["tool_choice"], options["stop_sequences"]
        await client.beta.messages.create(**options)
    assert asked(engine) == "user: They met.\nAnd Venus?;"


@pytest.mark.parametrize(("given", "is_own"), [("Sum up.", True), (" ", False), (None, False)])
async def test_the_client_may_say_how_to_summarise(given: str | None, is_own: bool) -> None:
    engine = ScriptedEngine(say("a"))
    body = {"messages": [USER], "max_tokens": 5, "compaction": {"type": "summarize", "instructions": given}}
    async with client_of(app_of(engine, chat_template=TEMPLATE)) as client:
        assert (await client.post("/v1/messages", json=body)).status_code == 200
    assert ("Sum up." in asked(engine)) == is_own != (str(summary.asking()["content"]) in asked(engine))


@pytest.mark.parametrize(
    ("script", "limit", "reason"),
    [(say("They ", "met ", "again."), 2, "max_tokens"), (say(" ", "\n"), 50, "compaction")],
)
async def test_a_summary_without_an_end_or_text_has_no_content(
    script: Script, limit: int, reason: str
) -> None:
    body = {"messages": [USER], "max_tokens": limit, "compaction": {"type": "summarize"}}
    async with client_of(app_of(ScriptedEngine(script))) as client:
        answer = (await client.post("/v1/messages", json=body)).json()
    assert answer["content"] == [{"type": "compaction", "content": None}]
    assert answer["stop_reason"] == reason


async def test_only_summaries_are_made() -> None:
    body = {"messages": [USER], "max_tokens": 5, "compaction": {"type": "erase"}}
    async with client_of(app_of(ScriptedEngine(say("a")))) as client:
        answer = await client.post("/v1/messages", json=body)
    assert answer.status_code == 400 and "compaction.type" in answer.json()["error"]["message"]
