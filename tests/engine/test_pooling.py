"""Pooling requests: alongside streams, in chunks, preempted, failed; and their use of the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import ask, make_request
from tests.support.fake_runner import FakeRunner, fake_vector
from tests.support.waiting import LONGEST_S
from tgi_asgi.engine.engine import Engine
from tgi_asgi.errors import GenerationFailed, InvalidRequest, TgiError
from tgi_asgi.types import Channel, GenerationRequest, Pooling, PoolingKind, TokenEvent

LAST, MEAN = Pooling(PoolingKind.LAST), Pooling(PoolingKind.MEAN)


class _End:
    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.events: list[TokenEvent] = []

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self.events += events
        if any(event.finish for event in events):
            self.future.set_result(None)

    def on_error(self, error: TgiError) -> None:
        self.future.set_exception(error)


def _pooled(prompt: bytes | int, pooling: Pooling = LAST) -> GenerationRequest:
    return make_request(prompt, 1, pooling=pooling)


async def _run(engine: Engine, *requests: GenerationRequest) -> list[Channel]:
    channels: list[Channel] = [engine.submit(request, engine.acquire(request.n)) for request in requests]
    ends = [_End() for _ in channels]
    for channel, end in zip(channels, ends, strict=True):
        channel.attach(end)
    await asyncio.wait_for(asyncio.gather(*(end.future for end in ends)), LONGEST_S)
    return channels


@pytest.mark.parametrize("pooling", [LAST, MEAN, Pooling(PoolingKind.LOGITS, (3, 5))])
async def test_a_prompt_becomes_a_vector_and_no_token(make_engine: MakeEngine, pooling: Pooling) -> None:
    engine = make_engine()
    request = _pooled(100, pooling)
    [channel] = await _run(engine, request)
    assert channel.stats.vector is not None
    np.testing.assert_array_equal(channel.stats.vector, fake_vector(request.prompt_ids))
    assert channel.stats.generated_tokens == 0
    assert engine.stats.sampled_tokens == 0


async def test_vectors_and_streams_share_steps(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=256, max_step_tokens=128)
    engine = make_engine(runner, max_batch_prefill_tokens=96)
    requests = [
        _pooled(bytes([at]) * (37 * at + 1), MEAN if at % 2 else LAST)
        if at % 3
        else make_request(40 + at, 30)
        for at in range(12)
    ]
    channels = await _run(engine, *requests)
    for request, channel in zip(requests, channels, strict=True):
        if request.pooling is not None:
            np.testing.assert_array_equal(channel.stats.vector, fake_vector(request.prompt_ids))
    assert any(
        any(row.pooling for row in plan.rows) and any(row.token_ids is None for row in plan.rows)
        for plan in runner.plans
    ), "no step had both kinds"
    assert any(row.pooling and not row.samples for plan in runner.plans for row in plan.rows), "no chunks"


@pytest.mark.parametrize(("pooling", "num_cached"), [(LAST, 96), (MEAN, 0)])
async def test_only_the_last_token_may_stand_on_a_cached_prefix(
    make_engine: MakeEngine, pooling: Pooling, num_cached: int
) -> None:
    engine = make_engine()
    for expected in (0, num_cached):
        [channel] = await _run(engine, _pooled(100, pooling))
        assert channel.stats.cached_tokens == expected


async def test_a_preempted_prompt_is_pooled_from_its_beginning(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=12, max_step_tokens=48)
    engine = make_engine(runner, max_batch_prefill_tokens=32)
    stream, pooled = make_request(b"s" * 10, 120), _pooled(100, MEAN)
    channels = await _run(engine, stream, pooled)
    np.testing.assert_array_equal(channels[1].stats.vector, fake_vector(pooled.prompt_ids))


async def test_a_failed_step_loses_no_vector(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=64)
    engine = make_engine(runner, max_batch_prefill_tokens=32)
    failed = False

    def fault(plan: object) -> BaseException | None:
        nonlocal failed
        if len(runner.plans) == 3 and not failed:
            failed = True
            return RuntimeError("once")
        return None

    runner.fault = fault
    requests = [make_request(10, 20), *(_pooled(100 + at, MEAN) for at in range(3))]
    channels = await _run(engine, *requests)
    assert failed
    for request, channel in zip(requests[1:], channels[1:], strict=True):
        np.testing.assert_array_equal(channel.stats.vector, fake_vector(request.prompt_ids))


async def test_a_vector_that_is_not_finite_fails_its_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    nan = np.array([np.nan], np.float32)
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.fake_runner.fake_vector", lambda tokens: nan)
        failed = await ask(engine, _pooled(10))
    [channel] = await _run(engine, _pooled(10))
    assert channel.stats.vector is not None
    assert isinstance(failed.error, GenerationFailed) and not failed.events


async def test_a_prompt_may_fill_the_context_and_no_more(make_engine: MakeEngine) -> None:
    engine = make_engine(max_total_tokens=64)
    [channel] = await _run(engine, _pooled(64))
    assert channel.stats.vector is not None
    with pytest.raises(InvalidRequest):
        engine.submit(_pooled(65), engine.acquire(1))


async def test_prompts_that_come_whole_share_steps_up_to_the_budget(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=512, max_step_tokens=300, takes_whole_prompts=True, num_kept_states=0)
    engine = make_engine(runner, max_batch_prefill_tokens=96)
    sizes = [10, 200, 90, 7, 40, 41, 300, 1, 33, 20, 10, 96, 2]
    requests = [_pooled(bytes([at]) * size, MEAN) for at, size in enumerate(sizes)]
    channels = await _run(engine, *requests)
    for request, channel in zip(requests, channels, strict=True):
        np.testing.assert_array_equal(channel.stats.vector, fake_vector(request.prompt_ids))
    steps = [[row.num_tokens for row in plan.rows] for plan in runner.plans]
    assert sorted(size for step in steps for size in step) == sorted(sizes)
    assert all(sum(step) <= 96 or len(step) == 1 for step in steps), steps
    assert any(len(step) > 2 for step in steps), steps
    assert engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("error", [RuntimeError("bad"), MemoryError("none")])
async def test_a_prompt_that_fails_whole_is_not_cut(make_engine: MakeEngine, error: Exception) -> None:
    runner = FakeRunner(num_blocks=512, takes_whole_prompts=True, num_kept_states=0)
    engine = make_engine(runner, max_batch_prefill_tokens=200)
    runner.fault = lambda plan: error if any(row.num_tokens == 150 for row in plan.rows) else None
    good = [_pooled(size, MEAN) for size in (20, 30, 40, 3)]
    bad = _pooled(150, MEAN)
    results = await asyncio.gather(
        *(_run(engine, request) for request in (*good, bad)), return_exceptions=True
    )
    assert isinstance(results[-1], GenerationFailed)
    for request, found in zip(good, results[:-1], strict=True):
        assert not isinstance(found, BaseException)
        np.testing.assert_array_equal(found[0].stats.vector, fake_vector(request.prompt_ids))
    assert {row.num_tokens for plan in runner.plans for row in plan.rows} <= {20, 30, 40, 3, 150}


async def test_where_the_second_text_begins_reaches_the_runner(make_engine: MakeEngine) -> None:
    runner = FakeRunner(takes_whole_prompts=True, num_kept_states=0)
    await _run(make_engine(runner), replace(_pooled(9, MEAN), second_start=4))
    assert [row.second_start for plan in runner.plans for row in plan.rows] == [4]


@pytest.mark.parametrize("pooling", [LAST, MEAN])
async def test_a_prompt_may_fill_the_cache_but_not_exceed_it(
    make_engine: MakeEngine, pooling: Pooling
) -> None:
    """Every token of a prompt is computed, while the last token of an answer is not."""
    engine = make_engine(FakeRunner(num_blocks=4))
    with pytest.raises(InvalidRequest, match="tokens of KV cache, which has 64"):
        await _run(engine, _pooled(65, pooling))
    [channel] = await _run(engine, _pooled(64, pooling))
    assert channel.stats.vector is not None
