"""`/api`: random requests get whole lines of JSON or a refusal, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.test_fuzz import ANYTHING, SCALARS, bodies
from tests.support.fuzzing import post_and_check
from tests.support.scripted_engine import CHATML, ScriptedEngine, say
from tests.support.tool_app import app_of
from tgi_asgi.api.ollama.request import OllamaChat, OllamaGenerate, OllamaOptions

TEXT = st.text(max_size=5)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"])},
    optional={
        "content": TEXT | SCALARS, "thinking": TEXT | SCALARS, "images": ANYTHING, "tool_name": TEXT,
        "tool_call_id": TEXT | SCALARS,
        "tool_calls": ANYTHING | st.lists(st.fixed_dictionaries(
            {"function": st.fixed_dictionaries({"name": TEXT, "arguments": ANYTHING})}, optional={"id": TEXT},
        ), max_size=2),
    },
)  # fmt: skip
OPTIONS: st.SearchStrategy[Any] = st.fixed_dictionaries({"options": bodies(OllamaOptions, {})}) | st.just({})
CHATS = bodies(OllamaChat, {"messages": st.lists(TURNS, max_size=3) | ANYTHING})
PROMPTS = bodies(OllamaGenerate, {"prompt": TEXT | ANYTHING})


@settings(max_examples=150)
@given(
    st.builds(lambda body, more: {**body, **more}, CHATS | PROMPTS, OPTIONS), st.sampled_from([CHATML, None])
)
def test_random_requests(body: dict[str, Any], template: str | None) -> None:
    async def send() -> None:
        engine = ScriptedEngine(say("Hel", "<tool_call>", '\n{"name": "f", "arg', 'uments": {', b"\xf0\x9f"))
        path = "/api/generate" if "prompt" in body else "/api/chat"
        answer = await post_and_check(app_of(engine, chat_template=template), engine, path, body)
        lines = [json.loads(line) for line in answer.content.removesuffix(b"\n").split(b"\n")]
        assert ("error" in lines[-1]) == (answer.status >= 400)
        assert "error" in lines[-1] or [line["done"] for line in lines] == [*[False] * (len(lines) - 1), True]

    asyncio.run(send())


@settings(max_examples=50)
@given(st.sampled_from(["chat", "generate", "show"]), st.binary(max_size=60) | ANYTHING)
def test_random_bodies(path: str, body: Any) -> None:
    engine = ScriptedEngine()
    asyncio.run(post_and_check(app_of(engine), engine, f"/api/{path}", body))
