"""Kept states: prompts resume only from an existing one, and failed or forgotten ones are freed."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
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
from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.hits import find_hit
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.states import KeptStates
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.runner.plan import StepRow
from tgi_asgi.types import Adapter

BLOCK = 16
MANY_STATES = 20


def make(num_kept_states: int | None = MANY_STATES, **changes: Any) -> tuple[Scheduler, FakeRunner]:
    scheduler = make_scheduler(
        num_kept_states=num_kept_states, prefix_cache=num_kept_states != 0, **{"num_blocks": 64} | changes
    )
    return scheduler, FakeRunner(
        num_kept_states=num_kept_states, num_blocks=scheduler.pool.num_blocks, max_batch_size=8
    )


def states_of(scheduler: Scheduler) -> KeptStates:
    assert scheduler.tables.states is not None
    return scheduler.tables.states


def kept_at(row: StepRow) -> list[int]:
    """Return the positions at which a row keeps its state."""
    return [] if row.states is None else [position for position, _ in row.states.keeps]


def ask(
    scheduler: Scheduler, runner: FakeRunner, prompt: Tokens[int], max_tokens: int = 1, **fields: Any
) -> tuple[Sequence, StepRow]:
    """Run a single request; return its sequence and its first row."""
    request = make_request(prompt, max_tokens, **fields)
    [sequence] = add_request(scheduler, request, scheduler._next_step)
    first = run_all(scheduler, runner)[0].plan.rows[0]
    assert runner.violations == []
    return sequence, first


def test_a_prompt_is_gone_on_with_where_its_last_full_block_ends() -> None:
    scheduler, runner = make()
    _, first = ask(scheduler, runner, range(70))
    assert kept_at(first) == [64]
    again, row = ask(scheduler, runner, range(70))
    assert (row.start, row.num_tokens, again.num_cached) == (64, 6, 64)
    assert scheduler._stats.prefix_hit_tokens == 64
    _, row = ask(scheduler, runner, [*range(66), 240, 241])
    assert row.start == 64


def test_one_token_is_left_to_compute() -> None:
    scheduler, runner = make()
    assert kept_at(ask(scheduler, runner, range(64))[1]) == [48]
    assert ask(scheduler, runner, range(64))[1].start == 48


def test_a_common_beginning_is_kept_as_soon_as_it_shows() -> None:
    """The second prompt finds blocks up to 64 but no state there, so it keeps one for the third."""
    scheduler, runner = make()
    ask(scheduler, runner, [*range(70), *range(100, 130)])
    second, row = ask(scheduler, runner, [*range(70), *range(160, 200)])
    assert (row.start, second.num_cached, kept_at(row)) == (0, 0, [64, 96])
    third, row = ask(scheduler, runner, [*range(70), *range(220, 251)])
    assert (row.start, third.num_cached, kept_at(row)) == (64, 64, [96])


def test_prompts_of_one_step_keep_what_they_share_once() -> None:
    scheduler, runner = make()
    for own in range(3):
        add_request(scheduler, make_request([*range(32), own, own]), own)
    step = plan_step(scheduler)
    assert [(row.start, kept_at(row)) for row in step.plan.rows] == [(0, [32]), (0, []), (0, [])]
    run(scheduler, runner, step)
    run_all(scheduler, runner)
    assert ask(scheduler, runner, [*range(32), 9])[1].start == 32


def test_states_are_kept_in_the_middle_of_chunks_and_found_with_the_result() -> None:
    scheduler, runner = make(max_prefill_tokens=48)
    [sequence] = add_request(scheduler, make_request(range(100), 1))
    steps = [plan_step(scheduler), plan_step(scheduler), plan_step(scheduler)]
    assert [kept_at(step.plan.rows[0]) for step in steps] == [[], [], [96]]
    digest = sequence.chain.digest(5, sequence.token_ids)
    for step in steps:
        assert states_of(scheduler).pool.find(digest) is None
        run(scheduler, runner, step)
    assert states_of(scheduler).pool.find(digest) is not None


def test_a_prompt_goes_on_from_its_own_state_behind_its_first_chunk() -> None:
    """This holds even if the second chunk is planned before the first has run; the kept state is released."""
    scheduler, runner = make(max_prefill_tokens=32)
    ask(scheduler, runner, range(40))
    add_request(scheduler, make_request([*range(40), *range(100, 160)]), 5)
    first, second = plan_step(scheduler), plan_step(scheduler)
    assert [step.plan.rows[0].start for step in (first, second)] == [32, 64]
    assert first.plan.rows[0].states is not None and second.plan.rows[0].states is None
    assert states_of(scheduler).pool.num_used == 1
    run(scheduler, runner, first)
    assert states_of(scheduler).pool.num_used == 0
    run(scheduler, runner, second)
    run_all(scheduler, runner)
    assert runner.violations == []


def test_the_next_turn_goes_on_behind_the_answer() -> None:
    scheduler, runner = make()
    sequence, _ = ask(scheduler, runner, range(20), max_tokens=60)
    # One state of the prompt, and one that moves along with the answer.
    assert states_of(scheduler).pool.num_touched == states_of(scheduler).num_known == 2
    _, row = ask(scheduler, runner, [*sequence.token_ids, 7, 8, 9])
    # The answer's last token has no state: it was sampled but never fed to the model.
    assert row.start == (20 + 59) // BLOCK * BLOCK


def test_a_state_in_use_is_not_written_to() -> None:
    """A request starts from an answer's state, so that answer continues in another place."""
    scheduler, runner = make()
    [first] = add_request(scheduler, make_request(range(31), 40))
    for _ in range(4):
        run(scheduler, runner, plan_step(scheduler))
    place = first.recurrent.answer
    assert place is not None and first.num_computed == 34
    for _ in range(13):
        run(scheduler, runner, plan_step(scheduler))
    add_request(scheduler, make_request([*first.token_ids[:33], 7]), 1)
    flying, following = plan_step(scheduler), plan_step(scheduler)
    assert flying.plan.rows[1].states is not None and flying.plan.rows[1].states.resumes == place
    assert kept_at(following.plan.rows[0]) == [48] and first.recurrent.answer != place
    for step in (flying, following):
        run(scheduler, runner, step)
    run_all(scheduler, runner)
    assert runner.violations == []


