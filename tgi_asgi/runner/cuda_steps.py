"""The device's half of steps: uploaded inputs, the program that computes them, and its graphs.

A `CudaRunner` has one `CudaSteps`. If the model is split, each shard has one, and all do the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tgi_asgi.models.family import Model, record
from tgi_asgi.models.pooling import Dense
from tgi_asgi.ops.cuda import CudaProgram
from tgi_asgi.ops.cuda_adapters import CudaAdapterLayout
from tgi_asgi.ops.cuda_attention import PromptAttention
from tgi_asgi.ops.cuda_batch import CudaImageRows
from tgi_asgi.ops.cuda_kv import CudaKvFormat, CudaKvLayer, copy_cuda_blocks, make_cuda_pools
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.ops.cuda_shards import CudaShard
from tgi_asgi.ops.step_limits import StepLimits
from tgi_asgi.runner.cuda_buffers import StepBuffers, StepShape
from tgi_asgi.runner.cuda_device import Copy, Device
from tgi_asgi.runner.drafts import draft_limits, num_spares
from tgi_asgi.settings.speculation import Speculation

# Decode-only batches are padded to one of these sizes; each size has graphs.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, *range(320, 1025, 64))
# Steps with a few short prompts: each number of decodes is combined with each number of prompt tokens. A GPU
# computes the padding while it reads the weights; without a graph it would wait for about 400 launches.
MIXED_DECODES = (0, 8, 32, 64, 128, 256)
MIXED_TOKENS = (64, 256, 512)
MIXED_PROMPTS = 4
# Maximum number of tokens of a step whose kernels may begin early. On an H200 (Llama-3-8B's shape) that takes
# 0.97 to 0.99 of the time for 1 to 8 sequences in bfloat16, 1.03 for 16; with 4-bit weights 0.89 to 0.91.
MAX_DEPENDENT_TOKENS = 8
MAX_TOP = 20  # most probable tokens listed per sampled one: the limit of OpenAI's API


@dataclass(frozen=True, slots=True)
class CudaStepSpec:
    """What all devices that compute a model agree on: sizes of its steps, how they compute, and the cache.

    CudaStepSpec(limits, CudaModes(torch.bfloat16), CudaKvFormat(16, torch.bfloat16))

    Attributes:
        limits: Sizes of the steps that the engine plans.
        speculation: How to draft tokens; None: each row samples one.
    """

    limits: StepLimits
    modes: CudaModes
    kv: CudaKvFormat
    speculation: Speculation | None = None

    def with_kv_scales(self, scales: Sequence[tuple[float, float]] | None) -> CudaStepSpec:
        """Return the same with the cache's scales, which are in the model's files."""
        return replace(self, kv=replace(self.kv, scales=scales))

    @property
    def step_limits(self) -> StepLimits:
        """Sizes of the steps that are computed, with a row for each draft that the engine may plan."""
        if self.speculation is None:
            return self.limits
        drafts, max_batch_size = draft_limits(self.speculation), self.limits.max_sequences
        most = max(count * (1 + drafts.for_rows(count)) for count in range(1, max_batch_size + 1))
        max_rows = max(max_batch_size, min(most, self.limits.max_tokens))
        return replace(self.limits, max_sequences=max_rows, max_rows=max_rows)

    @property
    def num_slots(self) -> int:
        """Number of slots: those of sequences, then spare ones for drafts."""
        num_slots = self.limits.max_sequences
        return num_slots + (num_spares(self.speculation, num_slots) if self.speculation is not None else 0)

    @property
    def max_blocks(self) -> int:
        """Number of block table columns."""
        return -(-self.limits.max_context // self.kv.block_size)

    @property
    def largest(self) -> StepShape:
        """The shape that needs the most memory."""
        limits = self.step_limits
        return StepShape(
            limits.max_tokens, limits.max_sequences, limits.max_rows, limits.max_sequences, limits.max_tokens,
            num_entries=limits.max_sequences * self.max_blocks,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CudaOutputs:
    """What steps compute from the states after the last layer.

    Attributes:
        has_logits: Whether they compute logits; a model that only embeds needs none.
        max_top: Maximum number of log-probabilities that a sequence can request besides its token's.
        dense: Dense layers applied to pooled vectors.
    """

    has_logits: bool = True
    max_top: int = MAX_TOP
    dense: Sequence[Dense] = ()


def graph_shapes(limits: StepLimits, *, has_mixed: bool, has_logits: bool = True) -> list[StepShape]:
    """Return the shapes of steps that are replayed as graphs, those with the fewest tokens first.

    Each has one logits row per sequence, or none without `has_logits`. Up to 28 are for decode-only batches
    (15 if they have at most 256 sequences) and, with `has_mixed`, up to 18 for batches that also have short
    prompts.
    """
    max_size = limits.max_sequences
    decode_only = {size for size in BUCKETS if size < max_size} | {max_size}
    shapes = [StepShape(size, size, size, size, 0) for size in decode_only]
    prompts = min(MIXED_PROMPTS, (max_size + 1) // 2)
    mixed = {min(size, max_size - prompts) for size in MIXED_DECODES}
    for tokens in MIXED_TOKENS if has_mixed else ():
        for size in mixed:
            if size + tokens <= limits.max_tokens:
                rows = size + prompts
                shapes.append(StepShape(size + tokens, rows, rows, size, tokens))
    if not has_logits:
        shapes = [shape._replace(num_rows=0) for shape in shapes]
    return sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_sequences))


def _do_nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graphs of one shape; grammar masks are uploaded between the two."""

    forward: Callable[[], None]
    sample: Callable[[], None]


