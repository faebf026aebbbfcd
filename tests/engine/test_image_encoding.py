"""Images in the scheduler: encoded before the chunks that need them, alongside streams, and never cut."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from tests.engine.helpers import (
    add_request,
    are_finished,
    ask,
    make_request,
    make_scheduler,
    plan_step,
    run,
    run_all,
    submit,
)
from tests.support.fake_runner import FakeRunner, FakeTokenizer, fake_info
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.image_encoding import MAX_ENCODE_S
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.settings import Settings
from tgi_asgi.types import Bidirectional, ImageInput


def image(start: int, num_tokens: int, colour: bytes = b"r", *, is_seen_by_all: bool = False) -> ImageInput:
    return ImageInput(colour * 32, start, num_tokens, None, is_seen_by_all)


def test_a_chunk_ends_before_an_image_that_is_not_encoded() -> None:
    scheduler, runner = make_scheduler(vision=Bidirectional.NOTHING), FakeRunner(vision=Bidirectional.NOTHING)
    add_request(scheduler, make_request(60, 1, images=(image(20, 10),)))
    steps = run_all(scheduler, runner)
    sizes = [[(row.start, row.num_tokens) for row in step.plan.rows] for step in steps]
    assert sizes == [[(0, 20)], [], [(20, 40)]]
    assert [len(step.plan.images) for step in steps] == [1, 1, 0]
    assert [step.plan.image_budget_s for step in steps] == [MAX_ENCODE_S, MAX_ENCODE_S, 0.0]


def test_images_that_every_token_sees_are_encoded_before_the_first_chunk() -> None:
    scheduler, runner = make_scheduler(vision=Bidirectional.NOTHING), FakeRunner(vision=Bidirectional.NOTHING)
    images = (image(20, 1, is_seen_by_all=True), image(50, 1, b"b", is_seen_by_all=True))
    (sequence,) = add_request(scheduler, make_request(60, 1, images=images))
    steps = run_all(scheduler, runner)
    assert [[(row.start, row.num_tokens) for row in step.plan.rows] for step in steps] == [
        [], [], [], [], [(0, 60)],
    ]  # fmt: skip
    # Another request computes its last token only, which sees the images, too.
    (other,) = add_request(scheduler, make_request(60, 1, images=images), arrival=1)
    steps = run_all(scheduler, runner)
    assert [[image.digest for image in step.plan.images] for step in steps] == [
        [each.digest for each in images], [],
    ]  # fmt: skip
    assert (sequence.num_cached, other.num_cached) == (0, 48)
    assert runner.violations == []


def test_a_step_has_the_images_of_a_sequence_that_has_been_removed_since() -> None:
    scheduler = make_scheduler(vision=Bidirectional.NOTHING)
    (sequence,) = add_request(scheduler, make_request(60, 1, images=(image(20, 1, is_seen_by_all=True),)))
    sequence.num_encoded_images = 1
    step, kept = plan_step(scheduler), weakref.ref(sequence.images[0])
    assert step.sequences == [sequence]
    step.plan.starts.clear()  # an earlier step may have started the slot
    scheduler.remove(sequence)
    request = sequence.request
    del sequence
    assert kept() is not None
    del step
    assert kept() is None
    assert len(request.images) == 1


def test_streams_go_on_while_an_image_is_encoded() -> None:
    scheduler, runner = (
        make_scheduler(vision=Bidirectional.NOTHING),
        FakeRunner(vision=Bidirectional.NOTHING, encode_steps=5),
    )
    add_request(scheduler, make_request(8, 20))
    run(scheduler, runner, plan_step(scheduler))
    add_request(scheduler, make_request(60, 1, images=(image(0, 10),)), arrival=1)
    steps = [plan_step(scheduler)]
    for _ in range(6):
        run(scheduler, runner, steps[-1])
        steps.append(plan_step(scheduler))
    assert [step.num_decode_rows for step in steps] == [1] * 7
    assert [bool(step.plan.images) for step in steps] == [True] * 5 + [False] * 2
    assert [step.num_prefill_tokens for step in steps] == [0] * 5 + [60, 0]


def test_a_first_token_does_not_wait_for_an_image_of_another() -> None:
    scheduler, runner = (
        make_scheduler(vision=Bidirectional.NOTHING),
        FakeRunner(vision=Bidirectional.NOTHING, encode_steps=9),
    )
    add_request(scheduler, make_request(60, 1, images=(image(0, 10),)))
    run(scheduler, runner, plan_step(scheduler))
    add_request(scheduler, make_request(8, 20), arrival=1)
    scheduler._budget = TokenBudget(max_tokens=512, block_size=16, target_s=0.05)
    step = plan_step(scheduler)
    assert step.num_decode_rows == 0 and [row.samples for row in step.plan.rows] == [True]
    assert step.plan.images and 0.0 < step.plan.image_budget_s <= 0.05


def test_an_image_in_the_cache_is_not_encoded() -> None:
    scheduler, runner = make_scheduler(vision=Bidirectional.NOTHING), FakeRunner(vision=Bidirectional.NOTHING)
    for arrival in range(2):
        add_request(scheduler, make_request(60, 1, images=(image(20, 10),)), arrival)
        steps = run_all(scheduler, runner)
    assert [len(step.plan.images) for step in steps] == [0]


def test_a_cancelled_prompt_s_image_is_encoded_no_further() -> None:
    scheduler, runner = (
        make_scheduler(vision=Bidirectional.NOTHING),
        FakeRunner(vision=Bidirectional.NOTHING, encode_steps=9),
    )
    (sequence,) = add_request(scheduler, make_request(60, 1, images=(image(0, 10),)))
    step = plan_step(scheduler)
    scheduler.remove(sequence)
    run(scheduler, runner, step)
    assert scheduler.plan() is None


@pytest.mark.parametrize(
    ("vision", "num_tokens"),
    [(Bidirectional.NOTHING, 32), (Bidirectional.IMAGES, 70), (Bidirectional.PROMPT, 100)],
)
def test_what_sees_ahead_is_computed_at_once(vision: Bidirectional, num_tokens: int) -> None:
    scheduler, runner = (
        make_scheduler(max_prefill_tokens=32, vision=vision),
        FakeRunner(vision=vision, encode_steps=1),
    )
    add_request(scheduler, make_request(100, 1, images=(image(0, 70),)))
    run(scheduler, runner, plan_step(scheduler))
    assert plan_step(scheduler).num_prefill_tokens == num_tokens


@pytest.mark.parametrize("vision", Bidirectional)
async def test_a_request_with_images_gives_what_it_should(vision: Bidirectional) -> None:
    runner = FakeRunner(vision=vision)
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info())
    engine.start()
    answer = await ask(engine, make_request(100, 5, n=2, images=(image(3, 40), image(60, 9, b"b"))))
    assert len(answer.tokens(0)) == len(answer.tokens(1)) == 5
    assert runner.violations == []
    await engine.stop()


@pytest.mark.parametrize(("vision", "size"), [(Bidirectional.IMAGES, 40), (Bidirectional.PROMPT, 60)])
async def test_what_no_step_could_hold_is_refused(vision: Bidirectional, size: int) -> None:
    runner = FakeRunner(vision=vision, max_step_tokens=64 + size - 1)
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info())
    engine.start()
    with pytest.raises(InvalidRequest, match=f"must compute {size} tokens of the prompt at once"):
        submit(engine, make_request(60, 5, images=(image(10, 40),)))
    await engine.stop()


async def test_an_image_for_which_there_is_no_memory_fails_alone() -> None:
    runner = FakeRunner(vision=Bidirectional.IMAGES)
    runner.fault = lambda plan: (
        MemoryError("none") if any(row.num_tokens > 1 and row.slot == 1 for row in plan.rows) else None
    )
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info())
    engine.start()
    first = submit(engine, make_request(20, 50))
    answer = await ask(engine, make_request(60, 5, images=(image(0, 60),)))
    assert answer.error is not None
    first.cancel()
    await engine.stop()


def test_an_image_is_not_taken_for_encoded_because_one_behind_it_is() -> None:
    scheduler, runner = make_scheduler(vision=Bidirectional.NOTHING), FakeRunner(vision=Bidirectional.NOTHING)
    add_request(scheduler, make_request(20, 1, images=(image(10, 5, b"b"),)))
    run_all(scheduler, runner)
    add_request(scheduler, make_request(30, 1, images=(image(2, 5), image(10, 5, b"b"))), arrival=1)
    run_all(scheduler, runner)
    assert runner.violations == []


async def test_a_failed_step_without_rows_does_not_end_the_engine() -> None:
    runner = FakeRunner(vision=Bidirectional.NOTHING)
    faults = [RuntimeError("once")]
    runner.fault = lambda plan: faults.pop() if faults and not plan.rows else None
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info())
    engine.start()
    answer = await ask(engine, make_request(40, 2, images=(image(0, 8),)))
    assert not faults, "the test's setup has changed"
    assert answer.error is None
    await engine.stop()


def test_a_retried_image_is_not_computed_beyond_what_a_step_holds() -> None:
    """A prompt that starts over takes most of the step; the image is left to a later one, as a whole."""
    sizes: dict[str, Any] = {"num_blocks": 64, "block_size": 4, "max_batch_size": 4, "max_step_tokens": 28}
    vision = Bidirectional.IMAGES
    scheduler = make_scheduler(**sizes, max_prefill_tokens=24, vision=vision, prefix_cache=False)
    runner = FakeRunner(**sizes, vision=vision, encode_steps=0)
    sequences = add_request(scheduler, make_request(27, 2, prompt_logprobs=0))
    run(scheduler, runner, plan_step(scheduler))
    sequences += add_request(scheduler, make_request(12, 2, images=(image(0, 9),)), arrival=1)
    sequences[-1].num_encoded_images = 1
    sequences += add_request(scheduler, make_request(6, 2), arrival=2)
    failed = plan_step(scheduler)
    assert failed.sequences == sequences, "the test's setup has changed"
    scheduler.rollback(failed)
    again = scheduler.retry(failed, range(3))
    assert again is not None
    assert [(row.start, row.num_tokens) for row in again.plan.rows] == [(0, 27), (0, 1)]
    run(scheduler, runner, again)
    run_all(scheduler, runner)
    assert are_finished(sequences)
    assert runner.violations == []
