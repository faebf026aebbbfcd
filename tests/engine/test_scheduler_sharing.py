"""Sharing between sequences, by cached prefixes and further choices, also after failed steps."""

from __future__ import annotations

from typing import Any

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
from tests.support.fake_runner import FakeRunner
from tgi_asgi.engine.sequence import Stage
from tgi_asgi.types import Adapter, ImageInput, Pooling, PoolingKind


def test_a_second_prompt_takes_the_cached_prefix() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    add_request(scheduler, make_request(range(70)))
    run_all(scheduler, runner)
    again = add_request(scheduler, make_request([*range(50), 240]), arrival=1)[0]
    step = plan_step(scheduler)
    (row,) = step.plan.rows
    run(scheduler, runner, step)
    assert (row.start, row.num_tokens, again.num_cached) == (48, 3, 48)
    assert scheduler._stats.prefix_hit_tokens == 48
    assert scheduler._stats.prefix_query_tokens == 70 + 51


@pytest.mark.parametrize("num_blocks", [0, 1, 63, 64, 65, 128, 150])
@pytest.mark.parametrize("windows", [(None,), (None, 5)])
def test_a_long_prefix_is_found_up_to_the_first_block_that_differs(
    num_blocks: int, windows: tuple[int | None, ...]
) -> None:
    """The lookup goes through a prompt 64 blocks at a time."""
    sizes: dict[str, Any] = {"num_blocks": 1000, "block_size": 4, "windows": windows}
    scheduler, runner = make_scheduler(**sizes), FakeRunner(**sizes)
    prompt = [index * 7 % 200 for index in range(600)]
    add_request(scheduler, make_request(prompt, 1))
    run_all(scheduler, runner)
    changed = [*prompt[: num_blocks * 4], 230, *prompt[num_blocks * 4 + 1 :], 231]
    add_request(scheduler, make_request(changed, 1), arrival=1)
    assert plan_step(scheduler).plan.rows[0].start == num_blocks * 4


def test_prompts_of_one_step_compute_what_they_share_once() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    first, *others = [add_request(scheduler, make_request([*range(64), own]), own)[0] for own in (65, 66, 67)]
    step = plan_step(scheduler)
    assert step.sequences == [first, *others]
    assert [(row.start, row.num_tokens) for row in step.plan.rows] == [(0, 65), (64, 1), (64, 1)]
    run(scheduler, runner, step)
    assert [sequence.num_cached for sequence in (first, *others)] == [0, 64, 64]
    assert (scheduler._stats.prefix_query_tokens, scheduler._stats.prefix_hit_tokens) == (3 * 65, 2 * 64)
    run_all(scheduler, runner)
    assert runner.violations == []


@pytest.mark.parametrize("has_ended", [False, True])
def test_what_a_step_in_flight_computes_is_found(has_ended: bool) -> None:
    """The rows of a finished sequence still run, before those of the sequences that found its blocks."""
    scheduler, runner = make_scheduler(), FakeRunner()
    [one] = add_request(scheduler, make_request(range(64)), 0)
    first = plan_step(scheduler)
    if has_ended:
        scheduler.remove(one)
    add_request(scheduler, make_request([*range(64), 70]), 1)
    second = plan_step(scheduler)
    assert [row.start for row in second.plan.rows] == [64] * (2 - has_ended)
    run(scheduler, runner, first)
    run(scheduler, runner, second)
    run_all(scheduler, runner)
    assert runner.violations == []


@pytest.mark.parametrize("has_prompt_arithmetic", [False, True])
def test_a_prompt_that_was_cancelled_is_found_as_far_as_it_is_computed(has_prompt_arithmetic: bool) -> None:
    scheduler = make_scheduler(max_prefill_tokens=32, has_prompt_arithmetic=has_prompt_arithmetic)
    [cancelled] = add_request(scheduler, make_request(range(100)), 0)
    plan_step(scheduler)
    scheduler.remove(cancelled)
    add_request(scheduler, make_request(range(100)), 1)
    assert [row.start for row in plan_step(scheduler).plan.rows] == [32]


def test_what_is_left_of_a_budget_below_a_block_starts_nobody() -> None:
    """Otherwise it would query the cache for blocks that the prompt before it is about to compute."""
    scheduler, runner = make_scheduler(max_prefill_tokens=40), FakeRunner()
    for own in range(4):
        add_request(scheduler, make_request([*range(100), 200 + own]), own)
    steps = run_all(scheduler, runner)
    assert [[row.num_tokens for row in step.plan.rows] for step in steps[:3]] == [[32], [32], [37]]
    # The first sequence decodes one token; the others compute five each after 96 shared tokens.
    assert [row.num_tokens for row in steps[3].plan.rows] == [1, 5, 5, 5]


