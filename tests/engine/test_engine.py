"""The engine on the fake runner: many requests, choices, stops, ends."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Sequence
from itertools import accumulate

import pytest

from tests.engine.conftest import MakeEngine
from tests.engine.helpers import Answer, ask, collect, make_request, submit
from tests.support.fake_runner import (
    EOS_ID,
    FakeRunner,
    FakeTokenizer,
    expected_tokens,
    fake_info,
    fake_logprob,
    script,
)
from tests.support.waiting import LONGEST_S, until
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.sequence import AGING_S
from tgi_asgi.engine.stats import Histogram
from tgi_asgi.errors import (
    GenerationFailed,
    IncompleteGeneration,
    InvalidRequest,
    TgiError,
)
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, FinishReason, ImageInput, SamplingParams, TokenEvent

SEEDED = SamplingParams(seed=7)


class Recorder:
    """A sink that records its calls."""

    def __init__(self) -> None:
        self.calls: list[list[TokenEvent]] = []
        self.errors: list[TgiError] = []

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self.calls.append(list(events))

    def on_error(self, error: TgiError) -> None:
        self.errors.append(error)


async def test_a_request_gets_its_tokens_and_one_finish(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = make_request(b"Once upon a time", max_tokens=20)
    answer = await ask(engine, request)
    assert answer.tokens() == expected_tokens(b"Once upon a time", 20)
    assert [event.finish for event in answer.events] == [None] * 19 + [FinishReason.LENGTH]
    assert answer.stats.generated_tokens == 20
    stats = answer.stats
    assert None not in (stats.scheduled_s, stats.first_token_s, stats.finished_s)
    assert stats.arrival_s <= stats.scheduled_s <= stats.first_token_s <= stats.finished_s  # type: ignore[operator]


async def test_64_streams_are_interleaved_and_equal_to_running_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(num_blocks=400))
    rng = random.Random(0)
    requests = [
        make_request([rng.randrange(256) for _ in range(rng.randrange(1, 60))], 30, sampling=SEEDED)
        for _ in range(64)
    ]
    order: list[str] = []

    class Ordered(Answer):
        def on_events(self, events: Sequence[TokenEvent]) -> None:
            order.append(self.channel.request.request_id)
            super().on_events(events)

    answers = [Ordered(submit(engine, request)) for request in requests]
    for request, answer in zip(requests, answers, strict=True):
        await answer.wait()
        assert answer.tokens() == expected_tokens(request.prompt_ids, 30, sampling=SEEDED)
    # Every request has ten tokens before any request has thirty.
    first_done = min(len(order) - 1 - order[::-1].index(request.request_id) for request in requests)
    assert all(order[:first_done].count(request.request_id) >= 10 for request in requests)


async def test_a_seed_and_a_choice_decide_alone(make_engine: MakeEngine) -> None:
    """Choice i depends neither on n, nor on preemption, nor on other requests."""
    prompt = b"The same prompt for all of them"
    roomy, tight = make_engine(), make_engine(FakeRunner(num_blocks=9, max_batch_size=4))
    for engine in (roomy, tight):
        many, one = await asyncio.gather(
            ask(engine, make_request(prompt, 40, sampling=SEEDED, n=5)),
            ask(engine, make_request(prompt, 40, sampling=SEEDED)),
        )
        for choice in range(5):
            assert many.tokens(choice) == expected_tokens(prompt, 40, sampling=SEEDED, choice=choice)
            assert many.finish(choice) is FinishReason.LENGTH
        assert one.tokens() == many.tokens(0)
        assert many.stats.generated_tokens == 200
    assert tight.stats.preemptions > 0


async def test_all_choices_of_a_step_come_with_one_call(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sink = Recorder()
    channel = submit(engine, make_request(20, max_tokens=6, sampling=SEEDED, n=4))
    channel.attach(sink)
    await until(lambda: channel.is_ended)
    await until(lambda: sum(map(len, sink.calls)) == 24)
    # A call ends at a step's end; a late event loop may deliver two steps at once.
    assert set(accumulate(map(len, sink.calls))) <= {1, 5, 9, 13, 17, 21, 24}
    assert sink.errors == []


async def test_a_sink_attached_late_gets_everything(make_engine: MakeEngine) -> None:
    engine = make_engine()
    channel = submit(engine, make_request(20, max_tokens=6))
    await until(lambda: channel.is_ended)
    sink = Recorder()
    channel.attach(sink)
    assert [len(call) for call in sink.calls] == [6]


async def test_a_stop_string_ends_and_its_speculative_token_is_not_counted(make_engine: MakeEngine) -> None:
    runner = FakeRunner(next_token=script(b"say END and more")(5))
    engine = make_engine(runner)
    answer = await ask(engine, make_request(5, max_tokens=50, stop={"stop": ("END",)}))
    assert answer.text() == "say "
    assert (answer.finish(), answer.events[-1].stop) == (FinishReason.STOP, "END")
    assert answer.stats.generated_tokens == 7
    assert engine.stats.sampled_tokens == 7
    await until(lambda: engine.stats.steps == len(runner.plans))
    assert engine.stats.inter_token_s.count == 6


async def test_eos_on_the_last_token_wins_over_the_length(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(next_token=script(b"abc")(5)))
    answer = await ask(engine, make_request(5, max_tokens=4))
    assert (answer.tokens(), answer.text()) == ([97, 98, 99, EOS_ID], "abc")
    assert answer.finish() is FinishReason.EOS


async def test_min_tokens_keeps_eos_away(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(next_token=lambda tokens, sampling, choice: EOS_ID))
    answer = await ask(engine, make_request(5, max_tokens=50, stop={"min_tokens": 3}))
    assert answer.tokens() == [257, 257, 257, EOS_ID]


async def test_logprobs_of_the_prompt_and_of_each_token(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_prefill_tokens=16)
    prompt = list(range(40))
    await ask(engine, make_request(prompt))
    request = make_request(
        prompt, 2, sampling=SamplingParams(temperature=0, logprobs=2), prompt_logprobs=1, n=2
    )
    answer = await ask(engine, request)
    known = answer.stats.prompt_logprobs
    assert known is not None
    assert [entry[0] for entry in known] == [None] + [fake_logprob(token) for token in prompt[1:]]
    assert answer.stats.cached_tokens == 0
    for event in answer.events:
        assert event.logprob == fake_logprob(event.token_id)
        assert event.top is not None
        assert len(event.top) == 2


async def test_prompt_logprobs_are_whole_after_a_preemption(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(num_blocks=41), max_batch_prefill_tokens=16)
    old = submit(engine, make_request(range(100, 116), max_tokens=110))
    prompt = [index % 256 for index in range(600)]
    new = await ask(engine, make_request(prompt, 3, prompt_logprobs=0))
    assert engine.stats.preemptions == 1
    assert engine.stats.prefill_tokens > 16 + 600, "it was not preempted during its prompt"
    assert new.stats.prompt_logprobs is not None
    assert [entry[0] for entry in new.stats.prompt_logprobs] == [None, *map(fake_logprob, prompt[1:])]
    await collect(old)


async def test_priority_goes_first_unless_the_other_has_waited_long() -> None:
    now = 0.0
    runner = FakeRunner(max_batch_size=1, is_manual=True)
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info(), clock=lambda: now)
    engine.start()
    channels: list[RequestChannel] = []
    # Each prompt is one token longer than the previous one, which identifies it.
    for arrival_s, priority in ((0.0, 0), (0.0, 1), (AGING_S / 2, 0), (AGING_S * 2, 0)):
        now = arrival_s
        channels.append(submit(engine, make_request(len(channels) + 1, max_tokens=1, priority=priority)))
        await until(lambda: runner.num_in_flight > 0)
    runner.is_manual = False
    runner.run_next()
    await asyncio.gather(*map(collect, channels))
    order = [len(start.prompt_ids) for plan in runner.plans for start in plan.starts]
    assert order == [1, 3, 2, 4]
    await engine.stop()


async def test_cached_tokens_are_reported(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = await ask(engine, make_request(100))
    second = await ask(engine, make_request(100))
    assert (first.stats.cached_tokens, second.stats.cached_tokens) == (0, 96)
    assert engine.stats.prefill_tokens == 100 + 4
    assert engine.stats.prefix_hit_tokens == 96


@pytest.mark.parametrize("num_blocks", [5, 7, 11])
async def test_requests_that_do_not_fit_together_all_finish(make_engine: MakeEngine, num_blocks: int) -> None:
    engine = make_engine(FakeRunner(num_blocks=num_blocks, max_batch_size=8))
    requests = [make_request([index] * 20, 60, sampling=SEEDED) for index in range(12)]
    answers = await asyncio.gather(*(ask(engine, request) for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens() == expected_tokens(request.prompt_ids, 60, sampling=SEEDED)
    if num_blocks == 11:
        assert engine.stats.preemptions > 0


async def test_a_request_that_could_never_run_is_refused_and_its_permit_comes_back(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(FakeRunner(num_blocks=4), max_total_tokens=100)
    with pytest.raises(InvalidRequest, match="KV cache"):
        submit(engine, make_request(60, max_tokens=6))
    with pytest.raises(InvalidRequest, match="100 tokens"):
        submit(engine, make_request(60, max_tokens=41))
    assert engine.admission.num_taken == 0
    assert (await ask(engine, make_request(60, max_tokens=5))).finish() is FinishReason.LENGTH


@pytest.mark.parametrize(("prompt", "max_tokens", "n"), [([], 5, 1), ([1], 0, 1), ([1], 5, 0)])
async def test_what_would_hurt_others_is_refused(
    make_engine: MakeEngine, prompt: list[int], max_tokens: int, n: int
) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest):
        submit(engine, make_request(prompt, max_tokens, n=n))
    assert engine.admission.num_taken == 0


@pytest.mark.parametrize("places", [[(38, 3)], [(-1, 3)], [(0, 0)], [(0, 4), (3, 4)], [(8, 2), (0, 2)]])
async def test_images_that_do_not_lie_in_the_prompt_are_refused(
    make_engine: MakeEngine, places: list[tuple[int, int]]
) -> None:
    engine = make_engine()
    images = tuple(ImageInput(b"a" * 32, start, num_tokens, payload=None) for start, num_tokens in places)
    with pytest.raises(InvalidRequest, match="image"):
        submit(engine, make_request(40, images=images))
    assert engine.admission.num_taken == 0


async def test_a_cancelled_stream_frees_its_blocks_within_two_steps(make_engine: MakeEngine) -> None:
    runner = FakeRunner(is_manual=True)
    engine = make_engine(runner)
    channel = submit(engine, make_request(40, max_tokens=500, n=2))
    await until(lambda: runner.num_in_flight == 2)
    for _ in range(5):
        runner.run_next()
        await until(lambda: runner.num_in_flight == 2)
    assert engine.scheduler.pool.num_used > 0
    num_steps = len(runner.plans)
    channel.cancel()
    channel.cancel()
    await until(lambda: engine.scheduler.pool.num_used == 0)
    assert len(runner.plans) - num_steps <= 2
    answer = await collect(channel)
    assert isinstance(answer.error, IncompleteGeneration)
    assert engine.stats.cancelled == 1
    assert engine.admission.num_taken == 0


async def test_a_request_cancelled_before_it_ran_never_runs(make_engine: MakeEngine) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    channel = submit(engine, make_request(40))
    channel.cancel()
    answer = await collect(channel)
    assert isinstance(answer.error, IncompleteGeneration)
    assert runner.plans == []


async def test_cancelling_after_the_end_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    answer = await ask(engine, make_request(5))
    answer.channel.cancel()
    await asyncio.sleep(0)
    assert (engine.stats.finished, engine.stats.cancelled) == (1, 0)


async def test_a_storm_of_cancellations_leaves_nothing_and_harms_nobody(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(num_blocks=60), max_concurrent_requests=1000)
    rng = random.Random(1)
    survivors = [make_request([index] * 30, 60) for index in range(10)]
    kept = [submit(engine, request) for request in survivors]
    victims = [
        submit(engine, make_request([rng.randrange(9)] * 30, 50, n=rng.choice((1, 2)))) for _ in range(90)
    ]

    async def leave(channel: object) -> None:
        for _ in range(rng.randrange(200)):
            await asyncio.sleep(0)
        channel.cancel()  # type: ignore[attr-defined]

    await asyncio.gather(*map(leave, victims))
    answers = await asyncio.gather(*map(collect, kept))
    for request, answer in zip(survivors, answers, strict=True):
        assert answer.tokens() == expected_tokens(request.prompt_ids, 60)
    await asyncio.gather(*map(collect, victims))


@pytest.mark.parametrize("error", [ValueError("broken"), asyncio.CancelledError()])
async def test_a_sink_that_raises_loses_its_own_request_only(
    make_engine: MakeEngine, error: BaseException
) -> None:
    class Broken(Recorder):
        def on_events(self, events: Sequence[TokenEvent]) -> None:
            raise error

    engine = make_engine()
    bad = submit(engine, make_request(5, max_tokens=50))
    broken = Broken()
    bad.attach(broken)
    good = await ask(engine, make_request(6, max_tokens=50))
    assert good.finish() is FinishReason.LENGTH
    await until(lambda: bad.is_ended)
    assert engine.stats.cancelled == 1
    assert [type(error) for error in broken.errors] == [IncompleteGeneration]


async def test_a_cpu_cache_takes_memory_where_conversations_come_back_for_it(make_engine: MakeEngine) -> None:
    """New prompts fill only 16 of 128 blocks; prompts that are sent again make the cache grow further."""
    engine = make_engine(FakeRunner(num_blocks=128, num_eager_blocks=16))
    pool, rng = engine.scheduler.pool, random.Random(2)
    for _ in range(30):
        await ask(engine, make_request([rng.randrange(256) for _ in range(100)], max_tokens=2))
    assert pool.num_touched == 16
    prompts = [[rng.randrange(256) for _ in range(100)] for _ in range(6)]
    for _ in range(8):
        engine.stats.prefix_hit_tokens = 0
        for prompt in prompts:
            await ask(engine, make_request(prompt, max_tokens=2))
    assert engine.stats.prefix_hit_tokens == 6 * 96
    assert 36 <= pool.num_touched < 64


async def test_choices_with_seeds_of_their_own_are_what_single_requests_would_be(
    make_engine: MakeEngine,
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=7)
    seeds = (11, 12)
    answer = await ask(make_engine(), make_request(5, sampling=sampling, n=2, seeds=seeds))
    for choice, seed in enumerate(seeds):
        alone = dataclasses.replace(sampling, seed=seed)
        single = await ask(make_engine(), make_request(5, sampling=alone))
        assert answer.tokens(choice) == single.tokens()


async def test_an_idle_engine_does_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    await ask(engine, make_request(5))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    num_wakes = 0
    original = engine._loop._take

    def counting(message: object) -> None:
        nonlocal num_wakes
        num_wakes += 1
        original(message)  # type: ignore[arg-type]

    engine._loop._take = counting  # type: ignore[method-assign]
    waiting = loop.create_future()
    loop.call_later(0.05, waiting.set_result, None)
    await waiting
    # One speculative step may still be in flight.
    assert num_wakes <= 1


async def test_while_the_loop_lags_tokens_leave_together_but_first_ones_at_once(
    make_engine: MakeEngine,
) -> None:
    runner = FakeRunner(is_manual=True)
    engine = make_engine(runner)
    old, new = Recorder(), Recorder()
    submit(engine, make_request(5, max_tokens=9)).attach(old)
    for _ in range(2):
        await until(lambda: runner.num_in_flight == 2)
        runner.run_next()
    await until(lambda: len(old.calls) == 2)
    submit(engine, make_request(6, max_tokens=9)).attach(new)
    for num_calls in (3, 4):
        await until(lambda: runner.num_in_flight == 2)
        runner.run_next()
        await until(lambda num_calls=num_calls: len(old.calls) == num_calls)  # type: ignore[misc]
    await until(lambda: runner.num_in_flight == 2)
    assert new.calls == []
    runner.run_next()  # both steps end before the loop runs again
    runner.run_next()
    await until(lambda: len(new.calls) == 2)
    assert [len(call) for call in old.calls] == [1, 1, 1, 1, 2]
    assert [len(call) for call in new.calls] == [1, 1]


async def test_delivery_of_a_large_step_yields_to_the_loop(make_engine: MakeEngine) -> None:
    now = 0.0

    class Slow(Recorder):
        """A sink whose calls each advance the engine's clock by 0.4 ms."""

        def on_events(self, events: Sequence[TokenEvent]) -> None:
            nonlocal now
            now += 0.0004
            super().on_events(events)

    runner = FakeRunner(num_blocks=200)
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info(), clock=lambda: now)
    engine.start()
    sinks = [Slow() for _ in range(30)]
    for index, sink in enumerate(sinks):
        submit(engine, make_request([index] * 5, max_tokens=1)).attach(sink)
    seen: list[int] = []
    async with asyncio.timeout(LONGEST_S):
        while not all(sink.calls for sink in sinks):
            await asyncio.sleep(0)
            seen.append(sum(len(sink.calls) for sink in sinks))
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert max(steps) <= 3
    await engine.stop()