def test_answers_hold_half_of_the_places_at_most() -> None:
    scheduler, runner = make(num_kept_states=4)
    for own in range(6):
        add_request(scheduler, make_request([own] * 20, 20), own)
    for _ in range(16):
        run(scheduler, runner, plan_step(scheduler))
    held = [sequence.recurrent.answer for sequence in scheduler.running]
    assert sum(place is not None for place in held) == 2
    run_all(scheduler, runner)
    assert runner.violations == []


@pytest.mark.parametrize("boundary", [BLOCK, 2 * BLOCK])
def test_an_answer_takes_no_place_while_none_is_free_but_keeps_its_own(boundary: int) -> None:
    scheduler, runner = make(num_kept_states=2)
    ask(scheduler, runner, [*range(70), *range(100, 130)])
    add_request(scheduler, make_request([200] * (BLOCK - 1), 40), 1)
    for _ in range(boundary - BLOCK + 1):
        run(scheduler, runner, plan_step(scheduler))
    add_request(scheduler, make_request([*range(70), *range(160, 200)]), 2)
    flying, following = plan_step(scheduler), plan_step(scheduler)
    assert kept_at(flying.plan.rows[1]) and not states_of(scheduler).pool.num_free
    assert following.plan.rows[0].start == boundary
    assert kept_at(following.plan.rows[0]) == ([] if boundary == BLOCK else [boundary])
    for step in (flying, following):
        run(scheduler, runner, step)
    run_all(scheduler, runner)
    assert runner.violations == []


