"""Rows of known tokens: how much of a sequence a step computes, and what its row brings along.

Called by the scheduler, which decides whose turn it is; knows neither torch nor asyncio.
"""

from __future__ import annotations

import math

from tgi_asgi.engine.image_encoding import ChunkBoundaries
from tgi_asgi.engine.running_set import RunningSet
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.step import Step
from tgi_asgi.engine.tables import BlockTables
from tgi_asgi.runner.plan import RunnerTraits, StepRow


class PromptRows:
    """Adds rows of known tokens to steps: chunks of prompts, and what a preempted answer computes again.

    Attributes:
        reach: How many tokens the longest attention sees.
    """

    __slots__ = ("_block_size", "_chunk_boundaries", "_has_vision", "_running", "_tables", "_traits", "reach")

    def __init__(
        self,
        traits: RunnerTraits,
        tables: BlockTables,
        running: RunningSet,
        chunk_boundaries: ChunkBoundaries,
    ) -> None:
        self._traits, self._tables, self._running = traits, tables, running
        self._chunk_boundaries = chunk_boundaries
        self._block_size = traits.block_size
        self._has_vision = traits.vision is not None
        self.reach: float = traits.windows[0] or math.inf

    def plan(self, step: Step, sequence: Sequence, budget: int) -> int:
        """Add a row with as many of the sequence's known tokens as the budget allows; return how many.

        A chunk that does not finish them ends at a block boundary. A chunk of less than a block is left to
        the next step, unless this step has no other prompt tokens. The same holds for a prompt that may not
        be cut and exceeds the budget. Tokens without free blocks are left to the next step, too.
        """
        start = sequence.num_computed
        count = remaining = sequence.num_left
        limit = min(budget, self._cover(sequence, start + min(budget, count)) - start)
        if count > budget and self._traits.takes_whole_prompts:
            if step.num_prefill_tokens:
                return 0
        elif count > limit:
            aligned = limit - (start + limit) % self._block_size
            if aligned <= 0 and (step.num_prefill_tokens or limit <= 0):
                return 0
            count = aligned if aligned > 0 else limit
        count = self.end_of_kind(sequence, start + count) - start
        if self._has_vision:
            room = self._traits.max_step_tokens - step.num_decode_rows - step.num_prefill_tokens
            count, pending = self._chunk_boundaries.before_images(sequence, count, room)
            step.pending_images += pending
            # What may not be cut takes the last blocks, too: it cannot begin with fewer.
            if count == 0 or self._tables.cover(sequence, start + count) < start + count:
                return 0
        self.add(step, sequence, count, samples=count == remaining)
        return count

    def _cover(self, sequence: Sequence, end: int) -> int:
        """Allocate a prompt's blocks up to position `end`; return the position up to which it has them."""
        return self._tables.cover(sequence, end, spare=len(self._running) * self._tables.num_groups)

    def end_of_kind(self, sequence: Sequence, end: int) -> int:
        """Return `end`, or an earlier end so that a row of prompt tokens stops before the sampled ones."""
        if not self._traits.has_prompt_arithmetic or sequence.is_past_prompt:
            return end
        return min(end, sequence.prompt_len)

    def add(self, step: Step, sequence: Sequence, count: int, *, samples: bool) -> None:
        """Add a row of `count` known tokens, and the slot's start and the block to copy if they are due."""
        start = sequence.num_computed
        plan = step.plan
        if sequence.starts_slot:
            step.start_slot(sequence)
        for block, table in zip(sequence.copy_sources, sequence.tables, strict=False):  # 0, or 1 per table
            plan.copies.append((block, table[start // self._block_size]))
        wanted = sequence.request.prompt_logprobs if sequence.wants_prompt_logprobs else None
        tokens = sequence.token_ids[start : start + count]
        second_start = sequence.request.second_start
        is_generated = self._traits.has_prompt_arithmetic and sequence.is_past_prompt
        at = step.num_generated_rows if is_generated else len(plan.rows)
        step.num_generated_rows += is_generated
        row = StepRow(
            sequence.slot, tokens, start, sequence.tables,
            samples=samples, prompt_logprobs=wanted, pooling=sequence.pooling, second_start=second_start,
            is_generated=is_generated, adapter=sequence.adapter,
        )  # fmt: skip
        if self._tables.states is not None:
            self._tables.states.plan_row(step.keeps, row, sequence)
        step.insert(at, row, sequence)
        step.num_prefill_tokens += count
        step.num_pairs += count * (min(start, self.reach) + count / 2)
        sequence.num_computed = start + count
        sequence.num_pending += samples
        self._tables.register(sequence, start + count)
