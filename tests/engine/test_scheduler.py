"""The rows of a step: budgets, slots, tenants and priorities, preemption, cancelled requests."""

from __future__ import annotations

import dataclasses

import pytest

from tests.engine.helpers import (
    add_request,
    are_finished,
    make_request,
    make_scheduler,
    plan_step,
    run,
    run_all,
)
from tests.support.fake_runner import EOS_ID, FakeRunner
from tgi_asgi.engine.budget import NextPrompt
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.step_time import StepSize


def test_nothing_to_do_is_no_step() -> None:
    assert make_scheduler().plan() is None


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    scheduler = make_scheduler()
    add_request(scheduler, make_request(5))
    (prefill,) = plan_step(scheduler).plan.rows
    (decode,) = plan_step(scheduler).plan.rows
    assert (prefill.start, len(prefill.token_ids or ()), prefill.samples) == (0, 5, True)
    assert (decode.start, decode.token_ids, decode.samples) == (5, None, True)


def test_a_length_limit_needs_no_result() -> None:
    scheduler = make_scheduler()
    add_request(scheduler, make_request(5, max_tokens=2))
    plan_step(scheduler)
    plan_step(scheduler)
    assert scheduler.plan() is None


def test_decode_rows_come_first_and_prompts_in_whole_blocks() -> None:
    scheduler, runner = make_scheduler(max_prefill_tokens=40), FakeRunner()
    add_request(scheduler, make_request(10))
    run(scheduler, runner, plan_step(scheduler))
    add_request(scheduler, make_request(100), arrival=1)
    sizes = []
    for _ in range(4):
        step = plan_step(scheduler)
        sizes.append([row.num_tokens for row in step.plan.rows])
        run(scheduler, runner, step)
    assert sizes == [[1, 32], [1, 32], [1, 36], [1, 1]]


def test_prompts_share_a_step_but_no_sliver_of_one_is_computed() -> None:
    scheduler = make_scheduler(max_prefill_tokens=64)
    for arrival, size in enumerate((30, 30, 30)):
        add_request(scheduler, make_request(list(range(arrival, arrival + size))), arrival)
    assert [row.num_tokens for row in plan_step(scheduler).plan.rows] == [30, 30]
    assert [row.num_tokens for row in plan_step(scheduler).plan.rows] == [1, 1, 30]


def test_a_step_never_exceeds_what_the_runner_takes() -> None:
    scheduler = make_scheduler(max_step_tokens=20)
    add_request(scheduler, make_request(16))
    plan_step(scheduler)
    add_request(scheduler, make_request(range(100, 200)), arrival=1)
    assert [row.num_tokens for row in plan_step(scheduler).plan.rows] == [1, 16]


def test_a_step_that_is_full_of_decode_rows_leaves_prompts_for_later() -> None:
    scheduler = make_scheduler(max_step_tokens=20)
    add_request(scheduler, make_request(18))
    plan_step(scheduler)
    add_request(scheduler, make_request(range(100, 200)), arrival=1)
    plan_step(scheduler)
    scheduler.traits = dataclasses.replace(scheduler.traits, max_step_tokens=1)
    assert [row.num_tokens for row in plan_step(scheduler).plan.rows] == [1]


def test_a_new_prompt_leaves_a_block_to_each_that_runs() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add_request(scheduler, make_request(range(20)), arrival=0)
    plan_step(scheduler)
    waiting = add_request(scheduler, make_request(range(100, 120)), arrival=1)[0]
    plan_step(scheduler)
    assert waiting.stage is Stage.WAITING
    scheduler.remove(scheduler.running[0])
    plan_step(scheduler)
    assert waiting in scheduler.running


def test_slots_and_blocks_come_back_at_the_end() -> None:
    scheduler, runner = make_scheduler(max_batch_size=2), FakeRunner()
    sequences = [add_request(scheduler, make_request(20), arrival)[0] for arrival in range(5)]
    run_all(scheduler, runner)
    assert are_finished(sequences)
    assert scheduler.pool.num_used == 0
    assert max(len(plan.rows) for plan in runner.plans) == 2


def test_priority_goes_before_arrival_and_waiting_makes_up_for_it() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    low = add_request(scheduler, make_request(5, priority=1), arrival=0)[0]
    high = add_request(scheduler, make_request(5, priority=0), arrival=29)[0]
    late = add_request(scheduler, make_request(5, priority=0), arrival=31)[0]
    order = []
    for _ in range(3):
        (sequence,) = plan_step(scheduler).sequences
        order.append(sequence)
        scheduler.remove(sequence)
    assert order == [high, low, late]


