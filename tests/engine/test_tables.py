"""Looking a prompt that waits for blocks up in the prefix cache: how often, and how fresh the result is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.helpers import add_request, make_request, make_scheduler, plan_step, run
from tests.support.fake_runner import FakeRunner
from tgi_asgi.engine.hits import find_hit
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence, Stage

PROMPT = [index * 7 % 251 for index in range(320)]  # 20 blocks


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[Sequence]:
    """Record the sequence of each look into the cache."""
    found: list[Sequence] = []

    def recorded(*args: Any) -> Any:
        found.append(args[2])
        return find_hit(*args)

    monkeypatch.setattr("tgi_asgi.engine.tables.find_hit", recorded)
    return found


def waiting_beside_a_stream(num_free: int) -> tuple[Scheduler, FakeRunner, Sequence]:
    """Return a scheduler in which a prompt of 25 blocks waits, the first 20 of which a stream holds."""
    scheduler, runner = make_scheduler(num_blocks=21 + num_free, max_prefill_tokens=64), FakeRunner()
    [stream] = add_request(scheduler, make_request(PROMPT, max_tokens=60))
    while stream.num_output < 2:
        run(scheduler, runner, plan_step(scheduler))
    assert scheduler.pool.num_free == num_free
    [waiting] = add_request(scheduler, make_request(PROMPT + [5] * 80), arrival=1)
    return scheduler, runner, waiting


@pytest.mark.parametrize("num_free", [2, 4])
def test_a_prompt_that_waits_for_blocks_is_looked_up_when_the_cache_has_changed(
    num_free: int, lookups: list[Sequence]
) -> None:
    scheduler, runner, waiting = waiting_beside_a_stream(num_free)
    lookups.clear()
    for _ in range(14):  # the stream's next block is full after that
        run(scheduler, runner, plan_step(scheduler))
    assert waiting.stage is Stage.WAITING
    assert lookups == [waiting]


def test_a_prompt_is_not_looked_up_while_no_block_is_free(lookups: list[Sequence]) -> None:
    scheduler, runner, waiting = waiting_beside_a_stream(1)  # the stream needs it next
    run(scheduler, runner, plan_step(scheduler))
    lookups.clear()
    for _ in range(12):
        run(scheduler, runner, plan_step(scheduler))
    assert waiting.stage is Stage.WAITING
    assert not lookups


def test_a_prompt_that_starts_takes_what_is_cached_then() -> None:
    scheduler, runner, waiting = waiting_beside_a_stream(4)
    for _ in range(3):
        run(scheduler, runner, plan_step(scheduler))
    assert scheduler.tables.num_to_compute(waiting) == 80
    [stream] = scheduler.running
    scheduler.remove(stream, forget=True)
    [first] = plan_step(scheduler).plan.rows
    assert (waiting.stage, first.start, waiting.num_reused) == (Stage.RUNNING, 0, 0)
    assert waiting.hit is None, "it would keep a list of all its blocks"
