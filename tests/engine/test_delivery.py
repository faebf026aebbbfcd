"""When tokens leave the engine, and to whom."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import Answer, ask, make_request, submit
from tests.support.fake_runner import FakeRunner, FakeTokenizer, fake_info
from tests.support.waiting import until
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import IncompleteGeneration
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling, PoolingKind


async def test_the_wait_of_a_long_prompt_ends_with_its_first_chunk(make_engine: MakeEngine) -> None:
    runner = FakeRunner(is_manual=True)
    channel = submit(make_engine(runner, max_batch_prefill_tokens=32), make_request(200, max_tokens=1))
    await until(lambda: runner.num_in_flight == 2)
    scheduled_s = channel.stats.scheduled_s
    runner.run_next()
    await until(lambda: runner.num_in_flight == 2)
    assert channel.stats.scheduled_s == scheduled_s is not None


async def test_a_result_is_nothing_to_those_who_were_cancelled_before_it(make_engine: MakeEngine) -> None:
    runner = FakeRunner(is_manual=True)
    engine = make_engine(runner)
    answers = [Answer(submit(engine, make_request(5, max_tokens=1))) for _ in range(2)]
    await until(lambda: runner.num_in_flight == 1)
    runner.run_next()
    for answer in answers:
        answer.channel.cancel()
    for answer in answers:
        assert isinstance((await answer.wait()).error, IncompleteGeneration) and not answer.events


async def test_tokens_wait_for_a_limited_time_while_the_loop_always_lags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = count(step=0.001)
    engine = Engine(FakeRunner(), FakeTokenizer(), Settings(), fake_info(), clock=lambda: float(next(clock)))
    monkeypatch.setattr(engine._loop._delivery, "_pipeline", SimpleNamespace(has_done=True))
    engine.start()
    first, *between, _ = map(len, (await ask(engine, make_request(5, max_tokens=100))).batches)
    assert first == 1
    assert len(between) > 3 and all(1 < size < 20 for size in between)
    await engine.stop()


async def test_delivery_of_many_vectors_yields_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(step=0.0004)  # a vector takes at least one reading
    runner = FakeRunner(num_blocks=200, max_batch_size=32)
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info(), clock=lambda: float(next(clock)))
    delivery, num_yields = engine._loop._delivery, 0
    yield_to_loop, flush = delivery._yield_to_loop, delivery.flush

    async def note() -> None:
        nonlocal num_yields
        num_yields += 1
        await yield_to_loop()

    async def flush_unnoted() -> None:
        monkeypatch.setattr(delivery, "_yield_to_loop", yield_to_loop)
        await flush()
        monkeypatch.setattr(delivery, "_yield_to_loop", note)

    monkeypatch.setattr(delivery, "_yield_to_loop", note)
    monkeypatch.setattr(delivery, "flush", flush_unnoted)
    engine.start()
    pooling = Pooling(PoolingKind.LAST)
    answers = [Answer(submit(engine, make_request([index] * 5, 1, pooling=pooling))) for index in range(30)]
    for answer in answers:
        await answer.wait()
    await engine.stop()
    assert num_yields >= 30 / 3
