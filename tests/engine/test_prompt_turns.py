"""Which prompts a step computes, and how much of each, while a long one is in prefill."""

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
from tgi_asgi.engine.budget import NextPrompt
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.step import Step
from tgi_asgi.types import Adapter, Bidirectional, ImageInput

_SIZES = {"num_blocks": 2000, "max_batch_size": 64}


class _Served:
    """A scheduler with its runner; prompts differ from their first token on."""

    def __init__(self, **changes: Any) -> None:
        self.scheduler: Scheduler = make_scheduler(**{**_SIZES, "max_prefill_tokens": 128, **changes})
        sizes = {name: value for name, value in changes.items() if name in ("max_batch_size", "num_blocks")}
        self.runner = FakeRunner(**{**_SIZES, **sizes})
        self.num_added = 0

    def add(self, size: int, tenant: str | None = None, *, max_tokens: int = 1, **fields: Any) -> Sequence:
        self.num_added += 1
        prompt = [(self.num_added * 17 + index * 7) % 251 for index in range(size)]
        return self.add_prompt(prompt, tenant, max_tokens=max_tokens, **fields)

    def add_prompt(
        self, prompt: list[int], tenant: str | None = None, *, max_tokens: int = 1, **fields: Any
    ) -> Sequence:
        self.num_added += 1
        request = make_request(prompt, max_tokens, **fields)
        return add_request(self.scheduler, request, self.num_added, tenant)[0]

    def step(self) -> dict[Sequence, int]:
        """Run a step; return how many tokens it computed of each sequence."""
        step: Step = plan_step(self.scheduler)
        run(self.scheduler, self.runner, step)
        return {
            sequence: row.num_tokens for sequence, row in zip(step.sequences, step.plan.rows, strict=True)
        }

    def end(self) -> None:
        run_all(self.scheduler, self.runner)
        assert self.runner.violations == []
        assert self.scheduler.pool.num_used == 0


def test_a_short_prompt_overtakes_a_long_one_that_gets_the_rest() -> None:
    served = _Served()
    long = served.add(2000)
    served.step()
    short = served.add(20)
    assert served.step() == {short: 20, long: 96}
    assert served.step() == {long: 128}
    served.end()


class _LongAlone:
    """A budget of 512 tokens while nothing decodes, else of 64."""

    def tokens(self, num_decode_rows: int, prompt: NextPrompt, waited_s: float) -> int:
        return 64 if num_decode_rows else 512


def test_what_ends_in_a_step_does_not_wait_for_much_of_others() -> None:
    served = _Served()
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    long = served.add(2000)
    assert served.step() == {long: 512}
    short = served.add(20, max_tokens=2)
    assert served.step() == {short: 20, long: 32}  # of 64, whole blocks
    assert served.step() == {short: 1, long: 64}
    assert served.step() == {long: 512}
    shorts = [served.add(48, max_tokens=2) for _ in range(4)]
    assert served.step() == {**dict.fromkeys(shorts, 48), long: 192}  # as many as those before it
    served.end()


def test_prompts_that_begin_no_stream_hold_up_nobody() -> None:
    """Embeddings, rankings: what counts is how soon all of them are computed."""
    served = _Served()
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    long = served.add(2000)
    served.step()
    short = served.add(20)
    assert served.step() == {short: 20, long: 480}
    served.end()


def test_what_ends_in_the_same_step_is_not_held_back() -> None:
    served = _Served(num_blocks=400)
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    first = served.add(530, max_tokens=2)
    assert served.step() == {first: 512}
    others = [served.add(150, max_tokens=2) for _ in range(4)]
    step = served.step()
    assert step == {first: 18, **dict.fromkeys(others[:3], 150), others[3]: 32}
    served.end()


def test_those_that_do_not_end_share_what_is_left_beside_a_stream() -> None:
    served = _Served(num_blocks=600)
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    long = [served.add(2000, tenant) for tenant in "abc"]
    for _ in range(2):
        served.step()
    short = served.add(16, "d", max_tokens=2)
    step = served.step()
    assert step.pop(short) == 16
    assert set(step) <= set(long) and sum(step.values()) == 48
    served.end()


def test_nothing_escapes_what_is_left_beside_a_stream() -> None:
    """A younger prompt that would just have ended in the whole step, behind one that would not have."""
    served = _Served()
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    served.add(2000, "a")
    served.step()
    short = served.add(20, "d", max_tokens=2)
    for tenant in "be":
        served.add(400, tenant, max_tokens=2)
    served.add(20, "c", max_tokens=2)
    step = served.step()
    assert step[short] == 20 and sum(step.values()) <= 64
    served.end()


def test_a_new_prompt_has_its_part_of_what_is_left_beside_a_stream() -> None:
    served = _Served()
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    long = served.add(2000, "a")
    served.step()
    short, other = served.add(20, "d", max_tokens=2), served.add(400, "b", max_tokens=2)
    assert served.step() == {short: 20, other: 16, long: 16}
    served.end()


