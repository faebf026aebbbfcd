"""Runs steps on a CUDA device: plan -> one buffer up -> graphs or launches -> one buffer down.

One thread launches steps in the order submitted; it waits for the device only for grammars, drafts, images,
prompt log-probabilities and poolings over all tokens. Another thread waits for each step's end and delivers
its tokens. Most steps of streams are prepared on the event loop, and need no Python in either thread
(`cuda_prepared.py`). Sampled tokens stay on the device, where the next step reads them, so that it can be
launched before the host knows them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.family import Model
from tgi_asgi.ops import DeviceQueue, DeviceRows
from tgi_asgi.ops.cuda_adapters import CudaAdapter, CudaAdapterLayout
from tgi_asgi.ops.cuda_sample_state import token_logprobs
from tgi_asgi.runner.cuda_buffers import StepBuffers, StepShape
from tgi_asgi.runner.cuda_device import Command, Device, Event
from tgi_asgi.runner.cuda_drafts import CudaDrafts, LaidStep
from tgi_asgi.runner.cuda_follower import AdapterCopy, Cache, Copies, Logits, Message, StepImages
from tgi_asgi.runner.cuda_images import CudaImages
from tgi_asgi.runner.cuda_layout import StepLayout, graph_layout, plain_layout
from tgi_asgi.runner.cuda_pooling import CudaPooler, StepVectors
from tgi_asgi.runner.cuda_prepared import PreparedSteps, StepMemory
from tgi_asgi.runner.cuda_sampler import CudaSampler, FetchedSamples
from tgi_asgi.runner.cuda_shards import CudaShards
from tgi_asgi.runner.cuda_steps import CudaOutputs, CudaSteps, CudaStepSpec
from tgi_asgi.runner.handoff import Handoff, PendingStep
from tgi_asgi.runner.inputs import PlanError, StepInputs
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.plan import MAX_IN_FLIGHT, RunnerTraits, Sampled, StepPlan, StepResult, StepRow
from tgi_asgi.runner.prompt_logprobs import PromptScorer
from tgi_asgi.runner.sampling import unpack
from tgi_asgi.runner.step_guard import StepGuard
from tgi_asgi.types import PoolingKind

if TYPE_CHECKING:  # imports transformers
    from tgi_asgi.models.generic.vision.native import NativeImages

logger = logging.getLogger(__name__)
_DEFAULT_OUTPUTS = CudaOutputs()


@dataclass(slots=True)
class _Launched:
    """A step in flight on the device."""

    result: StepResult  # complete except for the sampled tokens and the vectors
    event: Event  # once it has passed, samples and vectors can be collected
    vectors: StepVectors | None = None  # of rows that pool
    samples: FetchedSamples | None = None
    sampling: Sequence[int] = ()  # plan rows that sample
    sample_rows: Sequence[int] = ()  # for each of these, its row in `samples`
    slots: Sequence[int] = ()  # their slots
    laid: LaidStep | None = None  # if the runner makes drafts; rows above are those of its plan


class CudaRunner:
    """A `Runner` that computes on a CUDA device.

        runner = CudaRunner(model, CudaDevice(), choose, spec)
        result = await runner.submit(StepPlan(0, rows))

    The model's weights are plain tensors. The model is not kept once it is recorded.

    Args:
        choose: Returns the cache size for the bytes that are free after everything else is allocated and a
            step of the largest size has run.
        spec: Sizes and modes of the steps, and how to draft tokens, for a model that generates.
        shards: The other shards, if the model is split.
        adapters: The adapters that rows may have, with their slots on the device.
        image_cache: Bytes of encoded images to keep, for a model that accepts images.

    Attributes:
        traits: As in `Runner.traits`.
        cache: The size that `choose` has returned.
        max_context: Maximum number of tokens in a sequence.
    """

    def __init__(
        self,
        model: Model,
        device: Device,
        choose: Callable[[int], KvSize],
        spec: CudaStepSpec,
        outputs: CudaOutputs = _DEFAULT_OUTPUTS,
        *,
        shards: CudaShards | None = None,
        adapters: CudaAdapterLayout | None = None,
        image_cache: int = 0,
    ) -> None:
        limits, max_batch_size, num_spares = spec.step_limits, spec.limits.max_sequences, 0
        self.max_context = limits.max_context
        self.num_threads = 0
        self.progress: int | None = None
        self._device, self._shards, self._adapters = device, shards, adapters
        self._guard = StepGuard(device)
        self._choose = choose
        self._drafts: CudaDrafts | None = None
        if spec.speculation is not None:
            self._drafts = CudaDrafts(spec.speculation, num_slots=max_batch_size, max_rows=limits.max_rows)
            num_spares = self._drafts.num_spares
        self._sampler = CudaSampler(
            max_batch_size, model.config.vocab_size, outputs.max_top, device,
            num_spares=num_spares, max_rows=limits.max_rows,
        )  # fmt: skip
        self._has_logits = outputs.has_logits
        self._generates = outputs.has_logits and model.config.generates
        self._steps = CudaSteps(
            model, device, spec, records=self._sampler.state.records,
            sample=self._sample if self._generates else None,
            shard=None if shards is None else shards.join(device.device), adapters=adapters,
            has_logits=outputs.has_logits,
        )  # fmt: skip
        self._images: CudaImages | None = None
        if model.images is not None:
            self._images = CudaImages(
                cast("NativeImages", model.images), self._steps.program, image_cache=image_cache,
                num_slots=max_batch_size + num_spares, share=None if shards is None else self._share_images,
            )  # fmt: skip
        self._vectors = CudaPooler(self._steps.program, device, outputs.dense)
        self._scorer = PromptScorer(self._logits_of, token_logprobs, torch.clone, max_rows=limits.max_rows)
        # A step in flight has one of these to itself: the one that had it before has passed its event.
        self._memories = [
            StepMemory(inputs, inputs.numpy(), self._sampler.staging(), device.event())
            for inputs in (device.pinned(spec.largest.num_bytes) for _ in range(MAX_IN_FLIGHT))
        ]
        self._queue = DeviceQueue()
        self._handoff = Handoff(self._queue)
        self._launched: dict[int, _Launched | Exception] = {}  # by number, those that were not prepared
        self._launcher = threading.Thread(target=self._launch_all, name="tgi-launcher", daemon=True)
        self._waiter = threading.Thread(target=self._wait_for_all, name="tgi-waiter", daemon=True)
        self._ready: Future[KvSize] = Future()
        if shards is not None:
            shards.others.watch(self._fail_to_prepare)
        self._launcher.start()
        self.cache = self._ready.result()
        self.traits = RunnerTraits(
            num_blocks=self.cache.num_blocks,
            block_size=spec.kv.block_size,
            max_batch_size=max_batch_size,
            max_step_tokens=limits.max_tokens,
            min_chunk=self._guard.min_chunk,
            drafts=None if self._drafts is None else self._drafts.limits,
            vision=None if self._images is None else self._images.bidirectional,
            windows=(None,),  # one block table serves all layers: blocks outside windows are not freed
        )
        self._inputs = StepInputs.of(
            self.traits, model.config.vocab_size, limits.max_context, num_spares=num_spares
        )
        self._rows, prepared_rows = (
            DeviceRows(StepRow, self._inputs.limits, spec.modes.is_batch_invariant) for _ in range(2)
        )
        self._prepared_steps: PreparedSteps | None = None
        if self._generates and shards is None and self._drafts is None:
            self._prepared_steps = PreparedSteps(
                self._queue, self._steps, self._sampler, device, self._memories, prepared_rows, self._images
            )
        self._waiter.start()

    @property
    def prompts_by(self) -> str | None:
        """The library that computes the attention of prompts; None: only the native kernel does."""
        return self._steps.prompts_by

    @property
    def num_float8_products(self) -> int:
        """Number of matrices that steps of many tokens are multiplied with in FP8."""
        return self._steps.program.num_float8_products

    def _prepare(self) -> KvSize:
        """Choose the cache's size, make it, and capture the graphs; the launcher's first task."""
        self._device.enter_thread()
        self._steps.profile()
        free = self._device.free_bytes()
        size = self._choose(free if self._shards is None else self._shards.minimum(free))
        with self._together(Cache(size.num_blocks)):
            self._steps.make_cache(size.num_blocks)
            self._steps.capture()
        if self._drafts is not None:
            self._sampler.capture_drafts()
        return size

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Queue a step, from the event loop; the future fails if this step raises.

        Raises:
            RuntimeError: if the runner is closed or two steps are already in flight.
        """
        prepared = self._prepared_steps
        if prepared is None or self._guard.has_lost:
            return self._handoff.submit(plan)
        future = self._handoff.submit(plan, prepared.push)
        prepared.start(plan)
        return future

    def close(self) -> None:
        """Finish the steps in flight and end the threads. Idempotent."""
        self._handoff.close()
        self._launcher.join()
        self._waiter.join()
        self._handoff.end()
        self._steps.release()
        if self._shards is not None:
            self._shards.close()

    def _together(self, message: Message, data: Tensor | None = None) -> AbstractContextManager[None]:
        """Make the other devices, if any, repeat the calls of the body."""
        return nullcontext() if self._shards is None else self._shards.together(message, data)

    def _fail_to_prepare(self, reason: str) -> None:
        """Fail the start; otherwise the launcher could wait forever for a shard that has ended."""
        with suppress(InvalidStateError):  # it has already ended
            self._ready.set_exception(ModelLoadError(reason))

    # The launcher's thread.

    def _launch_all(self) -> None:
        """Prepare the device, then launch steps until the handoff is closed."""
        try:
            with suppress(InvalidStateError):
                self._ready.set_result(self._prepare())
        except BaseException as error:
            self._steps.release()
            with suppress(InvalidStateError):
                self._ready.set_exception(error)
            return
        while (taken := self._queue.take()) is not None:
            number, refusal = taken
            step = self._handoff.step(number)
            try:
                if refusal is not None:
                    raise RuntimeError(refusal)
                outcome: _Launched | Exception = self._launch(step)
                if self._images is not None and isinstance(outcome, _Launched):
                    self._images.advance(step.plan, outcome.result)
            except BaseException as error:  # as in StepHandoff.serve
                logger.exception("step %s failed", step.plan.step_id)
                outcome = self._guard.translated(error)
                self._rows.forget()  # sequences start again, but not the spare slots of drafts
            self._launched[number] = outcome
            self._queue.launched(number)
            del step, outcome
        self._queue.close_launched()

    def _launch(self, step: PendingStep) -> _Launched:
        """Launch a step. A step that raises has sampled nothing: its rows can be run again."""
        plan, memory = step.plan, self._memories[step.place]
        self._guard.check()
        if plan.starts or plan.copies:
            self._inputs.check(plan)
        if plan.copies:
            with self._together(Copies(plan.copies)):
                self._steps.copy_blocks(plan.copies)
        waits = self._start_slots(plan)
        if not plan.rows:
            self._start_grammars(plan, waits)
            self._device.submit([memory.event])
            laid = None if self._drafts is None else LaidStep(plan, plan.starts)
            return _Launched(StepResult(plan.step_id, []), memory.event, laid=laid)
        shape, layout, laid = self._fill(plan, waits, memory)
        rows = plan.rows if laid is None else laid.plan.rows
        drafted, images = None if laid is None else laid.drafted, None
        if self._images is not None:
            images = self._images.place(rows, drafted, layout, memory.array)
        result = StepResult(plan.step_id, [None] * len(rows))
        graphs, read, vectors = self._steps.graphs_of(shape, images), self._rows, None
        commands: list[Command] = [self._steps.upload(shape, memory.inputs), graphs.forward]
        # Usually all is submitted at once. Here the host needs the forward pass first, or works meanwhile.
        if waits or read.has_vectors or read.is_scored or self._shards is not None:
            with self._together(shape, memory.inputs[: shape.num_bytes]):
                self._device.submit(commands)
            commands = []
            vectors = self._vectors.take(rows, layout)
            self._score(rows, layout, result)
        if laid is None:
            self._start_grammars(plan, waits)
        sampling, samples = self._sampling(result), None
        slots = read.sampling_slots if sampling else []
        if sampling:
            is_listing = self._sampler.lists(slots)
            samples = self._sampler.samples(shape.num_rows, memory.sampling, is_listing=is_listing)
            if laid is None or laid.masked is None:
                commands += [*self._sampler.masks(slots, memory.sampling), graphs.sample, samples.copy]
            else:
                commands += [*laid.before, graphs.sample, *laid.after, samples.copy]
        self._device.submit([*commands, memory.event])
        launched = _Launched(
            result, memory.event, vectors, samples, sampling, layout.logits_rows(sampling), slots
        )
        if self._drafts is not None:
            launched.laid = laid = laid or LaidStep(plan, plan.starts)
            self._drafts.are_in_flight = laid.masked is not None
        return launched

    def _start_slots(self, plan: StepPlan) -> bool:
        """Start a plan's slots, except for their grammars; return whether these wait for earlier steps.

        The tokens that earlier steps sample advance grammars: those of this step's rows, and those that a
        start replaces or sets.
        """
        waits = self._sampler.constrains(start.slot for start in plan.starts)
        for start in plan.starts:
            self._sampler.start(start)
            self._scorer.forget(start.slot)
            self._vectors.forget(start.slot)
            self._rows.start(start.slot, len(start.prompt_ids))
            if self._images is not None:
                self._images.start(start)
        waits = waits or self._sampler.constrains(start.slot for start in plan.starts)
        return waits or self._sampler.constrains(row.slot for row in plan.rows if row.samples)

    def _lay_out(self, plan: StepPlan, waits: bool, memory: StepMemory) -> LaidStep:
        """Choose the drafts of a step whose rows have a `stop`, and replace these rows.

        The grammars of slots that start are set, since drafts must match them.

        Raises:
            PlanError: if the runner makes no drafts, a slot is outside of its row, or there is no room.
        """
        drafts = self._drafts
        if drafts is None:
            raise PlanError("a row may have drafts, which this runner does not make")
        self._start_grammars(plan, waits or drafts.must_wait(plan))
        return drafts.lay_out(plan, self._sampler, memory.sampling, is_idle=self._queue.is_idle)

    def _share_images(self, message: StepImages, rows: Tensor) -> None:
        assert self._shards is not None
        with self._together(message):
            if len(message.tokens):
                self._shards.broadcast(rows)

    def _sampling(self, result: StepResult) -> list[int]:
        """Return the rows that sample; if the model generates nothing, answer the engine's probe at once."""
        sampling = self._rows.sampling
        if self._generates:
            return sampling
        for index in sampling:
            result.sampled[index] = Sampled(0)
        return []

    def _start_grammars(self, plan: StepPlan, waits: bool) -> None:
        """Set slots' grammars; `waits`: after earlier steps, whose sampled tokens advance the grammars."""
        if waits:
            self._queue.wait_until_idle()
        for start in plan.starts:
            self._sampler.start_grammar(start)

    def _fill(
        self, plan: StepPlan, waits: bool, memory: StepMemory
    ) -> tuple[StepShape, StepLayout, LaidStep | None]:
        """Write a step's inputs; return their shape, their layout, and what replaces a plan with stops.

        Args:
            waits: As for `_start_grammars`.

        Raises:
            PlanError: if a row names something that does not exist, or a row that decodes comes after a chunk
                of a prompt; or as `_lay_out`.
        """
        rows, laid, masked = plan.rows, None, None
        self._rows.read(rows)
        if self._rows.has_stops:
            laid = self._lay_out(plan, waits, memory)
            rows, masked = laid.plan.rows, laid.masked
            self._rows.read(rows)
        adapters = self._place_adapters(rows) if self._rows.has_adapters else []
        layout = self._layout(rows)
        shape = layout.shape
        if masked is None:
            masked = self._sampler.masked(self._rows.sampling_slots)
        self._rows.write(memory.array, shape.sections.firsts, shape.sizes, layout.needing, masked, adapters)
        return shape, layout, laid

    def _layout(self, rows: list[StepRow]) -> StepLayout:
        """Lay a step out for a graph that fits it, unless its prompts are scored: these need more logits.

        Raises:
            PlanError: if a row's vector is of logits, which steps do not compute.
        """
        read = self._rows
        needing = read.sampling
        if read.has_vectors:
            of_logits = [
                index
                for index, row in enumerate(rows)
                if row.samples and row.pooling is not None and row.pooling.kind is PoolingKind.LOGITS
            ]
            if of_logits and not self._has_logits:
                raise PlanError("a vector of logits, from a runner without logits")
            needing = sorted((*needing, *of_logits))
        is_plain = read.is_scored or (self._images is not None and self._images.are_in(rows))
        shape = None if is_plain else self._steps.padded(read.num_decodes, read.prompt_lens)
        if shape is None:
            return plain_layout(read, needing if self._has_logits else [])
        return graph_layout(shape, read)

    def _place_adapters(self, rows: list[StepRow]) -> list[int]:
        """Bring the rows' adapters to the device; return the place of each row's, -1 for none."""
        places: dict[CudaAdapter | None, int] = dict.fromkeys((row.adapter for row in rows), -1)
        wanted = [adapter for adapter in places if adapter is not None]
        if self._adapters is None:
            raise PlanError("a row has an adapter, but the runner none")
        places.update(zip(wanted, self._adapters.place(wanted, self._copy_adapter), strict=True))
        return [places[row.adapter] for row in rows]

    def _copy_adapter(self, slot: int, adapter: CudaAdapter) -> None:
        assert self._adapters is not None
        with self._together(AdapterCopy(slot, adapter.number)):
            self._adapters.copy(slot, adapter)

    def _score(self, rows: Sequence[StepRow], layout: StepLayout, result: StepResult) -> None:
        """Score the prompts of the rows that request it; then recompute the logits to sample from."""
        if all(row.prompt_logprobs is None for row in rows):
            return
        for index, row in enumerate(rows):
            if row.prompt_logprobs is not None:
                first = layout.end(index) - row.num_tokens
                result.prompt_logprobs[index] = self._scorer.score(first, row)
        with self._together(Logits(None)):
            self._steps.head()

    def _logits_of(self, rows: Sequence[int]) -> Tensor:
        """Return the logits of tokens of the last step, on the device; valid until the next call."""
        with self._together(Logits(list(rows))):
            self._steps.head(rows)
        return self._steps.program.logits[: len(rows)]

    def _sample(self, buffers: StepBuffers) -> None:
        self._sampler.sample(self._steps.program.logits, buffers)

    # The waiter's thread.

    def _wait_for_all(self) -> None:
        """Wait for launched steps in order, and deliver their results."""
        while (ended := self._queue.next()) is not None:
            number, failure = ended
            step, launched = self._handoff.step(number), self._launched.pop(number, None)
            outcome = launched if isinstance(launched, Exception) else self._finish(step, launched, failure)
            self._handoff.finish(step, outcome)
            del ended, step, launched, outcome

    def _finish(
        self, step: PendingStep, launched: _Launched | None, failure: str | None
    ) -> StepResult | Exception:
        """Return the result of a step, or why it failed; prepared steps come here only if they failed."""
        try:
            if launched is None:
                raise RuntimeError(failure)
            launched.event.synchronize()
            if self._shards is not None:
                self._shards.check()
            result, slots, laid = launched.result, launched.slots, launched.laid
            sampled: Sequence[Sampled] = ()
            if launched.vectors is not None:
                result.pooled = launched.vectors.collect()
            if launched.samples is not None:
                rows: list[Sampled] = unpack(launched.samples.collect())
                sampled = [rows[index] for index in launched.sample_rows]
            if laid is not None and laid.drafted is not None:
                result, slots, sampled = laid.drafted.collect(result, launched.sampling, sampled)
            else:
                for index, each in zip(launched.sampling, sampled, strict=True):
                    result.sampled[index] = each
            self._sampler.accept(slots, sampled)
            if self._drafts is not None and laid is not None:
                self._drafts.observe(laid.starts, slots, sampled)
        except BaseException as error:
            logger.exception("step %s failed", step.plan.step_id)
            return self._guard.translated(error)
        return result
