"""The three characters that end a line for `str.splitlines` and that JSON may contain as they are.

Clients that split a stream's lines by httpx's `iter_lines` would break an event there.
"""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest
from huggingface_hub import AsyncInferenceClient

from tests.support.asgi import Call, request, send
from tests.support.scripted_engine import CHATML, Script, ScriptedEngine, fail_with, say
from tests.support.serving import serving
from tests.support.tool_app import app_of
from tgi_asgi.api.sse import DIRECT_WRITE
from tgi_asgi.app import App
from tgi_asgi.errors import GenerationFailed
from tgi_asgi.settings import Settings

TOKENS = ("a\u2028", "b", "\u2029", "\u2027\u202a", "c\u0085", "\u0084\u0086", "é", "\\\u2028", "d")
TEXT = "".join(TOKENS)
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "name": "f", "description": TEXT, "parameters": {"description": TEXT}}
STREAMS: dict[str, dict[str, Any]] = {
    "/generate_stream": {"inputs": "hi"},
    "/v1/chat/completions": {"messages": HI, "model": TEXT},
    "/v1/completions": {"prompt": TEXT, "echo": True, "logprobs": 2},
    "/v1/responses": {"input": "hi", "tools": [TOOL]},
    "/v1/messages": {"messages": HI, "max_tokens": 20},
    "/api/chat": {"messages": HI, "logprobs": True},
    "/api/generate": {"prompt": "hi"},
}


def scripted(script: Script | None = None) -> App:
    return app_of(ScriptedEngine(script or say(*TOKENS)), Settings(), chat_template=CHATML)


def lines_of(call: Call) -> list[Any]:
    """Return what a client reads that splits the stream wherever Python sees the end of a line."""
    lines = [line for line in call.content.decode().splitlines() if line and not line.startswith("event: ")]
    data = [line.removeprefix("data: ") for line in lines]
    return [json.loads(line) for line in data if line != "[DONE]"]


def strings(value: Any) -> str:
    """Return all strings in a JSON value, joined."""
    if isinstance(value, dict | list):
        return "".join(map(strings, value.values() if isinstance(value, dict) else value))
    return value if isinstance(value, str) else ""


async def streamed(path: str, script: Script | None = None, *, writes_directly: bool = False) -> Call:
    fields = STREAMS[path] if path == "/generate_stream" else {**STREAMS[path], "stream": True}
    call = request("POST", path, fields)

    def write(frames: bytes) -> bool:
        call.sent.append({"type": "http.response.body", "body": frames, "more_body": True})
        return True

    if writes_directly:
        call.scope["extensions"] = {DIRECT_WRITE: write}
    return await send(scripted(script), call)


@pytest.mark.parametrize("writes_directly", [False, True])
@pytest.mark.parametrize("path", STREAMS)
async def test_no_line_of_a_stream_ends_inside_an_event(path: str, writes_directly: bool) -> None:
    call = await streamed(path, writes_directly=writes_directly)
    assert call.status == 200
    told = strings(lines_of(call))
    # All characters arrive, and those beside them in Unicode as they are.
    assert all(character in told for character in TEXT)
    assert "\u2027\u202a".encode() in call.content and "\u0084\u0086".encode() in call.content


@pytest.mark.parametrize("path", STREAMS)
async def test_nor_does_that_of_an_error(path: str) -> None:
    call = await streamed(path, fail_with(GenerationFailed(TEXT), after=say("a")))
    assert call.status == 200
    assert TEXT in strings(lines_of(call)[-1])


@pytest.mark.parametrize("server", ["native", "hypercorn"])
async def test_clients_that_split_lines_read_the_text(server: str) -> None:
    async with serving(scripted(), server) as url, ollama.AsyncClient(url) as client:
        chat = [line.message.content or "" async for line in await client.chat("m", HI, stream=True)]
        generated = [line.response async for line in await client.generate("m", "hi", stream=True)]
        async with AsyncInferenceClient(url) as hub:
            native = [text async for text in await hub.text_generation("Hi", stream=True)]
            chunks = [chunk async for chunk in await hub.chat_completion(HI, stream=True)]
    assert "".join(chat) == "".join(generated) == TEXT
    assert "".join(native) == TEXT + "</s>"  # TGI's events have special tokens, too
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
