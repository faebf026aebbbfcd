"""Comments that a stream sends until its first token, and the task that sends them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.api.test_sse import Steps, token
from tests.support.asgi import App, Call, Message, events_of, request, send
from tests.support.fake_runner import FakeRunner
from tests.support.scripted_engine import ScriptedEngine, scripted_app, toy_info
from tests.support.serving import serving
from tests.support.toy_tokenizer import ToyTokenizer
from tests.support.waiting import LONGEST_S
from tgi_asgi.api import sse
from tgi_asgi.api.served import Served
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import GenerationFailed
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, FinishReason

HI = [{"role": "user", "content": "hi"}]
COMMENT = b":\n\n"
SHORT_FIRST_EVENT_TIMEOUT = Settings(first_event_timeout_s=0.001)
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "stream": True},
    "/v1/completions": {"prompt": "hi", "stream": True},
    "/v1/responses": {"input": "hi", "stream": True},
    "/v1/messages": {"messages": HI, "max_tokens": 9, "stream": True},
    "/generate_stream": {"inputs": "hi"},
    "/": {"inputs": "hi", "stream": True},
    "/invocations": {"messages": HI, "stream": True},
}


@asynccontextmanager
async def waiting(
    path: str, steps: Steps, settings: Settings = SHORT_FIRST_EVENT_TIMEOUT, **fields: Any
) -> AsyncIterator[tuple[Call, ScriptedEngine]]:
    """Run a stream that receives the events from `steps`; check at the end that it is complete."""
    engine = ScriptedEngine(steps.script)
    call = request("POST", path, STREAMS.get(path, {}) | fields)
    task = asyncio.create_task(send(scripted_app(engine, settings), call))
    async with asyncio.timeout(LONGEST_S):
        while not engine.channels and not task.done():
            await asyncio.sleep(0.001)
    yield call, engine
    await task
    assert call.is_complete
    assert engine.num_permits == 128


async def bodies(call: Call, num: int) -> list[bytes]:
    """Wait for `num` parts of a response's body."""
    async with asyncio.timeout(LONGEST_S):
        while len(call.sent) <= num:
            call.got_frame.clear()
            await call.got_frame.wait()
    return [message["body"] for message in call.sent[1:]]


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_without_a_token_yet_begins_with_a_comment(path: str, steps: Steps) -> None:
    async with waiting(path, steps) as (call, _):
        assert await bodies(call, 1) == [COMMENT]
        assert call.status == 200
        assert call.headers["content-type"].startswith("text/event-stream")
        assert "x-request-id" in call.headers and "content-length" not in call.headers
        await steps.deliver(token("a", FinishReason.EOS))
    rest = call.content.removeprefix(COMMENT)
    assert b'"a"' in rest and b"error" not in rest.replace(b'"error":null', b"")


async def test_what_follows_a_comment_is_the_stream_as_ever(steps: Steps) -> None:
    streams = []
    for settings in (SHORT_FIRST_EVENT_TIMEOUT, Settings()):
        async with waiting("/v1/chat/completions", steps, settings) as (call, _):
            if settings is SHORT_FIRST_EVENT_TIMEOUT:
                await bodies(call, 1)
            await steps.deliver(token("a"), token("b"), token("", FinishReason.EOS))
        streams.append(
            [event if event == "[DONE]" else event["choices"] for event in events_of(call.content)]
        )
    assert streams[0] == streams[1]


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        ("/v1/chat/completions", ['data: {"error":{"message":"broken"', "data: [DONE]"]),
        ("/v1/completions", ['data: {"error":{"message":"broken"', "data: [DONE]"]),
        ("/v1/messages", ["event: message_start", 'event: error\ndata: {"type":"error"']),
        ("/v1/responses", ["event: response.created", "event: response.in_progress",
                           "event: response.failed"]),
        ("/generate_stream", ['data: {"error":"Request failed during generation: broken"']),
    ],
)  # fmt: skip
async def test_a_failure_after_a_comment_is_an_event(path: str, ending: list[str], steps: Steps) -> None:
    async with waiting(path, steps) as (call, _):
        await bodies(call, 1)
        await steps.deliver(GenerationFailed("broken"))
    assert call.status == 200
    comment, *events, rest = call.content.decode().split("\n\n")
    assert (comment, rest) == (":", "")
    assert len(events) == len(ending)
    for event, begin in zip(events, ending, strict=True):
        assert event.startswith(begin)
    assert "broken" in "".join(events)


async def test_a_comment_follows_later_silences(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.001)
    async with waiting("/v1/chat/completions", steps) as (call, _):
        assert await bodies(call, 3) == [COMMENT] * 3
        await steps.deliver(token("a"))
        num = len(call.sent)
        assert (await bodies(call, num))[-1] == COMMENT
        await steps.deliver(token("", FinishReason.EOS))


