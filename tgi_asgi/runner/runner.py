"""Runs steps in a thread of the host: plan -> buffers -> model -> sampled tokens.

The engine submits from its event loop and gets a future; steps run in FIFO order. Everything that one step
leaves for the next (KV blocks, sampling state, the last sampled token) stays here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.models.family import Model
from tgi_asgi.models.pooling import Dense
from tgi_asgi.runner.drafts import SlotDrafts, max_drafts_per_row, with_drafts
from tgi_asgi.runner.handoff import PendingStep, StepHandoff
from tgi_asgi.runner.inputs import StepInputs
from tgi_asgi.runner.kv import CacheSizes, groups_of, one_group
from tgi_asgi.runner.masks import SlotMasks
from tgi_asgi.runner.plan import RunnerTraits, Sampled, StepPlan, StepResult
from tgi_asgi.runner.pooling import Pooler
from tgi_asgi.runner.programs import make_pool, make_program
from tgi_asgi.runner.prompt_logprobs import PromptScorer
from tgi_asgi.runner.sampling import StepSamples, start_slot
from tgi_asgi.runner.shards import Shards
from tgi_asgi.settings.speculation import Speculation
from tgi_asgi.types import PoolingKind

if TYPE_CHECKING:
    from tgi_asgi.models.generic.model import GenericModel
    from tgi_asgi.runner.step_guard import StepGuard


class HostRunner:
    """A `Runner` that lays out and samples on the host, and computes on the CPU's team or as a GPU's module.

        runner = HostRunner(model, CacheSizes(kv_size), limits)
        result = await runner.submit(StepPlan(0, rows))

    Args:
        sizes: Sizes of what is kept between steps.
        limits: Sizes of the steps; drafts get rows of logits besides.
        dense: Dense layers applied to pooled vectors.
        has_prompt_arithmetic: Whether the weights are packed so that prompts use another arithmetic.
        speculation: How to draft tokens; None: each row samples one.
        adapters: Layout of the adapters that rows may have.
        shards: The other shards, if the model is split.
        device: Guard of the GPU that computes, if it is not the CPU.

    Attributes:
        traits: As in `Runner.traits`.
        max_context: Maximum number of tokens in a sequence.
    """

    def __init__(
        self,
        model: Model | GenericModel,
        sizes: CacheSizes,
        limits: ops.StepLimits,
        *,
        dense: Sequence[Dense] = (),
        has_prompt_arithmetic: bool = False,
        speculation: Speculation | None = None,
        adapters: ops.AdapterLayout | None = None,
        shards: Shards | None = None,
        device: StepGuard | None = None,
    ) -> None:
        config, kv_size, max_batch_size = model.config, sizes.kv, limits.max_sequences
        self.max_context = limits.max_context
        self._device = device
        groups = groups_of(config, kv_size.dtype) if device is None else one_group(config, kv_size)
        self._kv_pool = make_pool(model, kv_size, groups, is_on_gpu=device is not None)
        self._drafts = None if speculation is None else SlotDrafts(speculation, max_batch_size)
        self._program = make_program(
            model,
            [] if self._kv_pool is None else self._kv_pool.layers,
            with_drafts(limits, speculation),
            image_cache=sizes.image_bytes,
            num_drafts=max_drafts_per_row(speculation),
            num_kept_states=sizes.num_kept_states,
            adapters=adapters,
            shard=None if shards is None else shards.shard,
        )
        self._shards = shards
        self._copy_blocks = None if self._kv_pool is None else self._kv_pool.copy
        if shards is not None and self._program.native is not None:
            self._copy_blocks = self._program.native.copy_blocks
        self._begun = None if config.encoder_decoder is None else config.encoder_decoder.starts
        self.traits = RunnerTraits(
            num_blocks=kv_size.num_blocks,
            block_size=kv_size.block_size,
            max_batch_size=max_batch_size,
            max_step_tokens=limits.max_tokens,
            num_eager_blocks=None if device is not None else kv_size.num_eager_blocks,
            min_chunk=0 if device is None else device.min_chunk,
            num_kept_states=sizes.num_kept_states if config.has_states else None,
            vision=self._program.bidirectional,
            has_prompt_arithmetic=has_prompt_arithmetic,
            drafts=None if self._drafts is None else self._drafts.limits,
            windows=groups.windows,
        )
        self._inputs = StepInputs.of(self.traits, config.vocab_size, limits.max_context)
        self._sampling = ops.SampleState(max_batch_size, config.vocab_size)
        self._masks = SlotMasks(config.vocab_size)
        self._scorer = PromptScorer(
            self._program.run_head, ops.token_logprobs, np.copy, max_rows=max_batch_size
        )
        self._generates = config.generates
        self._vectors = Pooler(self._program.hidden, dense)
        # Slots whose sequences have a grammar, or images, as of the submitted plans.
        self._constrained: set[int] = set()
        self._seeing: set[int] = set()
        self._was_encoding = False  # whether the last plan had images to encode
        self._handoff = StepHandoff(self._program.native, self._inputs.limits)
        if self._drafts is not None:
            self._handoff.steps.set_drafter(self._drafts.native)
        self._thread = self._handoff.start(self.run)

    @property
    def num_threads(self) -> int:
        """The number of threads that computed last; 0 on a GPU."""
        return ops.num_running_threads() if self._device is None else 0

    @property
    def progress(self) -> int | None:
        """The number of times that the threads have met; None on a GPU."""
        return ops.team_progress() if self._device is None else None

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Queue a step, from the event loop; the future fails if this step raises.

        Raises:
            RuntimeError: if the runner is closed or two steps are already in flight.
        """
        future = self._handoff.submit(plan, self._push_rows)
        self._was_encoding = bool(plan.images)
        started = {start.slot for start in plan.starts}
        if started:
            self._constrained -= started
            self._constrained |= {start.slot for start in plan.starts if start.grammar is not None}
            self._seeing -= started
            self._seeing |= {start.slot for start in plan.starts if start.images}
        return future

    def close(self) -> None:
        """Finish the steps in flight and end the thread. Idempotent; call on the event loop if it runs."""
        if self._kv_pool is not None:
            self._kv_pool.stop_supply()
        self._handoff.close()
        self._thread.join()
        if self._shards is not None:
            self._shards.close()
        self._handoff.end()

    def _push_rows(self, step: PendingStep) -> bool:
        """Queue a step for native code if it needs no Python."""
        if not self._has_only_rows(step.plan):
            return False
        self._handoff.steps.push_rows(step.number, step.plan.rows, *step.plan.cost)
        return True

    def _has_only_rows(self, plan: StepPlan) -> bool:
        """Return whether a step needs no Python; true for most steps of decoding streams."""
        if self._program.native is None or plan.starts or plan.copies or not plan.rows:
            return False
        if plan.images or self._is_encoding():
            return False
        constrained, seeing = self._constrained, self._seeing
        return not any(
            row.prompt_logprobs is not None
            or row.pooling is not None
            or row.slot in constrained
            or (row.token_ids is not None and row.slot in seeing)
            for row in plan.rows
        )

    def _is_encoding(self) -> bool:
        """Return whether an image is being encoded, or may be by a step in flight.

        Then each step must run Python, which also frees encodings that no request needs any more.
        """
        return self._was_encoding or self._program.is_encoding

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step in the calling thread; no other thread may call this (tests, benchmarks).

        A step that raises has sampled nothing: running its rows again, with its starts, gives the same
        result.

        Raises:
            PlanError: if the plan is inconsistent or out of bounds.
            MemoryError, DeviceLost: as in `StepGuard.computing`.
        """
        self._inputs.check(plan)
        num_steps = self._program.num_steps
        try:
            with nullcontext() if self._device is None else self._device.computing():
                return self._run(plan)
        except BaseException:
            # A step already in flight after it then fails, too; otherwise it would overwrite the state that
            # this one began with.
            self._program.roll_back_to(num_steps)
            self._discard_later_states(plan)
            raise

    def _discard_later_states(self, plan: StepPlan) -> None:
        """Discard the states that the slots of a failed step have beyond the beginnings of its rows.

        They are left from an earlier step whose rows were void. A step already in flight would begin with
        them, and overwrite those with which the failed rows begin again.
        """
        for row, start in zip(plan.rows, self._starts(plan), strict=True):
            self._program.discard_states(row.slot, start)

    def _run(self, plan: StepPlan) -> StepResult:
        if plan.copies and self._copy_blocks is not None:
            self._copy_blocks(plan.copies)
        for start in plan.starts:
            start_slot(self._sampling, start, self._begun)
            self._masks.start(start)
            if self._drafts is not None:
                self._drafts.start(start)
            self._program.start(start.slot, start.prompt_ids, start.images)
            self._scorer.forget(start.slot)
            self._vectors.forget(start.slot)
        if plan.starts:
            self._handoff.steps.set_sampling(self._sampling.arrays)
        result = self._compute(plan) if plan.rows else StepResult(plan.step_id, [])
        result.is_encoded, result.image_s = self._program.advance(plan.images, plan.image_budget_s)
        return result

    def _compute(self, plan: StepPlan) -> StepResult:
        drafts, mask = self._choose_drafts(plan)
        if self._device is None:
            ops.wake_threads()
        batch = self._inputs.fill(
            plan.rows, self._sampling.last_ids, self._sampling.records["position"], drafts
        )
        result = StepResult(plan.step_id, [None] * len(plan.rows))
        samples = StepSamples.of(plan, batch)
        if not len(batch.row_slots):
            return result
        sampled = self._run_batch(plan, batch, samples, mask, result)
        if sampled is not None:
            slots, kept = samples.collect(sampled, result)
            self._masks.accept(slots, kept)
            if self._drafts is not None:
                self._drafts.append(slots, kept)
        return result

    def _choose_drafts(self, plan: StepPlan) -> tuple[list[list[int]], npt.NDArray[np.int32] | None]:
        """Choose each row's drafts, if any, and compute the mask of the tokens that may be sampled."""
        starts = self._starts(plan)
        sampling = [
            index
            for index, row in enumerate(plan.rows)
            if row.samples and row.pooling is None and starts[index] < row.end
        ]
        drafts: list[list[int]] = []
        if self._drafts is not None:
            drafts = self._drafts.choose(plan, starts, self._masks.certain)
        # Before the step, not in parallel: the team uses every core, and a thread computing masks would delay
        # a member and, at the next barrier, all others.
        mask = self._masks.compute(
            [plan.rows[index].slot for index in sampling],
            [drafts[index] for index in sampling] if drafts else (),
        )
        return drafts, mask

    def _run_batch(
        self,
        plan: StepPlan,
        batch: ops.FlatRows,
        samples: StepSamples,
        mask: npt.NDArray[np.int32] | None,
        result: StepResult,
    ) -> ops.SampleResult | None:
        """Run the model on a batch; add vectors and prompts' scores to `result`, and return the samples."""
        if (
            samples.rows
            and self._generates
            and all(row.prompt_logprobs is None and row.pooling is None for row in plan.rows)
        ):
            return self._program.run_and_sample(
                batch, samples.tokens, samples.slots, self._sampling, mask, samples.drafts
            )
        logits = self._program.run(batch, samples.tokens)
        firsts = dict(zip(batch.row_of_plan.tolist(), batch.query_start.tolist(), strict=False))
        has_overwritten = self._take_vectors(plan, firsts, result)
        if self._score(plan, firsts, result) or has_overwritten:
            logits = self._program.run_head(samples.tokens)  # both write where the step's logits were
        if not self._generates:  # only the engine's probe requests a token
            for row in samples.rows:
                result.sampled[row] = Sampled(0)
            return None
        return ops.sample(logits, self._sampling, samples.slots, mask=mask, drafts=samples.drafts)

    def _starts(self, plan: StepPlan) -> list[int]:
        """Return where each row begins; rows with a `stop` begin where their slots are."""
        positions = self._sampling.records["position"]
        return [row.start if row.stop is None else int(positions[row.slot]) - 1 for row in plan.rows]

    def _score(self, plan: StepPlan, firsts: Mapping[int, int], result: StepResult) -> bool:
        """Score the prompts of the rows that request it; return whether there were any."""
        for index, row in enumerate(plan.rows):
            if row.prompt_logprobs is not None:
                result.prompt_logprobs[index] = self._scorer.score(firsts[index], row)
        return bool(result.prompt_logprobs)

    def _take_vectors(self, plan: StepPlan, firsts: Mapping[int, int], result: StepResult) -> bool:
        """Take the vectors of the rows that request pooling; return whether logits were computed for one."""
        has_logits = False
        for index, row in enumerate(plan.rows):
            if row.pooling is None:
                continue
            vector = None
            if row.pooling.kind is not PoolingKind.LOGITS:
                vector = self._vectors.take(firsts[index], row)
            elif row.samples:
                logits = self._program.run_head([firsts[index] + row.num_tokens - 1])[0]
                vector, has_logits = logits[list(row.pooling.token_ids)], True  # a copy
            if vector is not None:
                result.pooled[index] = vector
        return has_logits
