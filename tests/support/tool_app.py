"""The app with a scripted engine and room for the prompt of two tools, and OpenAI's client of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import openai

from tests.support.client import client_of
from tests.support.scripted_engine import CHATML, Script, ScriptedEngine, scripted_app, toy_info
from tests.support.serving import serving
from tgi_asgi.app import App
from tgi_asgi.settings import Settings

HI: list[Any] = [{"role": "user", "content": "hi"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
CALLS = [
    "Let", " me", " see", ".\n", "<tool", "_call>", '\n{"na', 'me": "weather", "argu', 'ments": {"ci',
    'ty": "Pa', 'ris"}', "}\n</tool_call>",
    "\n<tool_call>\n", '{"name": "now", "arguments": {}}', "\n</tool_call>",
]  # fmt: skip
THINKING = CHATML + "{# <think> </think> #}"


def app_of(engine: ScriptedEngine, settings: Settings | None = None, **options: Any) -> App:
    """Return an app whose context is long enough for the tools' prompt."""
    info = toy_info(max_input_tokens=4095, max_total_tokens=4096)
    return scripted_app(engine, settings, info=info, **options)


async def chat(
    script: Script, *, template: str = CHATML, settings: Any = None, **body: Any
) -> dict[str, Any]:
    """Return the answer to a chat, whole."""
    app = app_of(ScriptedEngine(script), Settings(**(settings or {})), chat_template=template)
    async with client_of(app) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": HI, **body})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


async def deltas(script: Script, **body: Any) -> list[dict[str, Any]]:
    """Return the deltas of a stream's first choice."""
    settings, template = body.pop("settings", {}), body.pop("template", CHATML)
    app = app_of(ScriptedEngine(script), Settings(**settings), chat_template=template)
    async with client_of(app) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": HI, "stream": True, **body})
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return [choice for event in events for choice in json.loads(event)["choices"] if choice["index"] == 0]


def sdk(script: Script, **options: Any) -> AbstractAsyncContextManager[openai.AsyncOpenAI]:
    """Return OpenAI's client of an app with this script."""
    return sdk_of(app_of(ScriptedEngine(script), **options))


@asynccontextmanager
async def sdk_of(app: App, key: str = "-") -> AsyncIterator[openai.AsyncOpenAI]:
    """Serve an app, and yield OpenAI's client of it, which does not retry."""
    async with (
        serving(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
    ):
        yield client


def pieces_of(text: str, size: int = 5) -> list[str]:
    """Return a text in pieces of this many characters."""
    return [text[at : at + size] for at in range(0, len(text), size)]
