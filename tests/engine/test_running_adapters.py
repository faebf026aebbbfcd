"""Adapters in the engine: how rows are grouped, which sequences wait for an adapter, and when it is freed."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import add_request, ask, make_request, make_scheduler, plan_step, run, run_all
from tests.support.fake_runner import FakeRunner
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.types import Adapter

A, B, C = (Adapter(name, f"key {name}", f"weights {name}") for name in "abc")


def queue(scheduler: Any, adapters: str, max_tokens: int = 4) -> list[Sequence]:
    """Queue a request for each letter; `-` means no adapter."""
    by_name = {"a": A, "b": B, "c": C, "-": None}
    return [
        add_request(scheduler, make_request([index] * 5, max_tokens, adapter=by_name[name]), index)[0]
        for index, name in enumerate(adapters)
    ]


def test_rows_that_decode_are_grouped_by_adapter_with_those_of_none_first() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    queue(scheduler, "a-bab-")
    run(scheduler, runner, plan_step(scheduler))
    step = plan_step(scheduler)
    assert [row.adapter for row in step.plan.rows] == [
        None, None, "weights a", "weights a", "weights b", "weights b",
    ]  # fmt: skip
    assert [sequence.adapter for sequence in step.sequences] == [row.adapter for row in step.plan.rows]
    run(scheduler, runner, step)
    run_all(scheduler, runner)
    assert runner.violations == []


def test_prompts_that_start_again_do_so_by_urgency_whatever_their_adapters() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    sequences = queue(scheduler, "b-a")
    failed = plan_step(scheduler)
    scheduler.rollback(failed)
    again = plan_step(scheduler)
    assert again.sequences == sequences
    run(scheduler, runner, again)
    run_all(scheduler, runner)
    assert runner.violations == []


def test_one_adapter_too_many_waits_and_those_without_pass() -> None:
    scheduler, runner = make_scheduler(max_adapters=2), FakeRunner(max_adapters=2)
    first = queue(scheduler, "abc-a")
    step = plan_step(scheduler)
    assert step.sequences == [first[0], first[1], first[3]], "a's second request must wait for c"
    assert scheduler.num_waiting == 2
    run(scheduler, runner, step)
    for _ in range(6):
        if first[2].stage is Stage.RUNNING:
            break
        run(scheduler, runner, plan_step(scheduler))
    assert first[2].stage is Stage.RUNNING
    run_all(scheduler, runner)
    assert runner.violations == []
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)


def test_one_that_is_parked_can_be_given_up() -> None:
    scheduler, runner = make_scheduler(max_adapters=1), FakeRunner(max_adapters=1)
    one, parked = queue(scheduler, "ab")
    run(scheduler, runner, plan_step(scheduler))
    scheduler.remove(parked)
    assert scheduler.num_waiting == 0
    run_all(scheduler, runner)
    assert (one.num_output, parked.num_output) == (4, 0)
    [later] = queue(scheduler, "b")
    run_all(scheduler, runner)
    assert later.num_output == 4


def test_one_that_is_given_up_holds_nobody() -> None:
    """While it is parked, requests of a running adapter wait for it; its removal must release them."""
    scheduler, runner = make_scheduler(max_adapters=1), FakeRunner(max_adapters=1)
    one, parked, other = queue(scheduler, "aba", max_tokens=20)
    run(scheduler, runner, plan_step(scheduler))
    assert (one.stage, other.stage) == (Stage.RUNNING, Stage.WAITING)
    scheduler.remove(parked)
    run(scheduler, runner, plan_step(scheduler))
    assert other.stage is Stage.RUNNING
    run_all(scheduler, runner)
    assert runner.violations == []


class _Weights:
    pass


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
async def test_an_adapter_leaves_memory_with_its_last_request(make_engine: MakeEngine) -> None:
    """A collection of all generations may be minutes away."""
    engine = make_engine(FakeRunner(num_blocks=4, keeps_plans=False))
    weights = _Weights()
    is_there = weakref.ref(weights)
    request = dataclasses.replace(make_request(5, max_tokens=4, n=3), adapter=Adapter("a", "k", weights))
    del weights
    await ask(engine, request)
    del request
    # The fake cache remembers who wrote it; this request writes over the first one's tokens.
    await ask(engine, make_request([9] * 40, max_tokens=20))
    assert is_there() is None