def test_hits_on_what_a_failed_step_was_to_compute_are_dropped() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    first = add_request(scheduler, make_request([*range(64), 70]), 0)[0]
    failed = plan_step(scheduler)
    second = add_request(scheduler, make_request([*range(64), 80]), 1)[0]
    following = plan_step(scheduler)
    for step in (failed, following):
        runner.execute(step.plan, is_tainted=True)
    scheduler.rollback(following)
    scheduler.rollback(failed)
    assert (first.stage, second.stage) == (Stage.RUNNING, Stage.WAITING)
    assert scheduler.retry(failed, range(1), max_tokens=16) is not None
    again = plan_step(scheduler)  # planned after the retry of a quarter, which no sequence waited for
    assert [(row.start, row.num_tokens) for row in again.plan.rows] == [(16, 49), (64, 1)]
    assert scheduler._stats.prefix_query_tokens == 0, "no step has returned a result yet"


@pytest.mark.parametrize("wants_prompt_logprobs", [False, True])
def test_a_choice_waits_for_a_prompt_that_is_tried_again_in_parts(wants_prompt_logprobs: bool) -> None:
    scheduler, runner = make_scheduler(max_prefill_tokens=32), FakeRunner()
    request = make_request(range(60), n=2, prompt_logprobs=0 if wants_prompt_logprobs else None)
    leader, follower = add_request(scheduler, request)
    run(scheduler, runner, plan_step(scheduler))
    failed, following = plan_step(scheduler), plan_step(scheduler)
    assert following.sequences == [leader, follower], "the test's setup has changed"
    for step in (failed, following):
        runner.execute(step.plan, is_tainted=True)
    scheduler.rollback(following)
    scheduler.rollback(failed)
    assert follower.stage is Stage.AWAITS_LEADER
    part = scheduler.retry(failed, range(1), max_tokens=16)
    assert part is not None
    run(scheduler, runner, part)
    while follower.stage is Stage.AWAITS_LEADER:
        step = plan_step(scheduler)
        assert step.sequences == [leader]
        run(scheduler, runner, step)
    run_all(scheduler, runner)
    assert are_finished([leader, follower])
    assert runner.violations == []


def test_the_next_turn_computes_only_what_is_new() -> None:
    """The answer's blocks are cached as well as the prompt's."""
    scheduler, runner = make_scheduler(), FakeRunner()
    sequence = add_request(scheduler, make_request(20, max_tokens=60))[0]
    run_all(scheduler, runner)
    add_request(scheduler, make_request([*sequence.token_ids, 7, 8, 9]), arrival=1)
    (row,) = plan_step(scheduler).plan.rows
    # The answer's last token has no KV entries: it was sampled but never fed to the model.
    assert row.start == (20 + 59) // 16 * 16


def test_one_token_is_computed_even_if_all_blocks_are_cached() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    for arrival in range(2):
        add_request(scheduler, make_request(range(32)), arrival)
        step = plan_step(scheduler)
        run(scheduler, runner, step)
        run_all(scheduler, runner)
    assert [(row.start, row.num_tokens) for row in step.plan.rows] == [(16, 16)]


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_salt": "mine"},
        {"adapter": Adapter("lora", "1", "its weights")},
        {"prompt_logprobs": 0},
        {"pooling": Pooling(PoolingKind.MEAN)},
    ],
)
def test_who_must_not_share_does_not(fields: dict[str, Any]) -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    add_request(scheduler, make_request(range(70)))
    run_all(scheduler, runner)
    add_request(scheduler, make_request(range(70), **fields), arrival=1)
    assert plan_step(scheduler).plan.rows[0].start == 0


def test_prompts_with_different_images_share_what_comes_before_them() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    red, blue = (ImageInput(colour * 32, 20, 15, payload=None) for colour in (b"r", b"b"))
    for arrival, image in enumerate((red, blue, red)):
        add_request(scheduler, make_request(range(40), images=(image,)), arrival)
    step = plan_step(scheduler)
    assert [row.start for row in step.plan.rows] == [0, 16, 32]
    run(scheduler, runner, step)
    run_all(scheduler, runner)
    for arrival, image in enumerate((blue, red), 3):
        add_request(scheduler, make_request(range(40), images=(image,)), arrival)
    add_request(scheduler, make_request(range(40)), arrival=5)
    assert [row.start for row in plan_step(scheduler).plan.rows] == [32, 32, 16]
    assert runner.violations == []


def test_without_the_prefix_cache_nothing_is_shared_or_counted() -> None:
    scheduler, runner = make_scheduler(prefix_cache=False), FakeRunner()
    for arrival in range(2):
        add_request(scheduler, make_request(range(70)), arrival)
        assert plan_step(scheduler).plan.rows[0].start == 0
        scheduler.remove(scheduler.running[0])
    assert scheduler._stats.prefix_query_tokens == 0
    assert runner.violations == []


