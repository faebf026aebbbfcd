"""The stream writer: direct writes, blocked readers, disconnects, keep-alive, a single end."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.support.asgi import Call, events_of, request, send
from tests.support.scripted_engine import (
    ScriptedChannel,
    ScriptedEngine,
    fail_with,
    say,
    scripted_app,
)
from tests.support.waiting import LONGEST_S, until
from tgi_asgi.api import sse
from tgi_asgi.api.exchange import LARGE_BODY
from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, Overloaded, TgiError
from tgi_asgi.types import FinishReason, TokenEvent

STREAM = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def chat(**fields: object) -> Call:
    return request("POST", "/v1/chat/completions", {**STREAM, **fields})


def text_of(call: Call) -> str:
    chunks = [event for event in events_of(call.content) if event != "[DONE]"]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c.get("choices"))


class Steps:
    """A script whose steps the test delivers one by one."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Sequence[TokenEvent] | TgiError] = asyncio.Queue()

    async def script(self, channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        while True:
            yield await self.queue.get()

    async def deliver(self, *batches: Sequence[TokenEvent] | TgiError) -> None:
        for batch in batches:
            self.queue.put_nowait(batch)
        await until(self.queue.empty)
        await asyncio.sleep(0)


def token(text: str, finish: FinishReason | None = None) -> list[TokenEvent]:
    return [TokenEvent(0, 97, text.encode(), text, finish=finish)]


@pytest.fixture
def steps() -> Steps:
    return Steps()


async def submitted(engine: ScriptedEngine) -> None:
    """Wait until a request has reached the engine."""
    await until(lambda: bool(engine.channels))


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait for a request to end, for a limited time."""
    async with asyncio.timeout(LONGEST_S):
        await task


async def start(steps: Steps, call: Call) -> tuple[ScriptedEngine, asyncio.Task[Call]]:
    engine = ScriptedEngine(steps.script)
    task = asyncio.create_task(send(scripted_app(engine), call))
    await submitted(engine)
    return engine, task


async def test_nothing_is_sent_before_the_first_token_and_a_token_is_a_send(steps: Steps) -> None:
    call = chat()
    _, task = await start(steps, call)
    for _ in range(20):
        await asyncio.sleep(0)
    assert call.sent == []
    await steps.deliver(token("a"))
    assert [message["type"] for message in call.sent] == ["http.response.start", "http.response.body"]
    assert call.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert call.headers["cache-control"] == "no-cache"
    assert call.headers["x-accel-buffering"] == "no"
    assert "content-length" not in call.headers
    await steps.deliver(token("b"))
    assert len(call.sent) == 3
    await steps.deliver(token("", FinishReason.EOS))
    await ended(task)
    assert len(call.sent) == 4
    assert call.is_complete
    assert text_of(call) == "ab"
    assert events_of(call.content)[-1] == "[DONE]"


async def test_every_send_holds_whole_events() -> None:
    call = await send(scripted_app(ScriptedEngine(say("a", "b", "c"))), chat(n=3))
    for message in call.sent[1:]:
        events_of(message["body"])
    assert call.is_complete


async def test_an_error_before_the_first_token_is_an_ordinary_response() -> None:
    for error, status in ((Overloaded(retry_after_s=4), 429), (GenerationFailed("x"), 500)):
        call = await send(scripted_app(ScriptedEngine(fail_with(error))), chat())
        assert call.status == status
        assert call.headers["content-type"] == "application/json"
        assert call.is_complete


async def test_an_error_after_the_first_token_is_an_event_and_done(steps: Steps) -> None:
    call = chat()
    _, task = await start(steps, call)
    await steps.deliver(token("a"))
    await steps.deliver(IncompleteGeneration("cut off"))
    await ended(task)
    assert call.status == 200
    error, done = events_of(call.content)[-2:]
    assert error["error"]["message"] == "cut off"
    assert done == "[DONE]"
    assert call.is_complete


async def test_a_disconnect_cancels_the_request(steps: Steps) -> None:
    call = chat()
    engine, task = await start(steps, call)
    await steps.deliver(token("a"))
    call.gone.set()
    await ended(task)
    assert engine.channels[0].is_cancelled
    assert engine.num_permits == 128
    assert not call.is_complete


async def test_a_disconnect_before_the_first_token_cancels_too(steps: Steps) -> None:
    for fields in ({}, {"stream": False}):
        call = chat(**fields)
        engine, task = await start(steps, call)
        call.gone.set()
        await ended(task)
        assert engine.channels[0].is_cancelled
        assert call.sent == []


@pytest.mark.parametrize("has_begun", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_a_client_left_needs_no_collector_to_be_freed(
    steps: Steps, stream: bool, has_begun: bool
) -> None:
    """Its pixels, for example."""
    call, engine, exchanges = chat(stream=stream), ScriptedEngine(steps.script), []
    app = scripted_app(engine)
    app.observers.append(lambda exchange, _: exchanges.append(weakref.ref(exchange)))
    gc.disable()
    try:
        task = asyncio.create_task(send(app, call))
        await submitted(engine)
        if has_begun:
            await steps.deliver(token("a"))
        call.gone.set()
        await ended(task)
        (channel,) = engine.channels
        channel._sink = None  # the script, which was cancelled, keeps the channel
        engine.channels.clear()
        for _ in range(3):  # let the task that watches for a disconnect end
            await asyncio.sleep(0)
        assert [exchange() for exchange in exchanges] == [None]
    finally:
        gc.enable()


async def test_a_blocked_reader_gets_what_waited_in_one_merged_send(steps: Steps) -> None:
    call = chat()
    _, task = await start(steps, call)
    await steps.deliver(token("a"))
    call.gate.clear()
    await steps.deliver(token("b"))
    await steps.deliver(token("c"), token("d"))
    assert call.num_blocked == 1
    num_sent = len(call.sent)
    call.gate.set()
    await until(lambda: len(call.sent) >= num_sent + 2)
    assert [event["choices"][0]["delta"] for event in events_of(call.sent[-1]["body"])] == [{"content": "cd"}]
    await steps.deliver(token("e", FinishReason.EOS))
    await ended(task)
    assert text_of(call) == "abcde"
    assert call.is_complete


async def test_a_stream_that_ends_while_its_reader_blocks_ends_once(steps: Steps) -> None:
    for last in (token("c", FinishReason.LENGTH), GenerationFailed("broken")):
        call = chat()
        _, task = await start(steps, call)
        await steps.deliver(token("a"))
        call.gate.clear()
        await steps.deliver(token("b"))
        steps.queue.put_nowait(last)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        call.gate.set()
        await ended(task)
        assert call.is_complete
        events = events_of(call.content)
        assert events[-1] == "[DONE]"
        assert ("error" in events[-2]) == isinstance(last, TgiError)


async def test_a_choice_that_ends_after_another_has_failed_does_not_keep_a_blocked_stream_open() -> None:
    call = request("POST", "/v1/completions", {"prompt": ["a", "b"], "stream": True})
    queues: list[asyncio.Queue[Sequence[TokenEvent] | TgiError]] = []

    async def script(channel: ScriptedChannel) -> AsyncIterator[Sequence[TokenEvent] | TgiError]:
        queue: asyncio.Queue[Sequence[TokenEvent] | TgiError] = asyncio.Queue()
        queues.append(queue)
        while True:
            yield await queue.get()

    # Like the engine, still deliver what was pushed before the cancellation arrived.
    engine = ScriptedEngine(script)
    task = asyncio.create_task(send(scripted_app(engine), call))
    await submitted(engine)
    await until(lambda: len(queues) == 2)
    queues[0].put_nowait(token("x"))
    await until(call.got_frame.is_set)
    call.gate.clear()
    queues[1].put_nowait(token("y"))
    await until(lambda: bool(call.num_blocked))
    queues[0].put_nowait(GenerationFailed("broken"))
    await until(lambda: engine.channels[1].is_cancelled)
    engine.channels[1]._deliver(token("z", FinishReason.EOS))
    call.gate.set()
    await ended(task)
    assert call.is_complete
    assert ["error" in event for event in events_of(call.content)[-3:-1]] == [False, True]


async def test_a_reader_that_lags_too_far_is_cut_off_alone(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "MAX_WAITING_EVENTS", 10)
    slow = chat()
    engine, task = await start(steps, slow)
    await steps.deliver(token("a"))
    slow.gate.clear()
    await steps.deliver(*[token("b") for _ in range(12)])
    await ended(task)
    assert engine.channels[0].is_cancelled
    assert not slow.is_complete
    assert "tokens behind" in caplog.text


async def test_a_reader_that_stalls_for_a_minute_is_cut_off(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    monkeypatch.setattr(sse, "STALL_LIMIT_S", 0.02)
    call = chat()
    engine, task = await start(steps, call)
    call.gate.clear()
    await steps.deliver(token("a"))
    await ended(task)
    assert engine.channels[0].is_cancelled
    assert "has not read" in caplog.text


async def test_a_stream_that_is_cut_off_while_a_thread_renders_sends_nothing_more(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The send could wait for a minute for a reader that has gone."""
    app = scripted_app(engine := ScriptedEngine(steps.script))
    threads, may_end, has_rendered = app.context.text_threads, asyncio.Event(), asyncio.Event()
    run = threads.run

    async def run_slowly(*args: Any) -> Any:
        result = await run(*args)
        if engine.channels:  # it is not a step of the request's preparation
            has_rendered.set()
            await may_end.wait()
        return result

    monkeypatch.setattr(threads, "run", run_slowly)
    call = chat(ignored="x" * LARGE_BODY)  # a thread renders the first events of a large request
    task = asyncio.create_task(send(app, call))
    await submitted(engine)
    await steps.deliver(token("a"))
    await until(has_rendered.is_set)
    call.gone.set()
    await until(lambda: engine.channels[0].is_cancelled)
    may_end.set()
    await ended(task)
    assert call.sent == []


async def test_silence_is_filled_with_comments_once_headers_are_out(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    call = chat()
    _, task = await start(steps, call)
    await asyncio.sleep(0.03)
    assert call.sent == []
    await steps.deliver(token("a"))
    call.got_frame.clear()
    await until(call.got_frame.is_set)
    assert call.sent[-1]["body"] == b":\n\n"
    await steps.deliver(token("b", FinishReason.EOS))
    await ended(task)
    assert text_of(call) == "ab"


async def test_a_token_that_comes_as_a_silence_is_filled_is_not_lost(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine may deliver between the timer and the task that it wakes."""
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    fire = asyncio.Timeout._on_timeout  # type: ignore[attr-defined]
    late = [token("b")]

    def fire_and_deliver(timeout: asyncio.Timeout) -> None:
        fire(timeout)
        if late:
            engine.channels[0]._deliver(late.pop())

    call = chat()
    call.scope["extensions"] = {sse.DIRECT_WRITE: lambda frames: False}  # the connection would have to wait
    engine, task = await start(steps, call)
    await steps.deliver(token("a"))
    monkeypatch.setattr(asyncio.Timeout, "_on_timeout", fire_and_deliver)
    await until(lambda: not late)
    await steps.deliver(token("c", FinishReason.EOS))
    await ended(task)
    assert text_of(call) == "abc"


async def test_a_frame_that_would_have_to_wait_is_sent_before_the_next_token(steps: Steps) -> None:
    call = chat()
    call.scope["extensions"] = {sse.DIRECT_WRITE: lambda frames: False}
    _, task = await start(steps, call)
    await steps.deliver(token("a"))
    await steps.deliver(token("b"))
    await until(lambda: text_of(call) == "ab")
    await steps.deliver(token("c", FinishReason.EOS))
    await ended(task)
    assert text_of(call) == "abc"


@pytest.mark.parametrize("is_at_once", [True, False])
async def test_a_send_that_fails_cancels_the_request(
    steps: Steps, caplog: pytest.LogCaptureFixture, is_at_once: bool
) -> None:
    call = chat()

    async def broken(message: object) -> None:
        if not is_at_once:
            await asyncio.sleep(0)
        raise OSError("broken pipe")

    engine = ScriptedEngine(steps.script)
    task = asyncio.create_task(scripted_app(engine)(call.scope, call.receive, broken))
    await submitted(engine)
    await steps.deliver(token("a"))
    await ended(task)
    assert engine.channels[0].is_cancelled
    assert "broken pipe" in caplog.text


async def test_a_server_that_cancels_the_request_frees_it(steps: Steps) -> None:
    call = chat()
    engine, task = await start(steps, call)
    await steps.deliver(token("a"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended(task)
    assert engine.channels[0].is_cancelled


async def test_streams_do_not_leave_tasks_or_timers_behind() -> None:
    before = asyncio.all_tasks()
    await send(scripted_app(ScriptedEngine(say("a", "b"))), chat())
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