@pytest.mark.parametrize(
    ("path", "timeout_s", "fields"),
    [
        ("/v1/chat/completions", 0.0, {}),
        ("/api/chat", 0.001, {"messages": HI}),
        ("/api/generate", 0.001, {"prompt": "hi"}),
    ],
)
async def test_no_comment_where_none_is_wanted_or_there_is_no_such_thing(
    path: str, timeout_s: float, fields: dict[str, Any], steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(first_event_timeout_s=timeout_s)
    beside = Steps()
    async with (
        waiting(path, steps, settings, **fields) as (call, _),
        waiting("/v1/chat/completions", beside) as (other, _),
    ):
        await bodies(other, 1)  # began later, and its timeout has passed
        assert call.sent == []
        await steps.deliver(GenerationFailed("broken"))
        await beside.deliver(token("", FinishReason.EOS))
    assert call.status == 500


async def test_lines_of_json_stay_that_in_a_silence(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.001)
    beside = Steps()
    async with (
        waiting("/api/chat", steps, messages=HI) as (call, _),
        waiting("/v1/chat/completions", beside) as (other, _),
    ):
        await steps.deliver(token("a"))
        await bodies(other, 5)
        await steps.deliver(token("", FinishReason.EOS))
        await beside.deliver(token("", FinishReason.EOS))
    lines = [json.loads(line) for line in call.content.splitlines()]
    assert [line["done"] for line in lines] == [False, True]


async def test_a_client_that_leaves_before_the_first_token_is_noticed(steps: Steps) -> None:
    engine = ScriptedEngine(steps.script)
    call = request("POST", "/v1/chat/completions", STREAMS["/v1/chat/completions"])
    task = asyncio.create_task(send(scripted_app(engine, SHORT_FIRST_EVENT_TIMEOUT), call))
    await bodies(call, 1)
    call.gone.set()
    await task
    assert engine.channels[0].is_cancelled
    assert engine.num_permits == 128


class ShortSendTimeout:
    """A middleware that gives each `send` 50 ms, as any may; records the tasks that call it."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.senders: set[asyncio.Task[Any] | None] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def within(message: Message) -> None:
            self.senders.add(asyncio.current_task())
            async with asyncio.timeout(0.05):
                await send(message)

        await self._app(scope, receive, within)


@asynccontextmanager
async def running_engine() -> AsyncIterator[tuple[ShortSendTimeout, Engine]]:
    """Serve a real engine wrapped by the middleware."""
    engine = Engine(FakeRunner(), ToyTokenizer(), Settings(), toy_info())
    engine.start()
    app = scripted_app(ScriptedEngine())
    app.context.served = Served(engine, ToyTokenizer(), None, toy_info(), engine.stats)  # type: ignore[arg-type]
    try:
        yield ShortSendTimeout(app), engine
    finally:
        await engine.stop()


STREAM = {"prompt": "hi", "max_tokens": 40, "stream": True, "ignore_eos": True}


def num_tokens(content: bytes) -> int:
    *chunks, done = events_of(content)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    return len(chunks)


async def test_only_the_requests_own_task_calls_send() -> None:
    async with running_engine() as (app, engine):
        call = request("POST", "/v1/completions", {**STREAM, "return_token_ids": True})
        task = asyncio.create_task(send(app, call))
        await task
        assert app.senders == {task}
        assert call.is_complete and num_tokens(call.content) > 2
        assert engine.state is EngineState.READY


async def test_a_send_that_is_timed_out_ends_its_stream_and_no_other() -> None:
    async with running_engine() as (app, engine):
        stuck, well = (request("POST", "/v1/completions", STREAM) for _ in range(2))
        stuck.gate.clear()
        await asyncio.gather(send(app, stuck), send(app, well))
        assert not stuck.is_complete
        assert well.is_complete and num_tokens(well.content) > 2
        assert engine.state is EngineState.READY
        again = await send(app, request("POST", "/v1/completions", STREAM))
        assert again.is_complete


async def test_frames_go_the_servers_own_way_where_it_has_one() -> None:
    async with running_engine() as (app, _):
        call = request("POST", "/v1/completions", STREAM)
        writers: list[asyncio.Task[Any] | None] = []

        def write(body: bytes) -> bool:
            writers.append(asyncio.current_task())
            is_open = len(writers) % 3 != 0  # sometimes the server would have to wait
            if is_open:
                call.sent.append({"type": "http.response.body", "body": body, "more_body": True})
            return is_open

        call.scope["extensions"] = {sse.DIRECT_WRITE: write}
        task = asyncio.create_task(send(app, call))
        await task
        assert app.senders == {task}
        assert writers and task not in writers  # written in the engine's task
        assert call.is_complete and num_tokens(call.content) > 2


@pytest.mark.parametrize("server", ["native", "hypercorn", "uvicorn"])
async def test_impatient_middleware_under_real_servers(server: str) -> None:
    async with running_engine() as (app, engine), serving(app, server) as url, httpx.AsyncClient() as client:
        answers = await asyncio.gather(
            *(client.post(f"{url}/v1/completions", json=STREAM, timeout=20) for _ in range(5))
        )
        for answer in answers:
            assert num_tokens(answer.content) > 2
        assert engine.state is EngineState.READY
