"""Decide what each step computes: rows, chunks, blocks and slots. No torch, no asyncio, no clock.

Called by the engine, which keeps up to two steps in flight: `plan` is called before the previous step's
result is known, and `apply` is called with the results in order.

Blocks that a step in flight has yet to write can already be shared or freed, for these reasons. (1) Steps run
in the order in which they were planned; within a step, each layer writes the keys and values of all rows
before any row reads them. (2) A row writes only to blocks that no other table held when the row was planned.
(3) A block of known tokens is registered when the row that fills it is planned; a block filled by decoding is
registered when that row's result is applied. Later rows of the same sequence write after it. (4) A row reads
only positions that it, or a row planned before it, writes for the same tokens. A hit on a planned block
therefore reads the right contents (1, 3). A late write for a sequence that has ended lands before the block's
next owner writes (1); it is either overwritten before it is read (4), or holds what a hit expects.

With a sliding window, a running sequence frees blocks early: applying a row's result frees the blocks that no
later token can read. The sequence's rows in flight begin where that row ends or later, so they neither read
nor write these blocks. The same holds for retried rows, except for those of a prompt that starts over because
all of its tokens must be computed in order (`Sequence.needs_all`): such a prompt keeps all blocks until it is
computed.

After a failed step, (1) does not hold. `rollback` makes the blocks that the step was to fill unfindable and
preempts the sequences that were to read them, so no row is retried before its inputs are there. A row is
retried only if its sequence still holds its blocks, and the source of a copy is held until the copy has been
applied. A prompt that starts over rewrites all of its blocks, so they count as lost, too.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter

from tgi_asgi.engine.allowance import Allowance
from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.budget import NextPrompt, TokenBudget
from tgi_asgi.engine.drafting import plan_drafts
from tgi_asgi.engine.image_encoding import ChunkBoundaries, awaits_image, plan_image_encoding
from tgi_asgi.engine.policy import SchedulingPolicy
from tgi_asgi.engine.preemption import choose_victim, num_missing_blocks
from tgi_asgi.engine.prompt_rows import PromptRows
from tgi_asgi.engine.prompt_turns import ClaimHistory, PromptTurns
from tgi_asgi.engine.running_set import RunningSet
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step, apply_result, undo_rows
from tgi_asgi.engine.tables import BlockTables
from tgi_asgi.engine.waiting import WaitingQueue
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.runner.plan import RunnerTraits, SlotStart, StepResult, StepRow
from tgi_asgi.types import SamplingParams

_urgency = attrgetter("urgency")


class Scheduler:
    """Continuous batching with chunked prefill, a prefix cache and preemption by recomputation.

    The running sequences are kept in order of urgency. A step has, as long as tokens, slots and blocks last:
    decode rows, new prompts that need not wait for those in prefill (`prompt_turns.py`), chunks of those in
    prefill, other new prompts.

    When a sequence needs a block and none is free, the tenant that holds the most blocks loses its least
    urgent sequence. The most urgent sequence of all is never preempted, and every request fits into the pool
    on its own (the engine checks), so there is always progress.

    If the runner takes whole prompts only, one that exceeds the budget gets its own step. If prompts have an
    arithmetic of their own, a row holds either prompt tokens or sampled tokens, and blocks with sampled
    tokens are never shared. A sequence's bits then depend only on which of its tokens are prompt, not on
    other requests or on preemption.
    """

    def __init__(
        self, traits: RunnerTraits, policy: SchedulingPolicy, budget: TokenBudget, stats: EngineStats
    ) -> None:
        self.traits = traits
        self.block_size = traits.block_size
        self.pool = BlockPool(traits.num_blocks, traits.num_eager_blocks)
        self.chunk_boundaries = ChunkBoundaries(traits.vision)
        self.tables = BlockTables(
            self.pool, BlockNeeds(traits.windows, traits.block_size, traits.max_step_tokens),
            prefix_cache=policy.prefix_cache, num_kept_states=traits.num_kept_states,
            shares_only_prompts=traits.has_prompt_arithmetic, stats=stats,
        )  # fmt: skip
        self._policy = policy
        self._has_vision = traits.vision is not None
        self._budget = budget
        self._stats = stats
        self._running = RunningSet(traits.max_batch_size, policy.max_adapters)
        self._rows = PromptRows(traits, self.tables, self._running, self.chunk_boundaries)
        self._waiting = WaitingQueue()
        self._claims = ClaimHistory()
        self._num_waiting = 0
        self._num_postponed = 0  # steps in a row in which prompts that could have started did not
        self._next_step = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences that hold a slot, most urgent first."""
        return tuple(self._running.sequences)

    @property
    def resumable(self) -> BlockPool:
        """The pool whose digests show how far prompts can be resumed: the blocks, or the kept states."""
        return self.pool if self.tables.states is None else self.tables.states.pool

    def add(self, sequences: list[Sequence]) -> None:
        """Queue a request's sequences; the first one computes the prompt for all of them."""
        leader, *followers = sequences
        leader.followers = followers
        self._num_waiting += len(sequences)
        self._waiting.push(leader)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Release all that a sequence holds, for good; with `forget`, none of it stays cached."""
        if sequence.stage is Stage.FINISHED:
            return
        if sequence.stage is Stage.RUNNING:
            self._stop_running(sequence, forget=forget)
        else:
            self._num_waiting -= 1
            self._requeue(self._running.adapters.remove(sequence))
        sequence.reset_to(Stage.FINISHED)
        self._release_followers(sequence)
        self._waiting.compact(self._num_waiting)

    def _stop_running(self, sequence: Sequence, *, forget: bool = False) -> None:
        self.tables.release(sequence, forget=forget)
        self._requeue(self._running.leave(sequence))

    def _requeue(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._waiting.push(sequence)

    def plan(self, now: float = 0.0) -> Step | None:
        """Plan the next step, or return None if there is nothing to compute now.

        Args:
            now: Current time on the clock of the arrival times; waiting time determines the chunk size.
        """
        step = Step(self._next_step)
        prefilling = self._plan_decodes(step)
        step.num_decode_rows = step.num_generated_rows = len(step.sequences)
        following = prefilling[0] if prefilling else None
        if following is None and self._running.free_slots:
            following = self._waiting.first(self._running.num_of_tenant)
        budget, num_beside_stream, waited_s = 0, 0, 0.0
        if following is not None:
            waited_s = now - following.arrival_s
            num_rows, prompt = step.num_decode_rows, self._next_prompt(following)
            budget = self._budget.tokens(num_rows, prompt, waited_s)
            num_beside_stream = self._budget.tokens(num_rows + 1, prompt, waited_s)
            budget = min(budget, self.traits.max_step_tokens - num_rows)
            if self._has_vision and num_rows and any(map(awaits_image, prefilling)):
                budget = max(budget // 2, self.block_size)
        self._plan_prompts(step, prefilling, Allowance(budget, num_beside_stream, self.block_size))
        if step.pending_images:
            left = 1.0 - step.num_prefill_tokens / max(budget, step.num_prefill_tokens, 1)
            spare_s = left * self._budget.spare_s(step.num_decode_rows, waited_s)
            plan_image_encoding(step.plan, step.pending_images, spare_s)
        if not step.sequences and not step.pending_images:
            return None
        drafts = self.traits.drafts
        if drafts is not None and len(step.sequences) == step.num_decode_rows > 0:
            room = self.traits.max_step_tokens - step.num_decode_rows
            plan_drafts(step.plan.rows, step.sequences, self.tables, drafts, room)
            step.plan.cost = self._budget.cost_s
        self._end_prefills(step)
        self._next_step += 1
        return step

    def _next_prompt(self, sequence: Sequence) -> NextPrompt:
        num_tokens = len(sequence.token_ids)
        if sequence.stage is Stage.RUNNING:
            num_cached, num_before = sequence.num_reused, sequence.num_computed
        else:
            num_cached = num_before = num_tokens - self.tables.recent_num_to_compute(sequence)
        reach = self._rows.reach
        return NextPrompt(num_tokens - num_cached, min(num_cached, reach), min(num_before, reach))

    def _plan_decodes(self, step: Step) -> list[Sequence]:
        """Add a row for every decoding sequence; return the sequences that are still in prefill.

        Takes about 1 us per row.
        """
        if self.pool.num_free < len(self._running) * self.tables.num_groups:
            self._preempt_for_blocks()
        prefilling: list[Sequence] = []
        size = self.block_size
        rows, sequences, epochs = step.plan.rows, step.sequences, step.epochs  # as `Step.insert`
        states = self.tables.states
        if states is not None and not states.keeps_answers:
            states = None
        for sequence in self._running.in_row_order():
            if sequence.is_prefilling:
                prefilling.append(sequence)
                continue
            token_ids, pending = sequence.token_ids, sequence.num_pending
            if len(token_ids.output) + pending >= sequence.max_tokens:
                continue
            start, ahead = sequence.num_computed, sequence.num_ahead
            stop = min(start + ahead + 1, sequence.last_end)
            if stop > len(sequence.tables[0]) * size:
                self.tables.grow(sequence)
            if sequence.starts_slot:
                step.start_slot(sequence)
            known = None if pending else token_ids[start:]
            row = StepRow(
                sequence.slot, known, start, sequence.tables,
                samples=True, is_generated=True, adapter=sequence.adapter,
            )  # fmt: skip
            if ahead:
                row.stop = stop
            elif states is not None and start % size == 0:
                states.plan_answer(step.keeps, row, sequence)
            rows.append(row)
            sequences.append(sequence)
            epochs.append(sequence.epoch)
            sequence.num_computed = start + 1
            sequence.num_pending = pending + 1
        if self._running.adapters.num_running:
            prefilling.sort(key=_urgency)
        return prefilling

    def _preempt_for_blocks(self) -> None:
        """Preempt sequences until every remaining one can get the blocks that it needs next."""
        running = self._running.sequences
        missing = {sequence: num_missing_blocks(sequence, self.tables) for sequence in running}
        while sum(missing.values()) > self.pool.num_free:
            victim = choose_victim(running, self.tables)
            self._suspend(victim)
            self._stats.preemptions += 1
            del missing[victim]

    def _suspend(self, sequence: Sequence) -> None:
        """Preempt a running sequence; a further choice awaits a leader that still computes the prompt."""
        self._stop_running(sequence)
        self._num_waiting += 1
        leader = sequence.leader
        if leader is not None and leader.stage is Stage.RUNNING and leader.is_prefilling:
            sequence.reset_to(Stage.AWAITS_LEADER)
            leader.followers.append(sequence)
        else:
            sequence.reset_to(Stage.WAITING)
            self._waiting.push(sequence)

    def _plan_prompts(self, step: Step, prefilling: list[Sequence], allowance: Allowance) -> None:
        """Add rows for prompts in prefill and for new ones, as long as tokens, slots and blocks last."""
        may_admit = self._may_admit(step) and self.tables.may_start(self._running.sequences)
        if self._may_interleave(prefilling):
            turns = PromptTurns(
                allowance, prefilling, self._waiting, self.tables, self._running.adapters, self._claims
            )
            if may_admit:
                self._admit_ahead(step, turns)
            turns.go_on(partial(self._rows.plan, step))
        else:
            for sequence in prefilling:
                limit = allowance.limit(sequence.num_left)
                if limit > 0:
                    allowance.spend(sequence, self._rows.plan(step, sequence, limit))
        if may_admit:
            self._admit(step, allowance)

    def _may_interleave(self, prefilling: list[Sequence]) -> bool:
        """Return whether other prompts may take tokens before those in prefill do.

        What may not be cut might otherwise never find enough tokens left in a step.
        """
        if not prefilling or self.traits.takes_whole_prompts:
            return False
        return not (self._has_vision and any(map(self.chunk_boundaries.spans, prefilling)))

    def _end_prefills(self, step: Step) -> None:
        """End the prefill of sequences that this step samples for; queue the choices that waited for it."""
        for index in range(step.num_decode_rows, len(step.sequences)):
            if step.plan.rows[index].samples:
                sequence = step.sequences[index]
                sequence.is_prefilling = False
                self._release_followers(sequence)

    def _release_followers(self, leader: Sequence) -> None:
        for follower in leader.followers:
            if follower.stage is Stage.AWAITS_LEADER:
                follower.stage = Stage.WAITING
                self._waiting.push(follower)
        leader.followers = []

    def _may_admit(self, step: Step) -> bool:
        """Return whether new prompts may start: enough of them wait, or they were postponed long enough."""
        policy = self._policy
        are_few = 0 < self._num_waiting < policy.waiting_served_ratio * step.num_decode_rows
        if are_few and self._num_postponed < policy.max_waiting_steps:
            self._num_postponed += 1
            return False
        self._num_postponed = 0
        return True

    def _admit_ahead(self, step: Step, turns: PromptTurns) -> None:
        """Start waiting sequences that need not wait for prompts in prefill."""
        running = self._running
        while running.free_slots:
            sequence = self._waiting.first(running.num_of_tenant, turns.candidate)
            if sequence is None:
                return
            limit = turns.limit(sequence)
            if limit < self.block_size:
                continue  # no candidate any more: a stream begins, and shares were divided anew
            count = self._start(step, sequence, limit)
            if count is None:
                return
            if sequence.stage is Stage.RUNNING:
                turns.start(sequence, count)

    def _admit(self, step: Step, allowance: Allowance) -> None:
        """Start waiting sequences, strictly in turn, while tokens, slots and blocks last.

        If fewer tokens than a block remain, no sequence starts: one that started without computing anything
        would have looked into the cache too early.
        """
        running, size = self._running, self.block_size
        while running.free_slots and allowance.num_left > 0:
            sequence = self._waiting.first(running.num_of_tenant)
            if sequence is None:
                return
            num_left = sequence.num_left
            if num_left > allowance.num_left:
                num_left = self.tables.num_to_compute(sequence)
            limit = allowance.limit(num_left)
            is_enough = limit >= size or (limit > 0 and not step.num_prefill_tokens)
            count = self._start(step, sequence, limit) if is_enough else None
            if count is None:
                return
            allowance.spend(sequence, count)

    def _start(self, step: Step, sequence: Sequence, budget: int) -> int | None:
        """Start the sequence whose turn it is, or park it; return how many of its tokens this step computes.

        Returns None if too few tokens or blocks are left for it.
        """
        running = self._running
        if not running.adapters.may_run(sequence):
            self._waiting.pop(sequence)
            running.adapters.park(sequence)
            return 0
        is_too_long = sequence.prompt_len > budget and step.num_prefill_tokens > 0
        if self.traits.takes_whole_prompts and is_too_long:
            return None
        if not self.tables.start(sequence, running.sequences):
            return None
        self._waiting.pop(sequence)
        running.enter(sequence)
        self._num_waiting -= 1
        return self._rows.plan(step, sequence, budget)

    def apply(self, step: Step, result: StepResult) -> list[tuple[int, Sequence]]:
        """Apply a step's result; return (row, sequence) of the live rows.

        Appends each sampled token unless its logits were not finite. The caller ends sequences.
        """
        return apply_result(step, result, self.tables)

    def rollback(self, step: Step) -> None:
        """Undo a step that failed, or that followed a failed one; undo the newest of several first."""
        lost = undo_rows(step, self.tables)
        self.pool.forget(lost)
        void = set() if self.tables.states is None else self.tables.states.undo(step.keeps)
        for sequence in self.running:
            if self.tables.reads(sequence, lost) or sequence.recurrent.resumes in void:
                self._suspend(sequence)

    def retry(self, failed: Step, rows: range, max_tokens: int | None = None) -> Step | None:
        """Plan some rows of a step again after `rollback`; return None if none of them is live any more.

        With `max_tokens`, each row computes at most that many tokens and later steps compute the rest. The
        same happens if a prompt that starts over is longer than a step allows. Rows for which such a prompt
        leaves no room are left to later steps, too.
        """
        step = Step(self._next_step)
        room = self.traits.max_step_tokens
        for index, sequence in failed.live():
            if index in rows:
                row = failed.plan.rows[index]
                # A decode row may begin later than planned.
                whole_end = end = max(row.start + row.num_tokens, sequence.num_computed + 1)
                if max_tokens is not None:
                    end = min(end, sequence.num_computed + max_tokens)
                end = min(end, sequence.num_computed + room)
                end = self._rows.end_of_kind(sequence, end)
                end = self.chunk_boundaries.end(sequence, sequence.num_computed, end)
                count = end - sequence.num_computed
                if not 0 < count <= room:  # more than `room` if an image would be cut
                    continue
                room -= count
                self._rows.add(step, sequence, count, samples=row.samples and end == whole_end)
        if not step.sequences:
            return None
        self._end_prefills(step)
        self._next_step += 1
        return step

    def probe(self) -> Step | None:
        """Plan a step of one token that belongs to no request, to test whether steps can succeed.

        Returns None if no slot or block is free. `end_probe` releases its slot and blocks.
        """
        if not self._running.free_slots or self.pool.num_free < self.tables.num_groups:
            return None
        step = Step(self._next_step)
        self._next_step += 1
        slot = self._running.free_slots.pop()
        blocks = [[self.pool.allocate()] for _ in range(self.tables.num_groups)]
        step.plan.starts.append(SlotStart(slot, SamplingParams(temperature=0.0), 0, (0,)))
        step.plan.rows.append(StepRow(slot, (0,), 0, blocks, samples=True))
        step.num_prefill_tokens = 1
        return step

    def end_probe(self, step: Step) -> None:
        """Release the slot and blocks of a probe."""
        [row] = step.plan.rows
        self._running.free_slots.append(row.slot)
        for table in row.block_tables:
            self.pool.release(list(table))
