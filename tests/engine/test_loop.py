"""How many steps the engine's loop plans ahead."""

from __future__ import annotations

import asyncio

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import collect, make_request, submit
from tests.support.fake_runner import FakeRunner
from tests.support.waiting import until
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.step_time import StepSize


async def test_steps_teach_what_the_tokens_read_by_a_prompt_cost(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[StepSize] = []
    monkeypatch.setattr(
        TokenBudget, "observe", lambda budget, size, duration_s, num_drafts: sizes.append(size)
    )
    engine = make_engine(FakeRunner(num_blocks=400), max_batch_prefill_tokens=128)
    await collect(submit(engine, make_request(256, max_tokens=1)))
    assert sizes == [StepSize(0, 128, 128 * 64), StepSize(0, 128, 128 * 192)]


@pytest.mark.parametrize(("step_s", "num_before"), [(1.0, 1), (0.1, 2)])
async def test_what_arrives_waits_for_one_long_step_of_a_prompt_at_most(
    step_s: float, num_before: int, make_engine: MakeEngine
) -> None:
    """A second one is queued behind it only if such steps are short."""
    runner = FakeRunner(num_blocks=400, is_manual=True)
    engine = make_engine(runner, max_batch_prefill_tokens=512)
    engine._loop._budget.observe(StepSize(0, 512), step_s)
    long = submit(engine, make_request(3000, max_tokens=1))
    await until(lambda: runner.num_in_flight == num_before)
    short = submit(engine, make_request(b"short", max_tokens=1))
    await until(lambda: engine.stats.waiting == 1)
    assert runner.num_in_flight == num_before
    for _ in range(num_before):
        runner.run_next()
    assert [len(plan.rows) for plan in runner.plans] == [1] * num_before
    await until(lambda: runner.num_in_flight > 0)
    runner.run_next()
    assert len(runner.plans[-1].rows) == 2
    await until(lambda: runner.num_in_flight > 0)
    runner.is_manual = False
    runner.run_next()
    await asyncio.gather(collect(short), collect(long))


async def test_streams_have_their_next_step_queued_beside_a_long_prompt(make_engine: MakeEngine) -> None:
    runner = FakeRunner(num_blocks=400, is_manual=True)
    engine = make_engine(runner, max_batch_prefill_tokens=512)
    stream = submit(engine, make_request(16, max_tokens=40))
    await until(lambda: runner.num_in_flight == 2)
    engine._loop._budget.observe(StepSize(1, 512), 1.0)
    long = submit(engine, make_request(3000, max_tokens=1))
    for _ in range(4):
        runner.run_next()
        await until(lambda: runner.num_in_flight == 2)
    assert any(len(plan.rows) == 2 for plan in runner.plans)
    runner.is_manual = False
    runner.run_next()
    await asyncio.gather(collect(stream), collect(long))
