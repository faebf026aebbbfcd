"""The engine with more work than capacity, and at its end: refusals, waits, tenants, draining, stopping."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import Answer, ask, collect, make_request, submit
from tests.support.fake_runner import FakeRunner, FakeTokenizer, fake_info
from tests.support.waiting import until
from tgi_asgi.engine.admission import Admission
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import (
    IncompleteGeneration,
    Overloaded,
    Unavailable,
)
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, FinishReason


async def test_no_room_is_said_at_once_with_a_time_to_wait(make_engine: MakeEngine) -> None:
    engine = make_engine(max_concurrent_requests=2)
    channel = submit(engine, make_request(5, max_tokens=50, n=2))
    with pytest.raises(Overloaded) as caught:
        engine.acquire(1)
    assert caught.value.retry_after_s >= 1
    await collect(channel)
    engine.acquire(2).release()


async def test_a_request_that_waits_too_long_is_refused_and_one_that_runs_is_not(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(FakeRunner(max_batch_size=1, step_s=0.002), queue_timeout_s=0.05)
    running = submit(engine, make_request(5, max_tokens=60))
    late = await ask(engine, make_request(6))
    assert isinstance(late.error, Overloaded)
    assert late.error.retry_after_s >= 1
    assert (await collect(running)).finish() is FinishReason.LENGTH
    assert engine.stats.failed == 1
    quick = submit(engine, make_request(5, max_tokens=1))
    await collect(quick)
    assert quick.timer is not None and quick.timer.cancelled(), "it would keep the request in memory"


async def test_only_requests_that_ran_teach_how_long_to_wait(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(max_batch_size=1, step_s=0.002), queue_timeout_s=0.05)
    now_s = 0.0
    engine.admission = Admission(8, lambda: now_s)
    running = submit(engine, make_request(5, max_tokens=60))
    late = await ask(engine, make_request(6))
    assert isinstance(late.error, Overloaded)
    now_s += 100
    assert engine.admission.retry_after_s(1) == 1, "nothing has been measured yet"
    await collect(running)
    now_s += 100
    assert engine.admission.retry_after_s(1) == 60, "nothing has ended recently"


async def test_a_tenant_without_its_share_displaces_the_newest_that_waits(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(max_batch_size=2), max_concurrent_requests=6)
    greedy = [engine.submit(make_request(5, max_tokens=300), engine.acquire(1, "greedy")) for _ in range(6)]
    await until(lambda: engine.stats.sampled_tokens > 4)
    modest = [engine.submit(make_request(6), engine.acquire(1, "modest")) for _ in range(3)]
    with pytest.raises(Overloaded):
        engine.acquire(1, "modest")  # it has half of the capacity, which is enough
    with pytest.raises(Overloaded):
        engine.acquire(1, "greedy")
    assert engine.admission.num_taken == 6
    answers = await asyncio.gather(*map(collect, greedy))
    assert [type(answer.error) for answer in answers] == [type(None)] * 3 + [Overloaded] * 3
    assert all(answer.error is None for answer in await asyncio.gather(*map(collect, modest)))


async def test_a_request_that_was_just_cancelled_is_not_displaced_in_place_of_another(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(FakeRunner(max_batch_size=1), max_concurrent_requests=3)
    greedy = [engine.submit(make_request(5, max_tokens=90), engine.acquire(1, "greedy")) for _ in range(3)]
    await until(lambda: engine.stats.sampled_tokens > 0)
    greedy[-1].cancel()
    modest = engine.submit(make_request(6), engine.acquire(1, "modest"))
    answers = await asyncio.gather(*map(collect, (*greedy, modest)))
    errors = [type(answer.error) for answer in answers]
    assert errors == [type(None), Overloaded, IncompleteGeneration, type(None)]


async def test_nobody_is_displaced_for_a_call_that_finds_no_room_for_all_of_it(
    make_engine: MakeEngine,
) -> None:
    """Only the first of three prompts would fit, at another request's expense."""
    engine = make_engine(FakeRunner(max_batch_size=2), max_concurrent_requests=4)
    greedy = [engine.submit(make_request(5, max_tokens=100), engine.acquire(1, "greedy")) for _ in range(4)]
    with pytest.raises(Overloaded):
        engine.acquire(3, "modest")
    assert all(answer.error is None for answer in await asyncio.gather(*map(collect, greedy)))


