"""What is left of a request that meets a bug of this server: no generation, no permit, no second answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.asgi import events_of, request, send
from tests.support.scripted_engine import (
    ScriptedChannel,
    ScriptedEngine,
    give_vector,
    say,
    scripted_app,
    toy_info,
)
from tests.support.waiting import until
from tgi_asgi.api import life
from tgi_asgi.api.openai.render import CompletionRenderer
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.model_info import Embedding
from tgi_asgi.types import Pooling, PoolingKind

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("stream", [True, False])
async def test_what_was_submitted_ends_if_its_delivery_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(life, "KeptAnswer", broken)
    engine = ScriptedEngine(say("a", finish=None))
    call = await send(scripted_app(engine), request("POST", "/v1/chat/completions", {**HI, "stream": stream}))
    assert call.status == 500
    assert [channel.is_cancelled for channel in engine.channels] == [True]
    assert engine.num_permits == 128


@pytest.mark.parametrize("error", [InvalidRequest("no"), ZeroDivisionError()])
async def test_an_answer_that_has_begun_is_not_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    engine = ScriptedEngine(say("a", finish=None))
    call = request("POST", "/v1/chat/completions", {**HI, "stream": True})

    def broken(*args: object) -> bytes:
        raise error

    async def send_one(message: Any) -> None:
        await call.send(message)
        if message["type"] == "http.response.body":
            monkeypatch.setattr(CompletionRenderer, "render", broken)

    with pytest.raises(type(error)):
        async with asyncio.timeout(10):
            await scripted_app(engine)(call.scope, call.receive, send_one)
    assert [message["type"] for message in call.sent] == ["http.response.start", "http.response.body"]
    assert "error" not in events_of(call.content)[0] and not call.is_complete
    assert engine.num_permits == 128
    assert "POST /v1/chat/completions failed" in caplog.text


async def test_an_input_that_cannot_be_submitted_gives_its_permit_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = ScriptedEngine(give_vector(0.5))
    submit = engine.submit

    def submit_one(*args: Any) -> ScriptedChannel:
        if engine.channels:
            raise ZeroDivisionError
        return submit(*args)

    monkeypatch.setattr(engine, "submit", submit_one)
    how = Embedding(Pooling(PoolingKind.MEAN), 1, 30)
    app = scripted_app(engine, info=toy_info(generates=False, embedding=how))
    call = await send(app, request("POST", "/v1/embeddings", {"input": ["a", "b"]}))
    assert call.status == 500
    await until(lambda: engine.num_permits == 128)
