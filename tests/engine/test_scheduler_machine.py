"""The scheduler and the block pool under random requests, cancellations, preemptions, forks and failed steps.

Prompts of one family share a prefix, also with prompts of the same step or of one in flight.

Steps run on the fake runner's simulated cache, which fails as soon as a row would read anything except its
own sequence's tokens. Steps run in order, each at any moment between its planning and its completion, with up
to two in flight: all that the engine may do.
"""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.helpers import WatchedGrammar, add_request, make_request, make_scheduler
from tests.support.block_pool import check_pool
from tests.support.fake_runner import FakeRunner, expected_tokens
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.step import Step
from tgi_asgi.runner.plan import DraftLimits, StepResult
from tgi_asgi.types import Adapter, Bidirectional, ImageInput, SamplingParams

BLOCK = 4


def images_at(
    places: list[tuple[int, int]], prompt_len: int, *, are_seen_by_all: bool
) -> tuple[ImageInput, ...]:
    """Return consecutive images from pairs: the gap before each image, and its size, in tokens."""
    images, end = [], 0
    for number, (gap, size) in enumerate(places):
        if end + gap + size <= prompt_len:
            digest = bytes([number]) * 32
            images.append(ImageInput(digest, end + gap, size, payload=None, is_seen_by_all=are_seen_by_all))
            end += gap + size
    return tuple(images)


