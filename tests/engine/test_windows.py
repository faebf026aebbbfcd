"""Groups of layers with windows: the blocks that a sequence holds, frees early, and finds again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.helpers import (
    add_request,
    are_finished,
    make_request,
    make_scheduler,
    plan_step,
    run,
    run_all,
)
from tests.support.fake_runner import FakeRunner, expected_tokens
from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.hits import find_hit, group_key
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.states import KeptStates
from tgi_asgi.engine.step import Step
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.types import Bidirectional, ImageInput, SamplingParams

BLOCK = 16


def make(
    windows: tuple[int | None, ...], num_blocks: int = 200, max_step_tokens: int = 40, **changes: Any
) -> tuple[Scheduler, FakeRunner]:
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        windows=windows,
        max_step_tokens=max_step_tokens,
        max_prefill_tokens=32,
        **changes,
    )
    runner = FakeRunner(num_blocks=num_blocks, windows=windows, max_step_tokens=max_step_tokens)
    return scheduler, runner


def held(sequence: Sequence) -> list[int]:
    """Return the number of blocks that a sequence holds in each group."""
    pairs = zip(sequence.tables, sequence.num_freed, strict=True)
    return [len(table) - first for table, first in pairs]


def max_held(scheduler: Scheduler, runner: FakeRunner, sequence: Sequence) -> list[int]:
    """Run with two steps in flight; return the largest number of blocks held in each group."""
    most = [0] * scheduler.tables.num_groups
    flights: list[Step] = []
    while True:
        while len(flights) < 2 and (step := scheduler.plan()) is not None:
            flights.append(step)
        if sequence.stage is Stage.RUNNING:
            most = [max(pair) for pair in zip(most, held(sequence), strict=True)]
        if not flights:
            return most
        run(scheduler, runner, flights.pop(0))


def test_a_sequence_holds_its_window_and_a_chunk() -> None:
    scheduler, runner = make((None, 40))
    [sequence] = add_request(scheduler, make_request(range(1000), 100))
    # A window of 40 spans at most four blocks: three, and one that it shares with the tokens that follow.
    assert max_held(scheduler, runner, sequence) == [69, 3 + 3 + 1]
    assert are_finished([sequence])
    assert runner.violations == []


def test_a_stream_that_decodes_holds_no_more_than_its_window() -> None:
    scheduler, runner = make((None, 40), num_blocks=100)
    [sequence] = add_request(scheduler, make_request(range(20), 300))
    most = []
    while (step := scheduler.plan()) is not None:
        most.append(held(sequence)[1])
        assert scheduler.tables.num_held(sequence) == sum(held(sequence)), "as who holds most is preempted"
        run(scheduler, runner, step)
    assert max(most) == 4


def test_a_prompt_is_longer_than_a_pool_that_windows_alone_use() -> None:
    """Without windows, sixteen blocks would hold 128 tokens: eight blocks for each of the two groups."""
    scheduler, runner = make((40, 70), num_blocks=16)
    [sequence] = add_request(scheduler, make_request(range(1000), 60))
    run_all(scheduler, runner)
    assert are_finished([sequence])
    assert sequence.token_ids[1000:] == expected_tokens(range(1000), 60)
    assert runner.violations == []


def test_what_was_given_back_is_found_again() -> None:
    scheduler, runner = make((None, 40))
    add_request(scheduler, make_request(range(500), 20))
    run_all(scheduler, runner)
    for length in (480, 300, 170):
        [again] = add_request(scheduler, make_request([*range(length), 7, 8]), arrival=length)
        run_all(scheduler, runner)
        assert again.num_cached == length // BLOCK * BLOCK
    assert runner.violations == []


def forget(scheduler: Scheduler, sequence: Sequence, group: int, indices: Iterable[int]) -> None:
    """Remove blocks of a sequence's prompt from a group, as if other sequences had needed them."""
    keys = [group_key(sequence.chain.digest(index, sequence.token_ids), group) for index in indices]
    scheduler.pool.forget(block for key in keys if (block := scheduler.pool.find(key)) is not None)


@pytest.mark.parametrize(
    ("group", "lost", "expected"),
    [
        (1, range(7), 10),  # position 160 reads from 121 on, which is in block 7
        (1, [7], 7),
        (1, range(8), 0),
        (1, [9], 9),
        (0, [3], 3),  # both groups have blocks 0 to 2
        (0, [0], 0),
        (1, [0, 4, 8], 8),  # position 128 reads from 89 on: blocks 5 to 7
    ],
)
def test_a_prompt_is_resumed_where_all_groups_can(group: int, lost: Iterable[int], expected: int) -> None:
    scheduler, runner = make((None, 40))
    [first] = add_request(scheduler, make_request(range(160)))
    run_all(scheduler, runner)
    first.token_ids.output.clear()
    forget(scheduler, first, group, lost)
    [again] = add_request(scheduler, make_request([*range(160), 7]), arrival=1)
    run_all(scheduler, runner)
    assert again.num_cached == expected * BLOCK
    assert runner.violations == []