def test_the_next_slot_goes_to_the_tenant_that_runs_least() -> None:
    scheduler = make_scheduler(max_batch_size=4)
    greedy = [add_request(scheduler, make_request(5), arrival, "greedy")[0] for arrival in range(8)]
    assert plan_step(scheduler).sequences == greedy[:4]
    modest = [add_request(scheduler, make_request(5), 10 + arrival, "modest")[0] for arrival in range(3)]
    third = add_request(scheduler, make_request(5, priority=9), 20, "third")[0]
    started: list[Sequence] = []
    for sequence in greedy[:4]:
        scheduler.remove(sequence)
        running = set(scheduler.running)
        plan_step(scheduler)
        started += set(scheduler.running) - running
    # Tenants that run nothing come first, however short their wait; once each runs one, priority decides.
    assert started == [modest[0], third, greedy[4], greedy[5]]


def test_a_preempted_sequence_comes_back_before_new_ones_of_other_tenants() -> None:
    scheduler, runner = make_scheduler(num_blocks=8, max_batch_size=4), FakeRunner()
    old = add_request(scheduler, make_request(range(30), max_tokens=40), 0, "a")[0]
    new = add_request(scheduler, make_request(range(100, 130), max_tokens=40), 1, "a")[0]
    third = add_request(scheduler, make_request(range(200, 230), max_tokens=40), 2, "c")[0]
    while new.stage is not Stage.WAITING or not new.was_preempted:
        run(scheduler, runner, plan_step(scheduler))
    other = add_request(scheduler, make_request(range(60, 80)), 3, "b")[0]
    scheduler.remove(third)  # there are blocks again for one of the two that wait
    run(scheduler, runner, plan_step(scheduler))
    assert scheduler.running == (old, new)
    run_all(scheduler, runner)
    assert are_finished([old, new, other])


def test_prompts_wait_for_company_while_others_decode_but_not_for_ever() -> None:
    scheduler, runner = make_scheduler(waiting_served_ratio=1.0, max_waiting_steps=5), FakeRunner()
    running = [add_request(scheduler, make_request(5, max_tokens=100), arrival)[0] for arrival in range(2)]
    run(scheduler, runner, plan_step(scheduler))
    lonely = add_request(scheduler, make_request(5, max_tokens=100), arrival=2)[0]
    num_steps = 0
    while lonely.stage is Stage.WAITING:
        run(scheduler, runner, plan_step(scheduler))
        num_steps += 1
    assert num_steps == 6
    company = [add_request(scheduler, make_request(5), arrival)[0] for arrival in (3, 4, 5)]
    run(scheduler, runner, plan_step(scheduler))
    assert all(sequence.stage is Stage.RUNNING for sequence in (*running, *company))


@pytest.mark.parametrize("prompt_logprobs", [None, 0])  # once computed, they do not matter
def test_the_least_urgent_is_preempted_and_comes_back_through_the_cache(prompt_logprobs: int | None) -> None:
    scheduler, runner = make_scheduler(num_blocks=6), FakeRunner()
    old = add_request(scheduler, make_request(range(30), max_tokens=40), arrival=0)[0]
    request = make_request(range(100, 130), max_tokens=40, prompt_logprobs=prompt_logprobs)
    new = add_request(scheduler, request, arrival=1)[0]
    steps = run_all(scheduler, runner)
    assert are_finished([old, new])
    assert scheduler._stats.preemptions == 1
    last_of_old = max(at for at, step in enumerate(steps) if old in step.sequences)
    first_back = next(
        at
        for at, step in enumerate(steps)
        if at > 0 and new in step.sequences and any(start.output_ids for start in step.plan.starts)
    )
    row = steps[first_back].plan.rows[steps[first_back].sequences.index(new)]
    assert first_back >= last_of_old
    assert row.start > 0, "its blocks must still be cached"
    assert runner.violations == []


def test_a_priority_decides_who_is_preempted() -> None:
    scheduler, runner = make_scheduler(num_blocks=6), FakeRunner()
    low = add_request(scheduler, make_request(range(30), max_tokens=40, priority=2), arrival=0)[0]
    run(scheduler, runner, plan_step(scheduler))
    high = add_request(scheduler, make_request(range(100, 130), max_tokens=40), arrival=1)[0]
    while scheduler._stats.preemptions == 0:
        run(scheduler, runner, plan_step(scheduler))
    assert (low.stage, high.stage) == (Stage.WAITING, Stage.RUNNING)