def test_histograms_count_by_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.total, histogram.count) == ([2, 1, 1], 12.0, 4)


async def test_what_finished_in_the_step_after_which_the_engine_gives_up_is_delivered() -> None:
    runner = FakeRunner(is_poisoned=lambda tokens: tokens[0] != 1)
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info())
    engine.start()
    requests = [make_request([1], 1), *(make_request([index], 5) for index in range(2, 8))]
    async with asyncio.timeout(LONGEST_S):
        good, *bad = await asyncio.gather(*(ask(engine, request) for request in requests))
    await until(lambda: engine.state is EngineState.DEAD)
    assert good.finish() is FinishReason.LENGTH
    assert all(isinstance(answer.error, GenerationFailed) for answer in bad)
    await engine.stop()


async def test_requests_are_aborted_by_their_id_running_or_waiting(make_engine: MakeEngine) -> None:
    runner = FakeRunner(max_batch_size=1, is_manual=True)
    engine = make_engine(runner)
    named, other = make_request(5, 50), make_request(6, 5)
    running, waiting, kept = submit(engine, named), submit(engine, named), submit(engine, other)
    await until(lambda: runner.num_in_flight > 0)
    assert engine.abort("nobody") == 0
    assert engine.abort(named.request_id) == 2
    assert engine.abort(named.request_id) == 0, "the requests are already ending"
    runner.is_manual = False
    runner.run_next()
    for channel in (running, waiting):
        error = (await collect(channel)).error
        assert isinstance(error, IncompleteGeneration) and "aborted" in str(error)
    assert (await collect(kept)).finish() is FinishReason.LENGTH
    assert (engine.stats.failed, engine.stats.cancelled) == (2, 0)


async def test_a_reset_cache_is_cold_and_those_that_use_it_do_not_notice(make_engine: MakeEngine) -> None:
    engine = make_engine()
    await ask(engine, make_request(40, 2))
    running = submit(engine, make_request(40, 60, sampling=SEEDED))
    await until(lambda: running.stats.generated_tokens > 5)
    assert engine.reset_prefix_cache() >= 2  # the answer may have filled a third block by now
    assert engine.reset_prefix_cache() == 0
    again = await ask(engine, make_request(40, 2))
    assert running.stats.cached_tokens == 32 and again.stats.cached_tokens == 0
    tokens = (await collect(running)).tokens()
    assert tokens == expected_tokens(make_request(40).prompt_ids, 60, sampling=SEEDED)


async def test_only_what_runs_is_shown_with_a_slot(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeRunner(max_batch_size=1, step_s=0.001))
    channels = [submit(engine, make_request(5, 50)) for _ in range(2)]
    await until(lambda: channels[0].stats.generated_tokens > 0)
    shown = [each for request in engine.describe()["requests"] for each in request["sequences"]]
    assert [(each["state"], each["slot"]) for each in shown] == [("running", 0), ("waiting", None)]
    await asyncio.gather(*map(collect, channels))