@pytest.mark.parametrize("prompt_len", [1, 15, 16, 17, 33, 48])
def test_further_choices_share_full_blocks_and_copy_the_partial_one(prompt_len: int) -> None:
    scheduler, runner = make_scheduler(), FakeRunner(max_batch_size=8)
    leader, second, third = add_request(scheduler, make_request(prompt_len, max_tokens=40, n=3))
    step = plan_step(scheduler)
    assert step.sequences == [leader]
    run(scheduler, runner, step)
    forks = plan_step(scheduler)
    assert forks.sequences == [leader, second, third]
    num_shared = (prompt_len - 1) // 16
    for sequence in (second, third):
        row = forks.plan.rows[forks.sequences.index(sequence)]
        assert (row.start, row.num_tokens, row.samples) == (prompt_len - 1, 1, True)
        assert sequence.tables[0][:num_shared] == leader.tables[0][:num_shared]
        assert sequence.tables[0][num_shared] not in leader.tables[0]
        assert sequence.token_ids.prompt is leader.request.prompt_ids
    assert len(forks.plan.copies) == (2 if (prompt_len - 1) % 16 else 0)
    run(scheduler, runner, forks)
    run_all(scheduler, runner)
    assert are_finished([leader, second, third])
    assert scheduler._stats.prefix_query_tokens == prompt_len, "only the first choice looks its prompt up"
    assert scheduler.pool.num_used == 0
    assert runner.violations == []


@pytest.mark.parametrize("prompt_logprobs", [None, 0])  # only the first choice has them
def test_further_choices_whose_first_is_gone_go_through_the_cache(prompt_logprobs: int | None) -> None:
    scheduler, runner = make_scheduler(max_batch_size=1), FakeRunner(max_batch_size=1)
    sequences = add_request(scheduler, make_request(40, max_tokens=3, n=3, prompt_logprobs=prompt_logprobs))
    steps = run_all(scheduler, runner)
    assert are_finished(sequences)
    starts = [row.start for step in steps for row in step.plan.rows if (row.token_ids or ())[1:]]
    assert starts == [0, 32, 32]


def test_further_choices_compute_a_prompt_that_their_first_never_did() -> None:
    scheduler = make_scheduler()
    first, second = add_request(scheduler, make_request(40, n=2))
    scheduler.remove(first)
    assert plan_step(scheduler).sequences == [second]


def test_what_a_poisoned_sequence_wrote_is_not_found() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    poisoned = add_request(scheduler, make_request(range(70), max_tokens=20))[0]
    run(scheduler, runner, plan_step(scheduler))
    scheduler.remove(poisoned, forget=True)
    add_request(scheduler, make_request(range(70)), arrival=1)
    assert plan_step(scheduler).plan.rows[0].start == 0


def test_a_failed_step_and_the_one_behind_it_are_computed_again() -> None:
    scheduler, runner = make_scheduler(), FakeRunner()
    sequences = add_request(scheduler, make_request(20, max_tokens=12, n=2))
    run(scheduler, runner, plan_step(scheduler))
    failed, following = plan_step(scheduler), plan_step(scheduler)
    runner.execute(failed.plan, is_tainted=True)
    runner.execute(following.plan, is_tainted=True)
    scheduler.rollback(following)
    scheduler.rollback(failed)
    for rows in (range(1), range(1, 2)):
        again = scheduler.retry(failed, rows)
        assert again is not None
        assert again.sequences == [sequences[rows[0]]]
        run(scheduler, runner, again)
    run_all(scheduler, runner)
    assert are_finished(sequences)
    assert runner.violations == []
    assert scheduler.pool.num_used == 0


def test_rows_that_ended_are_not_tried_again() -> None:
    scheduler = make_scheduler()
    sequence = add_request(scheduler, make_request(20))[0]
    failed = plan_step(scheduler)
    scheduler.rollback(failed)
    scheduler.remove(sequence)
    assert scheduler.retry(failed, range(1)) is None


def test_a_choice_does_not_fork_from_a_prompt_that_this_very_step_computes_again() -> None:
    scheduler = make_scheduler(num_blocks=7, max_batch_size=2, prefix_cache=False)
    runner = FakeRunner(num_blocks=7, max_batch_size=2)
    add_request(scheduler, make_request(range(14), max_tokens=80), arrival=0)
    leader, follower = add_request(scheduler, make_request(range(100, 120), max_tokens=60, n=2), arrival=1)
    steps = run_all(scheduler, runner)
    assert scheduler._stats.preemptions >= 1
    first = next(step for step in steps if follower in step.sequences)
    assert leader in first.sequences, "the test's setup has changed"
    assert first.plan.rows[first.sequences.index(follower)].start == 0
    assert runner.violations == []
    assert are_finished([leader, follower])
