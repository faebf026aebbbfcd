"""Agents' recorded requests are answered as the agents need; test_agents.py runs the real agents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.agents.player import TEMPLATE
from tests.agents.replays import chats, claude, codex
from tests.agents.replays.base import Item, Replay
from tests.support.client import client_of
from tests.support.scripted_engine import ScriptedEngine, say, scripted_app, toy_info

CONTEXT = 16_384  # less than the 32,000 tokens that Claude Code asks for


async def post(replay: Replay) -> tuple[str, str]:
    """Send a request; return the prompt that it makes, and its answer."""
    engine = ScriptedEngine(say(*(bytes([byte]) for byte in replay.answer.encode())))
    info = toy_info(max_input_tokens=CONTEXT - 1, max_total_tokens=CONTEXT)
    async with client_of(scripted_app(engine, info=info, chat_template=TEMPLATE)) as client:
        answer = await client.post(replay.path, json=replay.body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    (request,) = engine.requests
    return engine.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False), answer.text


def events_of(stream: str) -> list[dict[str, Any]]:
    """Return a stream's events."""
    lines = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def codex_reads(events: list[dict[str, Any]]) -> list[Item]:
    """Read a response as Codex does: its finished items, and that it has completed.

    Check that each item's deltas agree with the finished item.
    """
    assert events[-1]["type"] == "response.completed"
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == items and events[-1]["response"]["usage"]["total_tokens"] > 0
    read: list[Item] = []
    for item in items:
        own = [e for e in events if e.get("item_id") == item["id"] and "summary_index" not in e]
        grown = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        match item["type"]:
            case "message":
                read.append(("text", item["content"][0]["text"]))
            case "reasoning":
                read.append(("thoughts", item["content"][0]["text"]))
            case "function_call":
                read.append(("call", item["name"], item["arguments"]))
            case "custom_tool_call":
                read.append(("custom", item["name"], item["input"]))
                assert item["call_id"] and "arguments" not in item
                (done,) = [event for event in own if event["type"] == "response.custom_tool_call_input.done"]
                assert done["input"] == item["input"]
        assert grown == read[-1][-1]
    return read


def claude_reads(events: list[dict[str, Any]]) -> list[Item]:
    """Read a message as Anthropic's SDK does: from its blocks' starts and deltas."""
    read: list[list[str]] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                block = event["content_block"]
                kinds = {"text": ["text"], "thinking": ["thoughts"], "tool_use": ["call", block.get("name")]}
                assert event["index"] == len(read)
                read.append([*kinds[block["type"]], ""])
            case "content_block_delta":
                delta = event["delta"]
                grown = [delta.get(name, "") for name in ("text", "thinking", "partial_json")]
                read[event["index"]][-1] += "".join(grown)
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    has_calls = any(kind == "call" for kind, *_ in read)
    assert events[-2]["delta"]["stop_reason"] == ("tool_use" if has_calls else "end_turn")
    return [tuple(item) for item in read]


def chat_reads(events: list[dict[str, Any]]) -> list[Item]:
    """Read a chat as OpenAI's SDK does: from its deltas."""
    text = ""
    calls: dict[int, list[str]] = {}
    for choice in [choice for event in events for choice in event["choices"]]:
        text += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls") or ():
            known = calls.setdefault(part["index"], ["call", part["function"].get("name"), ""])
            known[-1] += part["function"].get("arguments") or ""
    return [*([("text", text)] if text else []), *map(tuple, calls.values())]


READERS = {"responses": codex_reads, "messages": claude_reads, "completions": chat_reads}


@pytest.mark.parametrize(
    "replay",
    [*codex.REPLAYS, *claude.REPLAYS, *chats.REPLAYS],
    ids=lambda replay: f"{replay.client}: {replay.description}",
)
async def test_a_request_is_answered(replay: Replay) -> None:
    prompt, stream = await post(replay)
    read = READERS[replay.path.partition("?")[0].rpartition("/")[2]](events_of(stream))
    assert [(*item[:-1], item[-1].strip()) for item in read] == [
        (*item[:-1], item[-1].strip()) for item in replay.expected_items
    ]
    at = 0
    for seen in replay.in_prompt:
        at = prompt.find(seen, at)
        assert at >= 0, f"{seen!r} is missing from the prompt or out of order: {prompt}"
    assert not [missed for missed in replay.not_in_prompt if missed in prompt]


@pytest.mark.parametrize("replay", [codex.REPLAYS[1], claude.REPLAYS[1]], ids=lambda replay: replay.client)
async def test_a_system_message_that_comes_late_is_read(replay: Replay) -> None:
    prompt, _ = await post(replay)
    assert prompt.count("The mode has changed.") == 1


@pytest.mark.parametrize("replay", claude.REPLAYS, ids=lambda replay: replay.description)
async def test_a_request_is_counted(replay: Replay) -> None:
    info = toy_info(max_input_tokens=CONTEXT - 1, max_total_tokens=CONTEXT)
    names = ("model", "system", "messages", "tools", "tool_choice", "thinking")
    body = {name: replay.body[name] for name in names if name in replay.body}
    prompt, _ = await post(replay)
    async with client_of(scripted_app(ScriptedEngine(), info=info, chat_template=TEMPLATE)) as client:
        answer = await client.post("/v1/messages/count_tokens?beta=true", json=body)
    assert answer.status_code == 200, answer.text
    tokens = prompt.replace("<|im_start|>", "1").replace("<|im_end|>", "1")
    assert answer.json() == {"input_tokens": len(tokens.encode())}


async def test_claude_code_is_told_that_a_prompt_is_too_long_so_that_it_summarises() -> None:
    body = claude.REPLAYS[0].body
    app = scripted_app(ScriptedEngine(), info=toy_info(), chat_template=TEMPLATE)
    async with client_of(app) as client:
        answer = await client.post("/v1/messages", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith("prompt is too long: ") and error["message"].endswith(
        " tokens > 511 maximum"
    )


async def test_codex_is_told_that_a_prompt_is_too_long_so_that_it_does_not_try_again() -> None:
    app = scripted_app(ScriptedEngine(), info=toy_info(), chat_template=TEMPLATE)
    async with client_of(app) as client:
        answer = await client.post("/v1/responses", json=codex.REPLAYS[0].body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