def test_beside_a_stream_keys_get_equal_parts_in_turn() -> None:
    served = _Served(num_blocks=20_000)
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    running = {"a": served.add(20_000, "a")}
    num_tokens = dict.fromkeys("abcde", 0)
    for _ in range(120):
        for tenant in "bcde":  # more prompts in prefill than blocks are left
            if tenant not in running or running[tenant].stage is Stage.FINISHED:
                running[tenant] = served.add(600, tenant)
        served.add(16, "short", max_tokens=2)
        step = served.step()
        for sequence, count in step.items():
            if sequence.tenant in num_tokens:
                num_tokens[sequence.tenant] += count
    assert min(num_tokens.values()) > 0.75 * max(num_tokens.values())


@pytest.mark.parametrize("num_cached", [0, 96])
def test_what_is_cached_does_not_count_as_left_to_compute(num_cached: int) -> None:
    served = _Served()
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    prompt = [index % 239 for index in range(600)]
    served.add_prompt(prompt[: num_cached + 1])
    served.step()
    short, resumed = served.add(20, max_tokens=2), served.add_prompt(prompt[:520], max_tokens=2)
    assert served.step() == {short: 20, resumed: 520 - 96 if num_cached else 32}


def test_a_long_prompt_goes_on_beside_short_ones_that_leave_nothing() -> None:
    served = _Served()

    class NothingLeft(_LongAlone):
        def tokens(self, num_decode_rows: int, prompt: NextPrompt, waited_s: float) -> int:
            return 1 if num_decode_rows else 512

    served.scheduler._budget = NothingLeft()  # type: ignore[assignment]
    long = served.add(2000)
    served.step()
    for _ in range(8):
        short = served.add(1, max_tokens=2)
        step = served.step()
        assert step[short] == 1 and step.get(long, 0) >= 1
        served.step()
    served.end()


def test_a_long_prompt_that_ends_holds_up_no_other() -> None:
    served = _Served()
    served.scheduler._budget = _LongAlone()  # type: ignore[assignment]
    first, second = served.add(530, max_tokens=2), served.add(2000)
    assert served.step() == {first: 512}
    assert served.step() == {first: 18, second: 32}
    served.end()


def test_a_prompt_that_overtakes_may_take_several_steps_of_half_the_tokens() -> None:
    served = _Served()
    long = served.add(2000)
    served.step()
    other = served.add(150)
    assert [served.step() for _ in range(3)] == [
        {other: 64, long: 64},
        {other: 64, long: 64},
        {other: 22, long: 96},
    ]
    served.end()


def test_prompts_that_are_not_much_shorter_wait_their_turn() -> None:
    served = _Served()
    first, second, third = served.add(1000), served.add(900), served.add(400)
    assert [list(served.step()) for _ in range(5)] == [[first]] * 5
    while first.stage is not Stage.FINISHED:
        assert third not in served.step()
    assert second.num_computed > 0
    served.end()


def test_the_long_prompt_keeps_half_of_its_pace_whatever_arrives() -> None:
    served = _Served()
    long = served.add(2000)
    num_steps = 0
    while long.stage is not Stage.FINISHED:
        served.add(30)
        served.step()
        num_steps += 1
    assert num_steps <= 2 * 2000 / 128 + 2
    served.end()


def test_few_prompts_of_a_tenant_are_half_computed() -> None:
    """They hold blocks, which the long prompt or streams might need."""
    served = _Served()
    long = served.add(8000)
    for size in range(1200, 20, -11):
        served.add(size)
        served.step()
        lengths = [each.prompt_len for each in served.scheduler.running if each.is_prefilling]
        assert sum(lengths) <= 8000 * 4 / 3 and len(lengths) <= 6
        if long.stage is Stage.FINISHED:
            break
    served.end()


def test_a_more_urgent_prompt_goes_before_one_in_prefill() -> None:
    served = _Served()
    long = served.add(1000)
    served.step()
    urgent = served.add(500, priority=-1)
    assert [served.step() for _ in range(3)] == [{urgent: 128}] * 3
    assert served.step() == {urgent: 116}, "what is left is less than a block"
    assert served.step() == {long: 128}
    served.end()


def test_a_short_prompt_of_a_lower_priority_waits() -> None:
    served = _Served()
    long = served.add(1000)
    served.step()
    short = served.add(10, priority=1)
    while long.stage is not Stage.FINISHED:
        assert short.num_computed == 0
        served.step()
    served.end()


def test_tenants_share_the_tokens_of_a_step() -> None:
    served = _Served()
    one = served.add(1000, "one")
    served.step()
    other = served.add(900, "other")
    assert [served.step() for _ in range(2)] == [{other: 64, one: 64}] * 2
    third = served.add(20, "third")
    assert served.step() == {third: 20, other: 32, one: 64}, "what the third leaves goes to the longest"
    served.end()