def test_the_longest_unused_is_given_up() -> None:
    scheduler, runner = make(num_kept_states=2)
    for own in range(2):
        ask(scheduler, runner, [own] * 40)
    ask(scheduler, runner, [0] * 40)
    assert ask(scheduler, runner, [2] * 40)[1].start == 0
    assert ask(scheduler, runner, [0] * 40)[1].start == 32
    assert ask(scheduler, runner, [1] * 40)[1].start == 0
    assert states_of(scheduler).pool.num_touched == 2


def test_states_in_use_are_not_given_up() -> None:
    scheduler, runner = make(num_kept_states=1)
    ask(scheduler, runner, range(40))
    add_request(scheduler, make_request(range(40)), 1)
    add_request(scheduler, make_request([7] * 40), 2)
    step = plan_step(scheduler)
    assert [(row.start, kept_at(row)) for row in step.plan.rows] == [(32, []), (0, [])]
    run(scheduler, runner, step)
    run_all(scheduler, runner)
    assert runner.violations == []


@pytest.mark.parametrize("num_kept_states", [0, 1])
def test_without_a_state_nothing_is_taken_from_the_cache(num_kept_states: int) -> None:
    scheduler, runner = make(num_kept_states)
    for own in range(3):
        _, row = ask(scheduler, runner, [own % 2] * 40)
        assert row.start == 0


def test_a_step_that_failed_leaves_no_state() -> None:
    scheduler, runner = make()
    [sequence] = add_request(scheduler, make_request(range(70), 1))
    failed = plan_step(scheduler)
    runner.execute(failed.plan, is_tainted=True)
    scheduler.rollback(failed)
    pool = states_of(scheduler).pool
    assert pool.num_used == 0 and not pool.num_known
    again = scheduler.retry(failed, range(1), max_tokens=32)
    while again is not None:  # in parts; the last keeps the states of the whole
        run(scheduler, runner, again)
        assert sequence.num_computed <= 32 or pool.num_used + pool.num_known <= 1
        again = scheduler.plan()
    assert are_finished([sequence]) and runner.violations == []
    assert ask(scheduler, runner, range(70))[1].start == 64


def test_what_is_forgotten_with_a_request_is_not_gone_on_with() -> None:
    scheduler, runner = make()
    [sequence] = add_request(scheduler, make_request(range(70), 4))
    run(scheduler, runner, plan_step(scheduler))
    flying = plan_step(scheduler)
    scheduler.remove(sequence, forget=True)
    run(scheduler, runner, flying)
    assert not states_of(scheduler).num_known and states_of(scheduler).pool.num_used == 0
    assert ask(scheduler, runner, range(70))[1].start == 0


def test_a_reset_forgets_states() -> None:
    scheduler, runner = make()
    ask(scheduler, runner, range(70))
    [sequence] = add_request(scheduler, make_request([9] * 70), 1)
    flying = plan_step(scheduler)
    scheduler.pool.reset()
    run(scheduler, runner, flying)
    assert not states_of(scheduler).num_known
    run_all(scheduler, runner)
    assert are_finished([sequence])
    assert ask(scheduler, runner, range(70))[1].start == 0


def test_states_go_with_their_blocks() -> None:
    scheduler, runner = make(num_blocks=8)
    ask(scheduler, runner, range(70))
    ask(scheduler, runner, [200] * 100)
    assert ask(scheduler, runner, range(70))[1].start == 0
    assert runner.violations == []


@pytest.mark.parametrize(
    "fields",
    [{"cache_salt": "mine"}, {"adapter": Adapter("lora", "1", "its weights")}, {"prompt_logprobs": 0}],
)
def test_who_must_not_share_does_not(fields: dict[str, Any]) -> None:
    scheduler, runner = make()
    ask(scheduler, runner, range(70))
    assert ask(scheduler, runner, range(70), **fields)[1].start == 0