class CudaSteps:
    """Computes the logits of steps, on fixed buffers and without waiting.

        steps = CudaSteps(model, device, spec)
        steps.profile()
        steps.make_cache(num_blocks)
        steps.capture()
        graphs = steps.graphs_of(shape)
        device.submit([steps.upload(shape, pinned), graphs.forward])
        steps.program.logits

    Args:
        records: The slots' records of `CudaSampleState`, with the token that each sampled last; None on a
            device that gets these from shard 0's.
        sample: Body of a shape's second graph; None on a device that does not sample.
        adapters: Adapters that rows may have. Every shape then has graphs with and without them.
        has_logits: Whether graphs compute logits; without, they do not read the head, which may be a third of
            a small model's weights.
    """

    def __init__(
        self, model: Model, device: Device, spec: CudaStepSpec, *,
        records: Tensor | None = None, sample: Callable[[StepBuffers], None] | None = None,
        shard: CudaShard | None = None, adapters: CudaAdapterLayout | None = None, has_logits: bool = True,
    ) -> None:  # fmt: skip
        config, limits, modes = model.config, spec.step_limits, spec.modes
        torch.ops.tgi_cuda.set_dependent_launches(False)
        self._limits, self._modes = limits, modes
        self._device, self._shard, self._records = device, shard, records
        self._block_size = spec.kv.block_size
        self._sample = sample
        (num_kv_heads,) = {cache.num_kv_heads for cache in config.caches}
        self._make_pools = functools.partial(
            make_cuda_pools, spec.kv, config.num_layers, num_kv_heads=num_kv_heads, head_dim=config.head_dim,
            device=device.device,
        )  # fmt: skip
        scales, pools = spec.kv.scales or [(1.0, 1.0)] * config.num_layers, self._make_pools(num_blocks=1)
        self._kv = [CudaKvLayer(pool, *of_layer) for pool, of_layer in zip(pools, scales, strict=True)]
        self.program = CudaProgram(
            record(model, self._kv), limits, modes, max_blocks=spec.max_blocks, device=device.device,
            shard=shard, adapters=adapters, turns_by=model.turns_by,
        )  # fmt: skip
        self._inputs = torch.zeros(spec.largest.num_bytes, dtype=torch.uint8, device=device.device)
        # Block tables of the step's sequences, and of all slots; what is past a sequence's end is not read.
        self._tables, self._kept_tables = (
            torch.zeros(count, spec.max_blocks, dtype=torch.int32, device=device.device)
            for count in (limits.max_sequences, spec.num_slots)
        )
        self._shape: StepShape | None = None  # of the last step
        has_mixed = modes.prompt_attention in (PromptAttention.PAGED, PromptAttention.AUTO)
        self._shapes = graph_shapes(limits, has_mixed=has_mixed, has_logits=has_logits)
        self._for_decodes = [self._smallest(size) for size in range(limits.max_sequences + 1)]
        self._graphs: dict[tuple[int, ...], Graphs] = {}  # by `StepShape.graph`
        self._has_adapters = adapters is not None

    def profile(self) -> None:
        """Run a padding-only step of the largest size, so that libraries allocate the memory they need."""
        most, tokens = self._limits.max_sequences, self._limits.max_tokens
        longest = min(tokens, self._limits.max_context)
        lens = ((longest, longest),)
        shape = StepShape(
            tokens, most, self._limits.max_rows, 0, tokens, self._has_adapters, prompt_lens=lens
        )
        buffers = StepBuffers.view(self._inputs, shape)
        buffers.clear()
        self._forward(buffers)
        end = self._device.event()
        self._device.submit([end])
        end.synchronize()

    def make_cache(self, num_blocks: int) -> None:
        """Allocate the cache; must precede every capture."""
        for layer, pool in zip(self._kv, self._make_pools(num_blocks=num_blocks), strict=True):
            layer.grow(pool)

    def capture(self) -> None:
        """Capture all graphs, the largest first so that the others fit in its memory."""
        for shape in reversed(self._shapes):
            buffers = StepBuffers.view(self._inputs, shape)
            buffers.clear()  # the calls before the capture must leave no trace
            calls = self._calls(buffers)
            forward = self._device.capture(calls.forward)
            # A device that does not sample has nothing to capture.
            sample = calls.sample if self._sample is None else self._device.capture(calls.sample)
            self._graphs[shape.graph] = Graphs(forward, sample)
            if self._has_adapters:
                adapted = shape._replace(has_adapters=True)
                forward = self._calls(StepBuffers.view(self._inputs, adapted)).forward
                self._graphs[adapted.graph] = Graphs(self._device.capture(forward), sample)

    def release(self) -> None:
        """Release the graphs."""
        self._graphs.clear()

    def padded(self, num_decodes: int, prompts: Sequence[tuple[int, int]]) -> StepShape | None:
        """Return the smallest graph shape that fits these decodes and prompts; None if none does.

        Its block tables have no columns yet, and no token has an adapter.

        Args:
            prompts: Tokens in the step, and in total, of each prompt.
        """
        if not prompts:
            return self._for_decodes[num_decodes]
        if self._needs_lengths(prompts):
            return None
        return self._smallest(num_decodes, len(prompts), sum(length for length, _ in prompts))

    def _smallest(self, num_decodes: int, num_prompts: int = 0, num_tokens: int = 0) -> StepShape | None:
        """Return the smallest graph shape for these decodes, and prompts with this many tokens in total."""
        for shape in self._shapes:
            has_room = shape.num_decodes >= num_decodes and shape.num_prompts >= num_prompts
            if has_room and shape.num_tokens - shape.num_decodes >= num_tokens:
                return shape
        return None

    @property
    def prompts_by(self) -> str | None:
        """The library that computes the attention of prompts; None: only the native kernel does."""
        if self._modes.prompt_attention is PromptAttention.FLASHINFER:
            return str(self._modes.prompt_attention)
        gathering = self.program.gathering
        return None if gathering is None else str(gathering.library)

    def _needs_lengths(self, prompts: Sequence[tuple[int, int]]) -> bool:
        """Return whether another library computes a prompt: it needs lengths, which no graph has."""
        if self._modes.prompt_attention is PromptAttention.FLASHINFER:
            return bool(prompts)
        gathering = self.program.gathering
        return gathering is not None and any(gathering.takes(*lengths) for lengths in prompts)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) of the cache as if simultaneously; no block is both source and target."""
        copy_cuda_blocks(self._kv, pairs)

    def upload(self, shape: StepShape, staged: Tensor) -> Copy:
        """Return the copy of the next step's inputs to the device."""
        self._shape = shape
        return self.copy(shape, staged)

    def copy(self, shape: StepShape, staged: Tensor) -> Copy:
        """Return the copy of a step's inputs to the device; `staged` is pinned and large enough."""
        return Copy(self._inputs, staged, shape.num_bytes)

    def graphs_of(self, shape: StepShape, images: CudaImageRows | None = None) -> Graphs:
        """Return the graphs of a step of this shape; the plain calls if there are none, or it has images."""
        found = self._graphs.get(shape.graph)
        if found is not None and not shape.prompt_lens and images is None:
            return found
        return self._calls(StepBuffers.view(self._inputs, shape), images)

    def _calls(self, buffers: StepBuffers, images: CudaImageRows | None = None) -> Graphs:
        sample = _do_nothing if self._sample is None else functools.partial(self._sample, buffers)
        return Graphs(functools.partial(self._forward, buffers, images), sample)

    def head(self, rows: Sequence[int] | None = None) -> None:
        """Compute logits of at most `max_rows` tokens of the last step; None: its own rows."""
        if rows is not None:
            self.program.head(torch.tensor(rows, dtype=torch.int32, device=self._device.device))
        elif self._shape is not None and self._shape.num_rows > 0:
            self.program.head(StepBuffers.view(self._inputs, self._shape).rows)

    def _forward(self, buffers: StepBuffers, images: CudaImageRows | None = None) -> None:
        """Compute a step up to its logits; capturable, as it uses fixed buffers and never waits."""
        if self._modes.has_dependent_launches:
            is_small = buffers.shape.num_tokens <= MAX_DEPENDENT_TOKENS
            torch.ops.tgi_cuda.set_dependent_launches(is_small)
        batch = replace(buffers.batch(self._tables), images=images)
        torch.ops.tgi_cuda.begin_step(
            self._records, buffers.from_slot, buffers.context_len, buffers.table_slots, buffers.table_firsts,
            buffers.table_starts, buffers.entries, self._block_size, buffers.ids, self._kept_tables,
            batch.block_table,
        )  # fmt: skip
        decodes = buffers.shape.num_decodes
        if decodes > 0 and self._shard is not None:
            self._shard.group.broadcast(buffers.ids[:decodes])
        if not self._needs_lengths(batch.prompt_lens):
            batch = replace(batch, prompt_lens=())  # one launch of the native kernel, by C++
        self.program.forward(batch)
        if buffers.shape.num_rows > 0:
            self.program.head(buffers.rows)