def test_tenants_take_turns_if_a_step_has_less_than_a_block_for_each() -> None:
    served = _Served(max_prefill_tokens=32)
    tenants = [served.add(400, str(number)) for number in range(5)]
    for _ in range(30):
        served.step()
    computed = [sequence.num_computed for sequence in tenants]
    assert sum(computed) == 30 * 32
    assert max(computed) - min(computed) <= 48
    served.end()


def test_a_short_prompt_gets_every_second_step_of_a_single_block() -> None:
    served = _Served(max_prefill_tokens=16)
    long = served.add(1000)
    served.step()
    other = served.add(64)
    computed = [served.step() for _ in range(8)]
    assert sorted(map(list, computed), key=repr) == sorted([[long], [other]] * 4, key=repr)
    served.end()


def test_what_nobody_else_can_use_goes_to_the_prompt_in_prefill() -> None:
    """Here a waiting tenant finds no slot."""
    served = _Served(max_batch_size=1)
    long = served.add(1000, "one")
    served.step()
    served.add(10, "other")
    assert served.step() == {long: 128}
    served.end()


def test_a_prompt_overtakes_if_it_is_short_without_what_is_cached() -> None:
    served = _Served()
    chat = [index * 3 % 250 for index in range(800)]
    served.add_prompt(chat)
    served.end()
    long = served.add(1600)
    served.step()
    following = served.add_prompt([*chat, *range(30)])
    assert served.step() == {following: 30, long: 96}
    served.end()


def test_a_prompt_waits_for_what_it_shares_with_the_one_in_prefill() -> None:
    served = _Served()
    system = [index * 3 % 250 for index in range(320)]
    long = served.add_prompt(system + [index * 5 % 250 for index in range(2000)])
    served.step()
    short = served.add_prompt([*system, 7, 8, 9], max_tokens=9)
    assert [served.step() for _ in range(2)] == [{long: 128}, {long: 128}]
    served.step()
    assert short.num_reused == 320
    served.end()


def test_a_prompt_whose_adapter_may_not_run_yet_does_not_overtake() -> None:
    served = _Served(max_adapters=1)
    adapters = [Adapter(name, name, "its weights") for name in ("x", "y")]
    long = served.add(1000, adapter=adapters[0])
    served.step()
    other, plain = served.add(20, adapter=adapters[1]), served.add(20)
    assert set(served.step()) == {plain, long}
    while long.stage is not Stage.FINISHED:
        assert other.num_computed == 0
        served.step()
    served.end()


def test_a_prompt_whose_adapter_may_no_longer_run_does_not_overtake() -> None:
    """That of one tenant was chosen before another tenant's took the last place of an adapter."""
    served = _Served(max_adapters=1, num_blocks=400)
    for tenant in "ab":
        served.add(2000, tenant)
    for _ in range(2):
        served.step()
    x, y = (Adapter(name, name, weights=f"weights of {name}") for name in "xy")
    first = served.add(17, "a", adapter=x)
    second = served.add(17, "b", adapter=y)
    served.add(1900, "b")  # so that the tenant is asked again
    step = served.step()
    assert first in step and second not in step
    served.end()


def test_nobody_overtakes_a_sequence_that_finds_no_blocks() -> None:
    """Otherwise short prompts could keep it waiting forever."""
    served = _Served(num_blocks=64)
    long = served.add(600, "one")
    served.step()
    large = served.add(700, "other")
    short = served.add(20, "other")
    assert served.step() == {long: 128}
    assert (large.stage, short.stage) == (Stage.WAITING, Stage.WAITING)
    served.end()
    assert are_finished([long, large, short])


def test_an_image_that_needs_a_whole_step_is_not_held_up_by_short_prompts() -> None:
    """It must not be cut, so it waits while others take some of the step's tokens first."""
    served = _Served(max_step_tokens=128, vision=Bidirectional.IMAGES)
    image = ImageInput(b"i" * 32, 600, 128, payload=None)
    long = served.add(1000, images=(image,))
    for _ in range(20):
        served.add(10)
        if long in served.step() and long.num_computed >= 600:
            long.num_encoded_images = 1
    assert long.stage is Stage.FINISHED
    served.end()


@pytest.mark.parametrize("budget", [16, 32, 48, 80, 512])
def test_all_prompts_end_whatever_the_budget(budget: int) -> None:
    served = _Served(max_prefill_tokens=budget, num_blocks=120, max_batch_size=6)
    sequences = []
    for number in range(60):
        size = (number * 37 % 11 + 1) ** 2 * 8
        priority = number % 3 - 1
        sequences.append(
            served.add(size, "abc"[number * 7 % 3], priority=priority, max_tokens=number % 5 + 1)
        )
        served.step()
    served.end()
    assert are_finished(sequences)