def test_what_was_sampled_is_not_kept_where_prompts_have_an_arithmetic() -> None:
    scheduler, runner = make(has_prompt_arithmetic=True)
    runner.has_prompt_arithmetic = True
    sequence, _ = ask(scheduler, runner, range(40), max_tokens=40)
    assert ask(scheduler, runner, [*sequence.token_ids, 7])[1].start == 32


@pytest.mark.parametrize("prompt_len", [1, 2, 16, 17, 40])
def test_choices_begin_in_front_of_the_last_token(prompt_len: int) -> None:
    scheduler, runner = make()
    sequences = add_request(scheduler, make_request(range(prompt_len), 20, n=3))
    run(scheduler, runner, plan_step(scheduler))
    step = plan_step(scheduler)
    assert [row.start for row in step.plan.rows] == [prompt_len, prompt_len - 1, prompt_len - 1]
    assert states_of(scheduler).pool.num_used == (prompt_len > 1) + (prompt_len == 16)
    run(scheduler, runner, step)
    assert states_of(scheduler).pool.num_used == (prompt_len == 16), "no choice needs it any more"
    run_all(scheduler, runner)
    assert are_finished(sequences) and runner.violations == []
    assert states_of(scheduler).pool.num_used == 0


def test_choices_compute_the_prompt_where_nothing_is_kept() -> None:
    scheduler, runner = make(num_kept_states=0)
    add_request(scheduler, make_request(range(40), 20, n=2))
    run(scheduler, runner, plan_step(scheduler))
    assert [row.start for row in plan_step(scheduler).plan.rows] == [40, 0]


def test_choices_wait_for_a_prompt_whose_end_is_computed_again() -> None:
    """The last chunk is the one token that the choices do not share; they read only its state."""
    scheduler, runner = make(max_prefill_tokens=32)
    leader, follower = add_request(scheduler, make_request(range(33), 4, n=2))
    run(scheduler, runner, plan_step(scheduler))
    failed, following = plan_step(scheduler), plan_step(scheduler)
    assert [row.num_tokens for row in failed.plan.rows] == [1]
    assert following.sequences == [leader, follower], "the test's setup has changed"
    for step in (failed, following):
        runner.execute(step.plan, is_tainted=True)
    scheduler.rollback(following)
    scheduler.rollback(failed)
    again = scheduler.retry(failed, range(1))
    assert again is not None and again.sequences == [leader]
    run(scheduler, runner, again)
    run_all(scheduler, runner)
    assert are_finished([leader, follower]) and runner.violations == []


def test_a_preempted_sequence_goes_on_from_its_newest_state() -> None:
    scheduler, runner = make()
    [sequence] = add_request(scheduler, make_request(range(20), 60))
    for _ in range(36):
        run(scheduler, runner, plan_step(scheduler))
    scheduler._suspend(sequence)
    (row,) = plan_step(scheduler).plan.rows
    assert (row.start, row.num_tokens) == (48, len(sequence.token_ids) - 48)


def test_blocks_without_a_state_are_not_looked_up_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt whose blocks are all cached, but after none of which a state is kept."""
    [sequence] = add_request(make_scheduler(block_size=4), make_request(range(400)))
    pool = BlockPool(200)
    for digest in sequence.chain.digests(0, 100, sequence.token_ids):
        pool.register(pool.allocate(), digest)
    lookups: list[bytes] = []
    find = BlockPool.find

    def count(pool: BlockPool, digest: bytes) -> int | None:
        lookups.append(digest)
        return find(pool, digest)

    monkeypatch.setattr(BlockPool, "find", count)
    states = KeptStates(MANY_STATES, pool, 4, keeps_answers=True)
    hit = find_hit(pool, BlockNeeds((None,), 4, 16), sequence, 100, states)
    assert (hit.num_blocks, hit.num_found, hit.state) == (0, 100, None)
    assert len(lookups) < 10