def test_who_holds_most_blocks_is_preempted_whatever_others_wait_for() -> None:
    scheduler, runner = make_scheduler(num_blocks=10), FakeRunner()
    greedy = [
        add_request(scheduler, make_request(range(at, at + 30), max_tokens=50), at, "greedy")[0]
        for at in (0, 50, 100)
    ]
    run(scheduler, runner, plan_step(scheduler))
    late = make_request(range(150, 160), max_tokens=50, priority=9)
    modest = add_request(scheduler, late, 150, "modest")[0]
    while scheduler._stats.preemptions == 0:
        run(scheduler, runner, plan_step(scheduler))
    assert modest.stage is Stage.RUNNING, "it has the lowest priority, but holds the fewest blocks"
    assert [sequence.stage for sequence in greedy] == [Stage.RUNNING] * 2 + [Stage.WAITING]
    run_all(scheduler, runner)
    assert are_finished([*greedy, modest])
    assert runner.violations == []


def test_the_most_urgent_is_never_preempted_whatever_it_holds() -> None:
    scheduler, runner = make_scheduler(num_blocks=6), FakeRunner()
    large = add_request(scheduler, make_request(range(50), max_tokens=40), 0, "large")[0]
    small = add_request(scheduler, make_request(range(100, 110), max_tokens=40), 1, "small")[0]
    while scheduler._stats.preemptions == 0:
        run(scheduler, runner, plan_step(scheduler))
    assert (large.stage, small.stage) == (Stage.RUNNING, Stage.WAITING)
    run_all(scheduler, runner)
    assert are_finished([large, small])


def test_a_priority_does_not_count_as_waiting() -> None:
    """The scheduler sizes a prompt's chunks by how long it has waited."""
    waited: list[float] = []

    class Budget:
        def tokens(self, num_decode_rows: int, prompt: NextPrompt, waited_s: float) -> int:
            waited.append(waited_s)
            return 512

    scheduler = make_scheduler()
    scheduler._budget = Budget()  # type: ignore[assignment]
    add_request(scheduler, make_request(5, priority=-10), arrival=100)
    scheduler.plan(now=101.0)
    assert set(waited) == {1.0}


@pytest.mark.parametrize(("windows", "reach"), [((None,), 1000), ((None, 40), 1000), ((40,), 40)])
def test_steps_are_sized_by_the_tokens_that_the_next_prompt_reads(
    windows: tuple[int | None, ...], reach: int
) -> None:
    seen: list[NextPrompt] = []

    class Budget:
        def tokens(self, num_decode_rows: int, prompt: NextPrompt, waited_s: float) -> int:
            seen.append(prompt)
            return 64

    scheduler, runner = (
        make_scheduler(windows=windows, num_blocks=100),
        FakeRunner(windows=windows, num_blocks=100),
    )
    scheduler._budget = Budget()  # type: ignore[assignment]
    add_request(scheduler, make_request(range(160), max_tokens=1), arrival=1)
    pairs = [step.size.num_pairs for step in run_all(scheduler, runner)]
    assert seen[::2] == [
        NextPrompt(160, 0, 0),
        NextPrompt(160, 0, min(64, reach)),
        NextPrompt(160, 0, min(128, reach)),
    ]
    assert pairs == [64 * 32, 64 * (min(64, reach) + 32), 32 * (min(128, reach) + 16)]
    seen.clear()
    add_request(scheduler, make_request(range(200), max_tokens=1), arrival=2)
    scheduler.plan()
    assert seen[0] == NextPrompt(40, min(160, reach), min(160, reach))  # the rest is cached


def test_only_prompts_that_fit_are_computed_for_a_second_while_nothing_decodes() -> None:
    """What arrives waits for the step in flight. Here, a token takes a millisecond."""
    scheduler, runner = make_scheduler(num_blocks=400, max_prefill_tokens=2048), FakeRunner(num_blocks=400)
    scheduler._budget.observe(StepSize(0, 1000), 1.0)
    add_request(scheduler, make_request(range(1500), max_tokens=1), arrival=0)
    for arrival in (1, 2):
        prompt = range(500 * arrival, 500 * arrival + 500)  # begins otherwise than all others
        add_request(scheduler, make_request(prompt, max_tokens=1), arrival=arrival)
    sizes = [step.num_prefill_tokens for step in run_all(scheduler, runner)]
    assert sizes == [400, 400, 400, 396, 904]  # the first one's last part is not a whole prompt


