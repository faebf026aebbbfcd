"""Decide what each step computes: rows, chunks, blocks and slots. No torch, no asyncio, no clock.

Called by the engine, which keeps up to two steps in flight: `plan` is called before the result of the step
before is known, `apply` is called with the results in order.

Why blocks that a step in flight has yet to write can be shared, and given back. (1) Steps run in the order
planned; within one, each layer writes the keys and values of all rows before any row reads them. (2) A row
writes only to blocks that its sequence alone has in its table, or that were shared after it was planned.
(3) A block of known tokens is registered when the row that fills it is planned, one that fills by decoding
when that row's result is applied; its sequence's later rows write behind it. (4) A row reads only positions
that it, or a row planned before it, writes for the same tokens. So a hit on a planned block reads what it
should (1, 3), and a late write for a sequence that has ended lands before its block's next owner writes (1),
and is overwritten before it is read (4), or is what a hit wanted.

Behind a window a sequence gives blocks back while it runs: when the result of a row is applied, those that no
token behind that row reads. Its rows in flight begin there, so they neither read nor write them; so does a
row that is run again, but for a prompt whose scores begin again: that keeps all until it is computed.

After a failed step (1) does not hold. `rollback` forgets what the step was to fill and takes their blocks
from those that were to read it: no row is run again before what it reads is there. Only rows are run again
whose sequence still holds its blocks, and the source of a copy is held until the copy has been applied. A
prompt whose scores begin again writes all of its blocks anew: they count as lost, too.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from operator import attrgetter

from tgi_asgi.engine.adapted import RunningAdapters
from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.drafting import plan_drafts
from tgi_asgi.engine.looks import Cuts, is_looking, plan_views
from tgi_asgi.engine.sequence import Sequence, SequenceState
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step, take_over
from tgi_asgi.engine.tables import BlockTables
from tgi_asgi.engine.waiting import WaitingQueue
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.runner.plan import DraftLimits, SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.types import Eyes, SamplingParams

_urgency = attrgetter("urgency")


class Scheduler:
    """Continuous batching with chunked prefill, a prefix cache and preemption by recomputation.

    The running sequences are kept in order of urgency; decode rows go first, then chunks of running prompts,
    then new ones as long as tokens, slots and blocks last. When a sequence needs a block and none is free the
    tenant that holds most blocks loses its least urgent one. The most urgent of all is never preempted, and
    every request fits the pool alone (the engine checks), so there is always progress.

    Args:
        num_eager_blocks: blocks that are filled before cached ones are given up (default: all).
        eyes: of a model that takes images.
        num_kept_states: as the runner's.
        takes_whole_prompts: no prompt is cut; one that exceeds the budget is a step of its own.
        has_prompt_arithmetic: tokens of prompts have other bits than the same tokens drawn. Then a row has
            the one or the other, and a block with drawn tokens is its sequence's alone: so the bits of a
            text depend on what is prompt in it, and not on what others have asked, or on a preemption.
        drafts: how many the runner takes.
        windows: of the groups of layers, as the runner's.
        waiting_served_ratio: while some decode, prompts start only once so many times as many wait, or after
            `max_waiting_steps`: steps without prompts are shorter. 0: at once.
        max_adapters: different ones that a step may have.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch_size: int,
        max_step_tokens: int,
        budget: TokenBudget,
        stats: EngineStats,
        num_eager_blocks: int | None = None,
        prefix_cache: bool = True,
        num_kept_states: int | None = None,
        eyes: Eyes | None = None,
        takes_whole_prompts: bool = False,
        has_prompt_arithmetic: bool = False,
        drafts: DraftLimits | None = None,
        windows: tuple[int | None, ...] = (None,),
        waiting_served_ratio: float = 0.0,
        max_waiting_steps: int = 20,
        max_adapters: int = 8,
    ) -> None:
        self.pool = BlockPool(num_blocks, num_eager_blocks)
        self.cuts = Cuts(eyes)
        self.tables = BlockTables(
            self.pool, BlockNeeds(windows, block_size, max_step_tokens), prefix_cache=prefix_cache,
            num_kept_states=num_kept_states, shares_prompts_alone=has_prompt_arithmetic, stats=stats,
        )  # fmt: skip
        self._has_prompt_arithmetic = has_prompt_arithmetic
        self._has_eyes = eyes is not None
        self.block_size = block_size
        self.takes_whole_prompts = takes_whole_prompts
        self._max_step_tokens = max_step_tokens
        self._drafts = drafts
        self._budget = budget
        self._stats = stats
        self._running: list[Sequence] = []  # most urgent first
        self._num_running_of: Counter[str | None] = Counter()  # by tenant
        self._waiting = WaitingQueue()
        self._adapters = RunningAdapters(max_adapters)
        self._num_waiting = 0
        self._served_ratio = waiting_served_ratio
        self._max_waiting_steps = max_waiting_steps
        self._num_held_back = 0  # steps since prompts that could have started were not
        self._slots = list(reversed(range(max_batch_size)))  # free ones, lowest last
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
        return tuple(self._running)

    @property
    def resumable(self) -> BlockPool:
        """What tells by its digests how far prompts are found: the blocks, or the states behind some."""
        return self.pool if self.tables.states is None else self.tables.states.pool

    def add(self, sequences: list[Sequence]) -> None:
        """Queue a request's sequences, the first of which computes the prompt for all."""
        leader, *followers = sequences
        leader.followers = followers
        self._num_waiting += len(sequences)
        self._waiting.push(leader)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Give back all that a sequence holds, for good; with `forget` none of it stays in the cache."""
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
            self._stop_running(sequence, forget=forget)
        else:
            self._num_waiting -= 1
            self._requeue(self._adapters.give_up(sequence))
        sequence.leave(SequenceState.FINISHED)
        self._release_followers(sequence)
        self._waiting.compact(self._num_waiting)

    def _stop_running(self, sequence: Sequence, *, forget: bool = False) -> None:
        self.tables.give_back(sequence, forget=forget)
        self._slots.append(sequence.slot)
        self._num_running_of[sequence.tenant] -= 1
        self._requeue(self._adapters.leave(sequence))

    def _requeue(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._waiting.push(sequence)

    def plan(self, now: float = 0.0) -> Step | None:
        """Plan the next step, or return None if there is nothing that a step could compute now.

        Args:
            now: of the clock that arrivals are of; how long prompts have waited sizes their chunks.
        """
        step = Step(self._next_step)
        prefilling = self._plan_decodes(step)
        step.num_decode_rows = step.num_generated_rows = len(step.sequences)
        following = prefilling[0] if prefilling else self._waiting.first(self._num_running_of)
        budget, waited_s = 0, 0.0
        if following is not None:
            waited_s = now - following.arrival_s
            budget = self._budget.tokens(step.num_decode_rows, waited_s)
            budget = min(budget, self._max_step_tokens - step.num_decode_rows)
            if self._has_eyes and step.num_decode_rows and any(map(is_looking, prefilling)):
                budget = max(budget // 2, self.block_size)
        for sequence in prefilling:
            if sequence.state is SequenceState.RUNNING and budget > 0:
                budget -= self._plan_chunk(step, sequence, budget)
        if self._may_admit(step):
            self._admit(step, budget)
        if step.looks:
            left = 1.0 - step.num_prefill_tokens / max(budget, step.num_prefill_tokens, 1)
            plan_views(
                step.plan, step.looks, lambda: left * self._budget.room_s(step.num_decode_rows, waited_s)
            )
        if not step.sequences and not step.looks:
            return None
        if self._drafts is not None and len(step.sequences) == step.num_decode_rows > 0:
            room = self._max_step_tokens - step.num_decode_rows
            plan_drafts(step.plan.rows, step.sequences, self.tables, self._drafts, room)
            step.plan.cost = self._budget.cost_s
        self._end_prefills(step)
        self._next_step += 1
        return step

    def _plan_decodes(self, step: Step) -> list[Sequence]:
        """Add a row for every sequence that decodes; return those that do not yet.

        About 1 us a row.
        """
        if self.pool.num_free < len(self._running) * self.tables.num_groups:
            self._make_room()
        prefilling: list[Sequence] = []
        running, size = self._running, self.block_size
        rows, sequences, epochs = step.plan.rows, step.sequences, step.epochs
        states = self.tables.states
        if states is not None and not states.keeps_answers:
            states = None
        if self._adapters.num_running:  # rows of one adapter side by side; the others first
            running = self._adapters.grouped(running)
        for sequence in running:
            if sequence.is_prefilling:
                prefilling.append(sequence)
                continue
            token_ids, pending = sequence.token_ids, sequence.num_pending
            if len(token_ids) + pending >= sequence.prompt_len + sequence.max_tokens:
                continue
            start, ahead = sequence.num_computed, sequence.num_ahead
            stop = min(start + ahead + 1, sequence.last_end)
            if stop > len(sequence.tables[0]) * size:
                self.tables.grow(sequence)
            if sequence.starts_slot:
                self._start_slot(step.plan, sequence)
            known = None if pending else token_ids[start:]
            row = StepRow(
                sequence.slot, known, start, sequence.tables, True,
                is_generated=True, adapter=sequence.adapter,
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
        if self._adapters.num_running:
            prefilling.sort(key=_urgency)
        return prefilling

    def _make_room(self) -> None:
        """Preempt until there are blocks for each sequence that needs its next ones."""
        missing = {sequence: self._num_missing(sequence) for sequence in self._running}
        while sum(missing.values()) > self.pool.num_free:
            victim = self._victim()
            self._suspend(victim)
            self._stats.preemptions += 1
            del missing[victim]

    def _num_missing(self, sequence: Sequence) -> int:
        """Return how many blocks a sequence must get for its next token."""
        if sequence.is_prefilling:
            return self.tables.num_missing(sequence)
        end = min(sequence.num_computed + sequence.num_ahead + 1, sequence.last_end)
        is_growing = (
            end > len(sequence.tables[0]) * self.block_size
            and len(sequence.token_ids) + sequence.num_pending < sequence.prompt_len + sequence.max_tokens
        )
        return self.tables.num_groups if is_growing else 0

    def _victim(self) -> Sequence:
        """Return the least urgent sequence of the tenant that holds most blocks; not the first of all."""
        num_held = Counter[str | None]()
        for sequence in self._running:
            num_held[sequence.tenant] += self.tables.num_held(sequence)
        others = self._running[1:] or self._running
        return max(others, key=lambda sequence: (num_held[sequence.tenant], sequence.urgency))

    def _suspend(self, sequence: Sequence) -> None:
        """Take all from a running sequence and let it wait: a further choice for its prompt, if need be."""
        self._running.remove(sequence)
        self._stop_running(sequence)
        self._num_waiting += 1
        leader = sequence.leader
        if leader is not None and leader.state is SequenceState.RUNNING and leader.is_prefilling:
            sequence.leave(SequenceState.HELD)
            leader.followers.append(sequence)
        else:
            sequence.leave(SequenceState.WAITING)
            self._waiting.push(sequence)

    def _plan_chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        """Add a row with as many of the sequence's known tokens as the budget allows; return how many.

        A chunk that does not finish them ends at a block boundary; a sliver is left to the next step, unless
        it is all that this one has. So is a prompt that may not be cut, and what there are no blocks for.
        """
        start = sequence.num_computed
        count = remaining = len(sequence.token_ids) - start
        limit = min(budget, self._cover(sequence, start + min(budget, count)) - start)
        if count > budget and self.takes_whole_prompts:
            if step.num_prefill_tokens:
                return 0
        elif count > limit:
            aligned = limit - (start + limit) % self.block_size
            if aligned <= 0 and (step.num_prefill_tokens or limit <= 0):
                return 0
            count = aligned if aligned > 0 else limit
        count = self._end_of_kind(sequence, start + count) - start
        if self._has_eyes:
            room = self._max_step_tokens - step.num_decode_rows - step.num_prefill_tokens
            count, looks = self.cuts.before_images(sequence, count, room)
            step.looks += looks
            if count == 0 or self._cover(sequence, start + count) < start + count:
                return 0
        self._add_row(step, sequence, count, samples=count == remaining)
        return count

    def _cover(self, sequence: Sequence, end: int) -> int:
        """Give a prompt blocks up to a position; return up to where it has them."""
        return self.tables.cover(sequence, end, spare=len(self._running) * self.tables.num_groups)

    def _end_of_kind(self, sequence: Sequence, end: int) -> int:
        """Return where a row that is to end there must end: a prompt's before tokens that were drawn."""
        if not self._has_prompt_arithmetic or sequence.is_behind_prompt:
            return end
        return min(end, sequence.prompt_len)

    def _add_row(self, step: Step, sequence: Sequence, count: int, *, samples: bool) -> None:
        """Add a row of `count` known tokens, with the slot's start and the block to copy where due."""
        start = sequence.num_computed
        plan = step.plan
        if sequence.starts_slot:
            self._start_slot(plan, sequence)
        for block, table in zip(sequence.copy_sources, sequence.tables, strict=False):  # none, or one of each
            plan.copies.append((block, table[start // self.block_size]))
        wanted = sequence.request.prompt_logprobs if sequence.wants_prompt_logprobs else None
        tokens = sequence.token_ids[start : start + count]
        second_start = sequence.request.second_start
        is_generated = self._has_prompt_arithmetic and sequence.is_behind_prompt
        at = step.num_generated_rows if is_generated else len(plan.rows)
        step.num_generated_rows += is_generated
        row = StepRow(
            sequence.slot, tokens, start, sequence.tables, samples, wanted, sequence.pooling, second_start,
            is_generated, adapter=sequence.adapter,
        )  # fmt: skip
        if self.tables.states is not None:
            self.tables.states.plan_row(step.keeps, row, sequence)
        plan.rows.insert(at, row)
        step.sequences.insert(at, sequence)
        step.epochs.insert(at, sequence.epoch)
        step.num_prefill_tokens += count
        sequence.num_computed = start + count
        sequence.num_pending += samples
        self.tables.register(sequence, start + count)

    def _start_slot(self, plan: StepPlan, sequence: Sequence) -> None:
        plan.starts.append(sequence.slot_start())
        sequence.starts_slot = False

    def _end_prefills(self, step: Step) -> None:
        """Let sequences that sample decode from the next step on, and what waits for their prompt start."""
        for index in range(step.num_decode_rows, len(step.sequences)):
            if step.plan.rows[index].samples:
                sequence = step.sequences[index]
                sequence.is_prefilling = False
                self._release_followers(sequence)

    def _release_followers(self, leader: Sequence) -> None:
        for follower in leader.followers:
            if follower.state is SequenceState.HELD:
                follower.state = SequenceState.WAITING
                self._waiting.push(follower)
        leader.followers = []

    def _may_admit(self, step: Step) -> bool:
        """Tell whether enough wait, or long enough, to make those that decode wait for a prompt."""
        is_soon = self._num_held_back < self._max_waiting_steps
        if self._num_waiting < self._served_ratio * step.num_decode_rows and self._num_waiting and is_soon:
            self._num_held_back += 1
            return False
        self._num_held_back = 0
        return True

    def _admit(self, step: Step, budget: int) -> None:
        """Start waiting sequences, strictly in turn, while tokens, slots and blocks last.

        What is left of the tokens starts nobody if it is less than a block: a sequence that started without
        computing would have looked into the cache too early.
        """
        while self._slots and (budget >= self.block_size or (budget > 0 and not step.num_prefill_tokens)):
            sequence = self._waiting.first(self._num_running_of)
            if sequence is not None and not self._adapters.may_run(sequence):
                self._waiting.pop(sequence)
                self._adapters.hold(sequence)
                continue
            if sequence is not None and not self._fits(step, sequence, budget):
                return
            # Each that runs needs its next block soon: without a reserve one of them would be preempted.
            if sequence is None or not self.tables.start(sequence, reserve=len(self._running)):
                return
            self._waiting.pop(sequence)
            sequence.state = SequenceState.RUNNING
            sequence.slot = self._slots.pop()
            insort(self._running, sequence, key=_urgency)
            self._adapters.enter(sequence)
            self._num_running_of[sequence.tenant] += 1
            self._num_waiting -= 1
            budget -= self._plan_chunk(step, sequence, budget)

    def _fits(self, step: Step, sequence: Sequence, budget: int) -> bool:
        """Tell whether some of a sequence can be computed: where prompts come whole, all of it."""
        is_small = sequence.prompt_len <= budget or not step.num_prefill_tokens
        return is_small or not self.takes_whole_prompts

    def apply(self, step: Step, result: StepResult) -> list[tuple[int, Sequence]]:
        """Take over a step's result; return (row, sequence) of the rows that still matter.

        A drawn token is appended unless its logits were not finite; ending sequences is the caller's part.
        """
        return take_over(step, result, self.tables)

    def rollback(self, step: Step) -> None:
        """Undo a step that failed, or came after one that did; of several the newest first."""
        live = dict(step.live())
        lost: dict[int, int] = {}  # blocks, and from which position on
        for index, row in enumerate(step.plan.rows):
            begin = row.start
            sequence = live.get(index)
            if sequence is not None:
                # What the runner keeps of a prompt from chunk to chunk begins again at the beginning.
                begin = 0 if sequence.needs_all else sequence.num_computed - row.num_tokens
                sequence.num_computed = begin
                sequence.num_ahead -= row.num_drafts
                sequence.num_registered = min(sequence.num_registered, begin // self.block_size)
                sequence.num_pending -= row.samples
                sequence.is_prefilling = True
                sequence.starts_slot = True
            for at in range(begin // self.block_size, self.tables.blocks_for(row.end)):
                for table in row.block_tables:
                    lost[table[at]] = max(begin, at * self.block_size)
        self.pool.forget(lost)
        void = set() if self.tables.states is None else self.tables.states.undo(step.keeps)
        for sequence in self.running:
            if self.tables.reads(sequence, lost) or sequence.states.resumes in void:
                self._suspend(sequence)

    def retry(self, failed: Step, rows: range, max_tokens: int | None = None) -> Step | None:
        """Plan some rows of a step again after `rollback`; None if none of them matters any more.

        With `max_tokens` each computes at most so many tokens; later steps compute the others, as they do
        where a prompt whose scores begin again is more than a step holds.
        """
        step = Step(self._next_step)
        room = self._max_step_tokens
        for index, sequence in failed.live():
            if index in rows:
                row = failed.plan.rows[index]
                # A row that decodes may begin later than it was planned to.
                whole_end = end = max(row.start + row.num_tokens, sequence.num_computed + 1)
                if max_tokens is not None:
                    end = min(end, sequence.num_computed + max_tokens)
                end = min(end, sequence.num_computed + room)
                end = self._end_of_kind(sequence, end)
                end = self.cuts.end(sequence, sequence.num_computed, end)
                count = end - sequence.num_computed
                if count == 0:
                    continue
                room -= count
                self._add_row(step, sequence, count, samples=row.samples and end == whole_end)
        if not step.sequences:
            return None
        self._end_prefills(step)
        self._next_step += 1
        return step

    def probe(self) -> Step | None:
        """Plan a step of one token that is nobody's, to see whether steps can succeed; None without room.

        `end_probe` gives back what it holds.
        """
        if not self._slots or self.pool.num_free < self.tables.num_groups:
            return None
        step = Step(self._next_step)
        self._next_step += 1
        slot, blocks = self._slots.pop(), [[self.pool.allocate()] for _ in range(self.tables.num_groups)]
        step.plan.starts.append(SlotStart(slot, SamplingParams(temperature=0.0), 0, (0,)))
        step.plan.rows.append(StepRow(slot, (0,), 0, blocks, True))
        step.num_prefill_tokens = 1
        return step

    def end_probe(self, step: Step) -> None:
        """Give back what a probe held."""
        [row] = step.plan.rows
        self._slots.append(row.slot)
        for table in row.block_tables:
            self.pool.release(list(table))