@given(
    windows=st.sampled_from([(None, 5), (5,), (9, 1), (None, None, 6), (17, 8, 8)]),
    known=st.lists(st.integers(0, 7), min_size=12, max_size=12),
    kept=st.none() | st.lists(st.booleans(), min_size=12, max_size=12),
    num_blocks=st.integers(0, 12),
)
def test_a_hit_is_the_longest_that_all_groups_serve(
    windows: tuple[int | None, ...], known: list[int], kept: list[bool] | None, num_blocks: int
) -> None:
    """`known` holds a bit mask for each block of tokens: the groups that have it.

    `kept` says after which blocks a state is kept, of a model that has states.
    """
    scheduler = make_scheduler(block_size=4)
    [sequence] = add_request(scheduler, make_request(range(50)))
    pool, needs = BlockPool(200), BlockNeeds(windows, 4, 16)
    for index, groups in enumerate(known):
        for group in range(len(windows)):
            if groups >> group & 1:
                key = group_key(sequence.chain.digest(index, sequence.token_ids), group)
                pool.register(pool.allocate(), key)

    def serves(end: int, group: int) -> bool:
        window = windows[group]
        first = 0 if window is None else max(4 * end - window + 1, 0) // 4
        return all(known[index] >> group & 1 for index in range(first, end))

    states = None if kept is None else KeptStates(20, pool, 4, keeps_answers=True)
    places: dict[int, int] = {}  # of states, by the number of blocks before
    for index, is_kept in enumerate(kept or ()):
        if states is not None and is_kept:
            places[index + 1] = states.pool.allocate()
            states.pool.register(places[index + 1], sequence.chain.digest(index, sequence.token_ids))
    ends = [end for end in range(num_blocks + 1) if all(serves(end, group) for group in range(len(windows)))]
    hit = find_hit(pool, needs, sequence, num_blocks, states)
    assert hit.num_found == max(ends)
    assert hit.num_blocks == max(end for end in ends if kept is None or end == 0 or end in places)
    assert hit.state == places.get(hit.num_blocks)
    for group, blocks in enumerate(hit.blocks):
        first = needs.first_read(group, 4 * hit.num_blocks)
        keys = [
            group_key(sequence.chain.digest(index, sequence.token_ids), group)
            for index in range(first, hit.num_blocks)
        ]
        assert blocks == [pool.find(key) for key in keys]


@pytest.mark.parametrize(
    ("prompt_len", "num_steps", "shares"), [(101, 1, True), (101, 2, True), (101, 60, False), (102, 2, False)]
)
def test_further_choices_share_the_prompt_while_its_window_is_there(
    prompt_len: int, num_steps: int, shares: bool
) -> None:
    """The first choice runs alone for some steps; then the second copies its blocks or looks them up."""
    scheduler, runner = make((None, 40), max_batch_size=1)
    prompt = range(prompt_len)
    first, second = add_request(scheduler, make_request(prompt, 90, n=2, sampling=SamplingParams(seed=3)))
    for _ in range(3 + num_steps):
        run(scheduler, runner, plan_step(scheduler))
    scheduler._running.free_slots.append(1)
    step = plan_step(scheduler)
    assert step.sequences == [first, second]
    assert step.plan.rows[1].start == (prompt_len - 1 if shares else 96)
    assert len(step.plan.copies) == (2 if shares else 0)
    run(scheduler, runner, step)
    run_all(scheduler, runner)
    for sequence in (first, second):
        assert sequence.token_ids[prompt_len:] == expected_tokens(
            prompt, 90, sampling=sequence.request.sampling, choice=sequence.choice
        )
    assert runner.violations == []


def test_one_of_many_that_need_a_block_in_each_group_at_once_gives_way() -> None:
    sizes: dict[str, Any] = {"num_blocks": 30, "windows": (None, 40), "max_step_tokens": 200}
    scheduler, runner = make_scheduler(max_prefill_tokens=128, **sizes), FakeRunner(**sizes)
    eight = [add_request(scheduler, make_request(range(at, at + 16), 3), at)[0] for at in range(8)]
    run(scheduler, runner, plan_step(scheduler))
    assert scheduler.pool.num_free == 14, "less than two for each"
    assert plan_step(scheduler).sequences == eight[:7]


def test_an_urgent_prompt_takes_its_next_block_from_who_is_less_urgent() -> None:
    scheduler, runner = make((None, 40))
    [other] = add_request(scheduler, make_request(range(17), 99), arrival=1)
    run(scheduler, runner, plan_step(scheduler))
    [urgent] = add_request(scheduler, make_request(range(500)), arrival=0)
    run(scheduler, runner, plan_step(scheduler))
    taken = [scheduler.pool.allocate() for _ in range(scheduler.pool.num_free)]
    assert plan_step(scheduler).sequences == [urgent]
    assert other.stage is Stage.WAITING
    scheduler.pool.release(taken)


