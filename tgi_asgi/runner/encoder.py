"""Runs steps of embedding models: whole prompts in, pooled vectors out, no state kept.

The counterpart of `HostRunner` for encoder models. It reports blocks only for the scheduler's accounting;
they have no memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tgi_asgi import ops
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.generic.encoder_program import Prompt
from tgi_asgi.models.pooling import Dense
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.runner.handoff import StepHandoff
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.plan import RunnerTraits, Sampled, StepPlan, StepResult, StepRow
from tgi_asgi.runner.pooling import pool
from tgi_asgi.types import PoolingKind

if TYPE_CHECKING:
    from tgi_asgi.runner.step_guard import StepGuard


class EncoderRunner:
    """A `Runner` for prompts that are computed whole.

        runner = EncoderRunner(model, kv_size, limits)
        result = await runner.submit(StepPlan(0, rows))

    Args:
        limits: Sizes of the steps; `max_tokens` is raised to `max_context`, so that the longest prompt fits
            one step.
        dense: Dense layers applied to pooled vectors.
        device: Guard of the GPU that computes, if it is not the CPU.

    Attributes:
        traits: As in `Runner.traits`.
        max_context: Maximum number of tokens in a prompt.
    """

    def __init__(
        self,
        model: EncoderModel,
        kv_size: KvSize,
        limits: ops.StepLimits,
        *,
        dense: Sequence[Dense] = (),
        device: StepGuard | None = None,
    ) -> None:
        self._device = device
        self.traits = RunnerTraits(
            num_blocks=kv_size.num_blocks,
            block_size=kv_size.block_size,
            max_batch_size=limits.max_sequences,
            max_step_tokens=max(limits.max_tokens, limits.max_context),
            num_kept_states=0,
            takes_whole_prompts=True,
        )
        self.max_context = limits.max_context
        self._vocab_size = model.config.vocab_size
        self._dense = dense
        self._program = model.program(
            max_tokens=self.traits.max_step_tokens, max_rows=limits.max_sequences,
            max_context=limits.max_context,
        )  # fmt: skip
        self._handoff = StepHandoff()
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
        """Queue a step, as `HostRunner.submit` does."""
        return self._handoff.submit(plan)

    def close(self) -> None:
        """Finish the steps in flight and end the thread. Idempotent; call on the event loop if it runs."""
        self._handoff.close()
        self._thread.join()
        self._handoff.end()

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step in the calling thread; no other thread may call this.

        Raises:
            PlanError: if the plan is inconsistent or out of bounds.
            MemoryError, DeviceLost: as in `StepGuard.computing`.
        """
        with nullcontext() if self._device is None else self._device.computing():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        result = StepResult(plan.step_id, [None] * len(plan.rows))
        if not plan.rows:
            return result
        prompts = [self._prompt(row) for row in plan.rows]
        num_tokens, traits = sum(row.num_tokens for row in plan.rows), self.traits
        if len(prompts) > traits.max_batch_size or num_tokens > traits.max_step_tokens:
            raise ops.PlanError("more prompts or tokens than a step has")
        if self._device is None:
            ops.wake_threads()
        for index, (row, found) in enumerate(zip(plan.rows, self._program.run(prompts), strict=True)):
            if row.pooling is None:  # only the engine's probe requests a token
                result.sampled[index] = Sampled(0)
            else:
                result.pooled[index] = self._vector(row, *found)
        return result

    def _vector(self, row: StepRow, states: Floats, logits: Floats | None) -> Floats:
        assert row.pooling is not None
        if row.pooling.kind is not PoolingKind.LOGITS:
            return pool(row.pooling.kind, states, self._dense)
        if logits is None:
            raise ops.PlanError("the model has no labels")
        return logits[list(row.pooling.token_ids)]  # a copy

    def _prompt(self, row: StepRow) -> Prompt:
        """Return a row's prompt after checking it."""
        ids = row.token_ids
        if not ids or row.start or not row.samples or len(ids) > self.max_context:
            raise ops.PlanError(f"a prompt must come whole, and have 1..{self.max_context} tokens")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise ops.PlanError(f"a token id must be in [0, {self._vocab_size})")
        if row.second_start is not None and not 0 <= row.second_start <= len(ids):
            raise ops.PlanError(f"a second text begins at {row.second_start} of {len(ids)} tokens")
        return Prompt(ids, row.second_start)