MAX_ADAPTERS = 2
ADAPTERS = tuple(Adapter(name, name, f"weights of {name}") for name in "xyz")  # one more than may be loaded
# Windows of the groups of layers. With blocks of four tokens, a window of 5 spans two blocks, and of 1 one
# block.
WINDOWS = ((None,), (None,), (None, 5), (5,), (None, 9, 1), (None, None, 4), (13, 2))
RARELY = st.sampled_from((False, False, False, True))


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 30),
        max_batch_size=st.integers(1, 5),
        max_prefill=st.sampled_from([4, 16, 64]),
        is_forgetful=RARELY,
        num_eager=st.none() | st.integers(1, 8),
        vision=st.none() | st.sampled_from(Bidirectional),
        has_prompt_arithmetic=st.booleans(),
        num_drafts=st.sampled_from([0, 0, 1, 3, 9]),
        windows=st.sampled_from(WINDOWS),
        is_cramped=st.booleans(),
        num_kept_states=st.sampled_from([None, None, 0, 1, 2, 5, 30]),
    )
    def start(
        self,
        num_blocks: int,
        max_batch_size: int,
        max_prefill: int,
        is_forgetful: bool,
        num_eager: int | None,
        vision: Bidirectional | None,
        has_prompt_arithmetic: bool,
        num_drafts: int,
        windows: tuple[int | None, ...],
        is_cramped: bool,
        num_kept_states: int | None,
    ) -> None:
        if num_kept_states is not None:
            vision = None
        drafts = DraftLimits(num_drafts, 16) if num_drafts else None
        # A cramped step has space for one uncut prompt, or for an image of at most nine tokens.
        is_cramped = is_cramped and vision is not Bidirectional.PROMPT
        max_step_tokens = max_prefill + max_batch_size + 16 if is_cramped else 1 << 20
        self.scheduler = make_scheduler(
            num_blocks=num_blocks,
            num_eager_blocks=num_eager,
            block_size=BLOCK,
            max_batch_size=max_batch_size,
            max_prefill_tokens=max_prefill,
            max_step_tokens=max_step_tokens,
            prefix_cache=not is_forgetful and vision is not Bidirectional.PROMPT and num_kept_states != 0,
            num_kept_states=num_kept_states,
            vision=vision,
            has_prompt_arithmetic=has_prompt_arithmetic,
            drafts=drafts,
            max_adapters=MAX_ADAPTERS,
            windows=windows,
        )
        self.runner = FakeRunner(
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_batch_size=max_batch_size,
            vision=vision,
            has_prompt_arithmetic=has_prompt_arithmetic,
            drafts=drafts,
            max_adapters=MAX_ADAPTERS,
            windows=windows,
            max_step_tokens=max_step_tokens,
            num_kept_states=num_kept_states,
        )
        self.num_blocks = num_blocks
        self.open: list[Sequence] = []
        self.flights: deque[tuple[Step, list[StepResult]]] = deque()
        self.num_arrived = 0
        self.answers: list[list[int]] = []  # prompt and output of finished sequences

    @rule(
        family=st.integers(0, 2),
        turn=st.none() | st.integers(0, 5),
        prompt_len=st.integers(1, 20),
        max_tokens=st.integers(1, 16),
        n=st.integers(1, 3),
        num_alike=st.integers(1, 3),
        tenant=st.sampled_from("ab"),
        priority=st.integers(0, 1),
        is_private=RARELY,
        wants_prompt_logprobs=RARELY,
        is_watched=RARELY,
        places=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=3),
        are_seen_by_all=st.booleans(),
        adapter=st.sampled_from((None, *ADAPTERS)),
    )
    def submit(
        self,
        family: int,
        turn: int | None,
        prompt_len: int,
        max_tokens: int,
        n: int,
        num_alike: int,
        tenant: str,
        priority: int,
        is_private: bool,
        wants_prompt_logprobs: bool,
        is_watched: bool,
        places: list[tuple[int, int]],
        are_seen_by_all: bool,
        adapter: Adapter | None,
    ) -> None:
        prompt = [family * 50 + position for position in range(prompt_len)]
        if turn is not None and self.answers:
            prompt = self.answers[-1 - turn % len(self.answers)] + prompt[:3]
        for own in range(num_alike):
            tokens = [*prompt, 200 + own] if num_alike > 1 else prompt
            needs = self.scheduler.tables.needs
            num_blocks = max(
                needs.total_for(len(tokens) + max_tokens - 1),
                needs.total_for(len(tokens), keeps_all=wants_prompt_logprobs),
            )
            if num_blocks > self.num_blocks or len(self.open) > 12:
                return
            request = make_request(
                tokens,
                max_tokens,
                sampling=SamplingParams(seed=self.num_arrived),
                n=n,
                priority=priority,
                cache_salt=str(self.num_arrived) if is_private else None,
                prompt_logprobs=0 if wants_prompt_logprobs else None,
                grammar=WatchedGrammar(range(97, 104)) if is_watched else None,
                adapter=adapter,
                images=(
                    images_at(places, len(tokens), are_seen_by_all=are_seen_by_all)
                    if self.runner.vision is not None
                    else ()
                ),
            )
            self.open += add_request(self.scheduler, request, self.num_arrived, tenant)
            self.num_arrived += 1

    @precondition(lambda self: len(self.flights) < 2)
    @rule(runs_early=st.booleans())
    def plan(self, runs_early: bool) -> None:
        step = self.scheduler.plan()
        if step is not None:
            self.flights.append((step, []))
            if runs_early:
                self._run_all()

    @precondition(lambda self: self.flights)
    @rule()
    def complete(self) -> None:
        step, results = self.flights[0]
        if not results:
            results.append(self.runner.execute(step.plan))
        self.flights.popleft()
        self._apply(step, results[0])

    @precondition(lambda self: self.flights and not self.flights[0][1])
    @rule(
        is_split=st.booleans(),
        is_backwards=st.booleans(),
        max_tokens=st.none() | st.integers(1, 8),
        num_more=st.integers(0, 2),
    )
    def fail(self, is_split: bool, is_backwards: bool, max_tokens: int | None, num_more: int) -> None:
        """Fail the oldest step: discard the steps after it, and run its rows again, whole or in parts."""
        (failed, _), *following = self.flights
        self.flights.clear()
        self._break(failed)
        for step, _ in reversed(following):
            self.runner.execute(step.plan, is_tainted=True)
            self.scheduler.rollback(step)
        pending = [failed]
        while pending:
            step = pending.pop()
            self.scheduler.rollback(step)
            middle = len(step.sequences) // 2 if is_split else 0
            halves = [range(middle), range(middle, len(step.sequences))]
            for rows in reversed(halves) if is_backwards else halves:
                again = self.scheduler.retry(step, rows, max_tokens)
                if again is None:
                    continue
                if num_more:
                    num_more -= 1
                    self._break(again)
                    pending.append(again)
                else:
                    self._apply(again, self.runner.execute(again.plan))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel all choices of a request; a poisoned request is also removed from the cache."""
        request = data.draw(st.sampled_from(self.open)).request
        for sequence in [sequence for sequence in self.open if sequence.request is request]:
            self.scheduler.remove(sequence, forget=data.draw(st.booleans()))
            self.open.remove(sequence)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def stop_early(self, data: st.DataObject) -> None:
        """End one choice, as with EOS or a stop string, while a step still computes it."""
        sequence = data.draw(st.sampled_from(self.open))
        if sequence.num_output:
            self.scheduler.remove(sequence)
            self.open.remove(sequence)

    def _run_all(self) -> None:
        for step, results in self.flights:
            if not results:
                results.append(self.runner.execute(step.plan))

    def _break(self, step: Step) -> None:
        self.runner.fault = lambda plan: RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            self.runner.execute(step.plan)
        self.runner.fault = None

    def _apply(self, step: Step, result: StepResult) -> None:
        for _, sequence in self.scheduler.apply(step, result):
            assert sequence.num_output <= sequence.max_tokens
            if sequence.num_output == sequence.max_tokens:
                self.scheduler.remove(sequence)
                self.open.remove(sequence)
                self.answers.append(list(sequence.token_ids))
            tokens = sequence.token_ids[sequence.prompt_len :]
            assert tokens == expected_tokens(
                sequence.request.prompt_ids,
                len(tokens),
                sampling=sequence.request.sampling,
                choice=sequence.choice,
            )

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.pool
        check_pool(pool)
        holders: Counter[int] = Counter()
        writable: Counter[int] = Counter()
        for sequence in self.scheduler.running:
            for table, first in zip(sequence.tables, sequence.num_freed, strict=True):
                holders.update(table[first:])
                writable.update(table[sequence.num_computed // BLOCK :])
            holders.update(sequence.copy_sources)
        assert pool._references == [holders[block] for block in range(self.num_blocks)]
        tables = holders - Counter(
            block for sequence in self.scheduler.running for block in sequence.copy_sources
        )
        for block in writable:
            assert tables[block] == 1, f"block {block} will be written and is shared"
            assert pool._digests[block] is None, f"block {block} will be written and is in the cache"

    @invariant()
    def kept_states_are_accounted_for(self) -> None:
        if not hasattr(self, "scheduler") or self.scheduler.tables.states is None:
            return
        states = self.scheduler.tables.states
        check_pool(states.pool)
        holders = Counter(keep.place for step, _ in self.flights for keep in step.keeps)
        for sequence in self.scheduler.running:
            use = sequence.recurrent
            places = (use.resumes, use.for_choices, use.answer)
            holders.update(place for place in places if place is not None)
        assert states.pool._references == [holders[place] for place in range(states.pool.num_blocks)]
        assert set(states.pool.known) <= set(self.scheduler.pool.known)
        pending = {keep.digest for step, _ in self.flights for keep in step.keeps} - {None}
        assert states._pending == pending
        num_answers = sum(sequence.recurrent.answer is not None for sequence in self.scheduler.running)
        assert states._num_answers == num_answers <= states.pool.num_blocks // 2

    @invariant()
    def sequences_are_accounted_for(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running = [sequence for sequence in self.open if sequence.stage is Stage.RUNNING]
        assert sorted(running, key=lambda sequence: sequence.urgency) == list(self.scheduler.running)
        assert self.scheduler.num_waiting == len(self.open) - len(running)
        assert len({sequence.slot for sequence in running}) == len(running)

    def teardown(self) -> None:
        """All open requests end by themselves within a few steps, and leave nothing behind."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.open and not self.flights:
                break
            if len(self.flights) < 2:
                self.plan(runs_early=False)
            assert self.flights, f"nothing to compute, and the engine would sleep: {self.open}"
            self.complete()
            self.blocks_are_accounted_for()
        assert not self.open, f"stuck: {self.open}"
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0
        assert self.runner.violations == []


# When a run fails, hypothesis may search for a shorter one for five minutes.
TestScheduler = pytest.mark.time_limit(900)(SchedulerMachine.TestCase)
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40)