def test_a_prompt_without_a_free_block_has_no_row() -> None:
    scheduler, runner = make((None, 40))
    add_request(scheduler, make_request(range(500)))
    in_flight = plan_step(scheduler)
    taken = [scheduler.pool.allocate() for _ in range(scheduler.pool.num_free)]
    assert scheduler.plan() is None
    run(scheduler, runner, in_flight)
    scheduler.pool.release(taken)
    assert [row.start for row in plan_step(scheduler).plan.rows] == [32]


def test_a_prompt_that_goes_on_leaves_blocks_to_all_that_run() -> None:
    scheduler, runner = make((None, 40))
    for arrival, length in enumerate((17, 500)):
        add_request(scheduler, make_request(range(length), 99), arrival)
        run(scheduler, runner, plan_step(scheduler))
    taken = [scheduler.pool.allocate() for _ in range(scheduler.pool.num_free - 5)]
    # Of the five blocks, the next tokens of the two sequences need one in each group.
    assert [row.num_tokens for row in plan_step(scheduler).plan.rows] == [1, 16]
    scheduler.pool.release(taken)


def test_prompts_that_share_blocks_behind_their_windows_all_end_in_a_tight_pool() -> None:
    """The others may still hold the blocks that one frees: then no block is free and one must wait."""
    scheduler, runner = make((40,), num_blocks=14)
    add_request(scheduler, make_request(range(160), 1))
    run_all(scheduler, runner)
    sequences = [
        add_request(scheduler, make_request([*range(160), own, *range(300)], 30), arrival=own)[0]
        for own in (1, 2, 3)
    ]
    run_all(scheduler, runner)
    assert are_finished(sequences)
    assert runner.violations == []
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize("vision", Bidirectional)
def test_a_prompt_that_may_not_be_cut_takes_the_last_blocks(vision: Bidirectional) -> None:
    """It left one to each sequence, also for itself: no step was planned, and the engine slept for ever."""
    scheduler, runner = make((64, 32), num_blocks=16, max_step_tokens=512, vision=vision, prefix_cache=False)
    runner.vision = vision
    image = ImageInput(bytes(32), 0, 120, payload=None)
    sequences = [
        add_request(scheduler, make_request(range(96), 20))[0],
        add_request(scheduler, make_request(range(120), 1, images=(image,)), arrival=1)[0],
    ]
    run_all(scheduler, runner)
    assert are_finished(sequences)
    assert runner.violations == []


def test_prompts_that_may_not_be_cut_do_not_wait_for_each_other() -> None:
    """Admitted before either had its blocks, each took a part of what the other needed: nothing could run."""
    scheduler, runner = make(
        (None, 32), num_blocks=25, max_step_tokens=512, vision=Bidirectional.PROMPT, prefix_cache=False
    )
    runner.vision = Bidirectional.PROMPT
    images = [
        ImageInput(bytes(32), 12, 110, payload=None),
        ImageInput(bytes(31) + b"1", 13, 23, payload=None),
    ]
    sequences = [
        add_request(scheduler, make_request(range(168), 16, images=(images[0],)))[0],
        add_request(scheduler, make_request(range(39), 10, images=(images[1],)), arrival=1)[0],
    ]
    run_all(scheduler, runner)
    assert are_finished(sequences)
    assert runner.violations == []


def test_a_prompt_whose_scores_may_begin_again_keeps_its_blocks_until_then() -> None:
    scheduler, runner = make((None, 40))
    [sequence] = add_request(scheduler, make_request(range(200), 60, prompt_logprobs=1))
    for _ in range(6):
        run(scheduler, runner, plan_step(scheduler))
        assert held(sequence) == [13, 13]
    failed = plan_step(scheduler)
    scheduler.rollback(failed)
    again = scheduler.retry(failed, range(1))
    assert again is not None
    assert again.plan.rows[0].start == 0
    runner._slots.clear()
    run(scheduler, runner, again)
    run_all(scheduler, runner)
    assert are_finished([sequence])
    assert runner.violations == []


def test_a_chunk_runs_again_where_it_began() -> None:
    scheduler, runner = make((None, 40))
    [sequence] = add_request(scheduler, make_request(range(200), 60))
    for _ in range(3):
        run(scheduler, runner, plan_step(scheduler))
    failed, following = plan_step(scheduler), plan_step(scheduler)
    for step in (failed, following):
        runner.execute(step.plan, is_tainted=True)
    scheduler.rollback(following)
    scheduler.rollback(failed)
    again = scheduler.retry(failed, range(1))
    assert again is not None
    run(scheduler, runner, again)
    run_all(scheduler, runner)
    assert are_finished([sequence])
    assert runner.violations == []


async def test_a_request_that_windows_make_fit_is_taken(make_engine: Any) -> None:
    runner = FakeRunner(num_blocks=20, windows=(40, 40), max_step_tokens=64)
    engine: Engine = make_engine(runner, max_batch_prefill_tokens=32)
    assert engine.scheduler.tables.needs.total_for(3000) == 2 * (3 + 4 + 1)
    permit = engine.acquire(1)
    engine.submit(make_request(2900, 100), permit).cancel()
    with pytest.raises(InvalidRequest, match="tokens of KV cache, which has 320"):
        engine.submit(make_request(2900, 100, prompt_logprobs=1), engine.acquire(1))