async def test_what_is_refused_between_two_steps_does_not_run(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal has arrived, but the loop has not processed it when a slot becomes free."""
    runner = FakeRunner(max_batch_size=1)
    engine = make_engine(runner, max_concurrent_requests=4)
    running = submit(engine, make_request(5, max_tokens=3))
    waiting = submit(engine, make_request(6, max_tokens=3))
    deliver = engine._loop._delivery.deliver

    async def deliver_and_refuse(*args: Any) -> None:
        await deliver(*args)
        if running.is_ended:
            waiting.refuse(Overloaded("too late"))

    monkeypatch.setattr(engine._loop._delivery, "deliver", deliver_and_refuse)
    assert (await collect(running)).error is None
    assert isinstance((await collect(waiting)).error, Overloaded)
    assert waiting.stats.scheduled_s is None
    assert engine.stats.prefill_tokens == 5


async def test_nobody_is_displaced_who_has_begun_or_where_there_is_one_tenant(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(FakeRunner(), max_concurrent_requests=2)
    running = [engine.submit(make_request(5, max_tokens=200), engine.acquire(1, "a")) for _ in range(2)]
    with pytest.raises(Overloaded):
        engine.acquire(1, "a")
    await until(lambda: engine.stats.sampled_tokens > 0)
    with pytest.raises(Overloaded):
        engine.acquire(1, "b")
    assert all(answer.error is None for answer in await asyncio.gather(*map(collect, running)))


async def test_draining_finishes_what_runs_and_refuses_the_rest(make_engine: MakeEngine) -> None:
    engine = make_engine()
    early = engine.acquire(1)
    running = asyncio.create_task(ask(engine, make_request(5, max_tokens=50)))
    await until(lambda: engine.stats.sampled_tokens > 3)
    draining = asyncio.create_task(engine.drain(10))
    await asyncio.sleep(0)
    assert engine.state is EngineState.DRAINING
    with pytest.raises(Unavailable):
        engine.acquire(1)
    assert (await running).finish() is FinishReason.LENGTH
    await asyncio.sleep(0.02)
    assert not draining.done(), "a request is still being tokenised"
    more = engine.acquire(1, is_accepted=True)
    answers = [collect(engine.submit(make_request(5, max_tokens=3), permit)) for permit in (early, more)]
    assert [answer.error for answer in await asyncio.gather(*answers)] == [None, None]
    await draining


async def test_a_permit_is_of_no_use_after_the_end_of_draining(make_engine: MakeEngine) -> None:
    engine = make_engine()
    early = engine.acquire(1)
    await engine.drain(0.01)
    with pytest.raises(Unavailable):
        engine.acquire(1, is_accepted=True)
    with pytest.raises(Unavailable):
        engine.submit(make_request(5), early)
    assert engine.admission.num_taken == 0


async def test_what_has_not_finished_by_the_end_of_draining_is_told(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(is_manual=True))
    channels = [submit(engine, make_request(5, max_tokens=50)) for _ in range(3)]
    await engine.drain(0.01)
    assert all(channel.is_ended for channel in channels)
    for channel in channels:
        assert isinstance((await collect(channel)).error, IncompleteGeneration)


@pytest.mark.parametrize("is_sudden", [False, True])
async def test_what_has_not_begun_by_the_end_may_be_sent_to_another_server(
    make_engine: MakeEngine, *, is_sudden: bool
) -> None:
    engine = make_engine(FakeRunner(max_batch_size=1, step_s=0.002))
    running, waiting = (submit(engine, make_request(5, max_tokens=900)) for _ in range(2))
    await until(lambda: engine.stats.sampled_tokens > 3)
    await (engine.stop() if is_sudden else engine.drain(0.01))
    assert isinstance((await collect(running)).error, IncompleteGeneration)
    assert isinstance((await collect(waiting)).error, Unavailable)
    assert engine.admission.num_taken == 0


async def test_those_that_have_finished_are_told_so_though_the_engine_stops_at_once() -> None:
    """Delivering a large step yields to the event loop, where a task may be waiting for its end."""
    clock = count(step=0.01)  # each reading advances by more than a slice of delivery
    engine = Engine(FakeRunner(), FakeTokenizer(), Settings(), fake_info(), clock=lambda: next(clock))
    engine.start()
    answers = [Answer(submit(engine, make_request(5, max_tokens=3))) for _ in range(4)]
    await engine.drain(10)
    await engine.stop()
    assert [answer.error for answer in answers] == [None] * 4
    assert [len(answer.events) for answer in answers] == [3] * 4


async def test_stopping_ends_every_request_with_an_error(make_engine: MakeEngine) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    channels = [submit(engine, make_request(5, max_tokens=900)) for _ in range(3)]
    await until(lambda: engine.stats.sampled_tokens > 5)
    await engine.stop()
    assert runner.num_in_flight == 0
    for channel in channels:
        assert isinstance((await collect(channel)).error, IncompleteGeneration)