def test_a_preempted_sequence_forgets_what_a_step_in_flight_samples_for_it() -> None:
    scheduler, runner = make_scheduler(num_blocks=4), FakeRunner()
    add_request(scheduler, make_request(range(31), max_tokens=20), arrival=0)
    new = add_request(scheduler, make_request(range(100, 116), max_tokens=20), arrival=1)[0]
    first = plan_step(scheduler)
    second = plan_step(scheduler)  # the prompts' blocks are full, so the older sequence takes the last one
    run(scheduler, runner, first)
    third = plan_step(scheduler)
    assert new.stage is Stage.WAITING
    known = list(new.token_ids)
    run(scheduler, runner, second)
    assert list(new.token_ids) == known
    run(scheduler, runner, third)
    run_all(scheduler, runner)
    assert new.num_output == 20
    assert runner.violations == []


def test_blocks_of_a_finished_sequence_may_be_reused_while_a_step_still_writes_to_them() -> None:
    """The speculative row runs first, and its block's next owner overwrites what it wrote."""
    scheduler, runner = make_scheduler(num_blocks=2), FakeRunner(num_blocks=2)
    first = add_request(scheduler, make_request(range(16), max_tokens=10), arrival=0)[0]
    prefill, speculative = plan_step(scheduler), plan_step(scheduler)
    late_block = first.tables[0][-1]
    scheduler.apply(prefill, runner.execute(prefill.plan))
    scheduler.remove(first)  # as an EOS token does
    second = add_request(scheduler, make_request(range(100, 117), max_tokens=10), arrival=1)[0]
    reuse = plan_step(scheduler)
    assert late_block in second.tables[0]
    assert scheduler.apply(speculative, runner.execute(speculative.plan)) == []
    run(scheduler, runner, reuse)
    run_all(scheduler, runner)
    assert are_finished([second])
    assert runner.violations == []


def test_each_slot_is_told_what_was_sampled_and_what_may_not_be() -> None:
    scheduler, runner = make_scheduler(num_blocks=5), FakeRunner()
    add_request(scheduler, make_request(range(30), max_tokens=33), arrival=0)
    stop = {"min_tokens": 5, "stop_token_ids": frozenset({7})}
    new = add_request(scheduler, make_request(range(100, 128), max_tokens=30, stop=stop), arrival=1)[0]
    starts = [start for step in run_all(scheduler, runner) for start in step.plan.starts]
    first, back = [start for start in starts if start.prompt_ids[0] == 100]
    assert (first.output_ids, first.min_tokens, first.masked_ids) == ([], 5, (7, EOS_ID))
    assert back.output_ids == new.token_ids[28 : 28 + len(back.output_ids)] != []


def test_a_probe_gives_back_its_slot_and_its_blocks() -> None:
    scheduler = make_scheduler(max_batch_size=1, num_blocks=2, windows=(None, 40))
    for _ in range(2):
        probe = scheduler.probe()
        assert probe is not None
        assert (scheduler.probe(), scheduler.pool.num_free) == (None, 0)
        scheduler.end_probe(probe)
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize("order", [1, -1])
def test_cancelling_a_queued_request_leaves_nothing(order: int) -> None:
    scheduler = make_scheduler(max_batch_size=1)
    add_request(scheduler, make_request(5, max_tokens=1), arrival=0)
    queued = add_request(scheduler, make_request(5, n=3), arrival=1)
    plan_step(scheduler)
    assert scheduler.num_waiting == 3
    for sequence in queued[::order]:
        scheduler.remove(sequence)
    assert scheduler.num_waiting == 0
    assert are_finished(queued)
    assert scheduler.plan() is None


def test_a_blocked_queue_does_not_collect_the_cancelled() -> None:
    scheduler, runner = make_scheduler(max_batch_size=1), FakeRunner()
    first = add_request(scheduler, make_request(5, max_tokens=100), arrival=0)[0]
    run(scheduler, runner, plan_step(scheduler))
    for arrival in range(1, 1000):
        scheduler.remove(add_request(scheduler, make_request(5), arrival)[0])
    last = add_request(scheduler, make_request(5), arrival=1000)[0]
    assert len(scheduler._waiting) < 100
    scheduler.remove(first)
    assert plan_step(scheduler).sequences == [last]
