"""Llama-3-8B's shape with random weights on the device: the cost of a step does not depend on their values.

Used by bench/gpu_kernels.py and gpu_runs.py; the forward pass is that of models/decoder.py, with the same
operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bench import gpu_timing
from bench.gpu_timing import random
from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import record
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.ops.cuda import CudaProgram
from tgi_asgi.ops.cuda_attention import PromptAttention
from tgi_asgi.ops.cuda_batch import CudaBatch
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceMatrix
from tgi_asgi.ops.cuda_sample_state import CudaSampleState, DeviceSamples
from tgi_asgi.types import SamplingParams

SHAPE = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_heads=32, num_kv_heads=8, head_dim=128, context_length=32768, norm_eps=1e-5,
    layers=(LayerSpec(RopeSpec(128, 500000.0), None, 128**-0.5),) * 32,
)  # fmt: skip
BLOCK = 16
GREEDY = SamplingParams(temperature=0.0)
TOP_P = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=1)
KV_TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_SAMPLINGS = {"greedy": GREEDY, "top-p": TOP_P}
# Codes: bits, columns per scale, zero point, whether there are offsets.
CODES = {
    "int4": (4, 128, 0, True), "q8_0": (8, 32, 128, False), "q6_k": (8, 16, 32, False),
    "fp8": (8, 128, 0, False), "mxfp4": (4, 32, 0, False),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepKind:
    """The contents of a step of the random model."""

    batch: int  # sequences that decode
    context: int  # tokens per sequence
    weights: str = "bf16"  # or a name in `CODES`, or w8a8: FP8, and many tokens' activations, too
    kv: str = "bf16"  # or fp8
    prompt: int = 0  # tokens of an additional prompt chunk, a multiple of a block
    sampling: str = ""  # greedy or top-p; empty: the step ends with logits


@dataclass(frozen=True, slots=True)
class Step:
    """A repeatable step and its minimum costs."""

    call: Callable[[], Tensor]  # returns logits [batch (+ 1), vocab], or the sampled tokens
    num_bytes: int
    num_flops: int
    num_calls: int  # operators


class RandomLlama:
    """A model of this shape, for `CudaProgram` and `CudaRunner`.

    Args:
        weights: Format of the weights, as `StepKind.weights`; embedding and head stay bf16.
    """

    kind: ClassVar[Literal["native"]] = "native"
    images = turns_by = None

    def __init__(self, config: ModelConfig, max_positions: int, weights: str = "bf16") -> None:
        self.config = config
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        shapes = (
            ((heads + 2 * config.num_kv_heads) * dim, hidden), (hidden, heads * dim),
            (2 * config.intermediate_size, hidden), (hidden, config.intermediate_size),
        )  # fmt: skip
        self.head = ops.LinearWeight(config.vocab_size, hidden, dense(config.vocab_size, hidden))
        make = {"bf16": dense, "w8a8": float8}.get(weights) or functools.partial(quantised, weights)
        self.layers = [[make(*shape) for shape in shapes] for _ in range(config.num_layers)]
        norm = np.random.default_rng(0).standard_normal(hidden, np.float32)
        self.norm = ops.NormWeight(norm, config.norm_eps)
        spec = config.layers[0].rope
        assert spec is not None
        inverse = [spec.theta ** (-2 * i / dim) for i in range(dim // 2)]
        self.rope = ops.RopeTable.create(inverse, max_positions)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        matrices = [self.head.made, *(made for layer in self.layers for made in layer)]
        return sum(made.matrix.nbytes for made in matrices)

    @property
    def num_weights(self) -> int:
        """Number of weights that each token is multiplied by, except the head's."""
        config, hidden = self.config, self.config.hidden_size
        rows = (config.num_heads * 2 + 2 * config.num_kv_heads) * config.head_dim
        return config.num_layers * hidden * (rows + 3 * config.intermediate_size)

    def forward(self, batch: ops.RecordedBatch, caches: Sequence[ops.Cache]) -> ops.Value:
        """Return the residual stream, like `Model.forward`."""
        config = self.config
        dim, hidden = config.head_dim, config.hidden_size
        heads = ops.QkvHeads(config.num_heads, config.num_kv_heads, dim, rotary_dim=dim)
        x = ops.embed(batch, self.head, 1.0)
        for (qkv, output, gate_up, down), cache in zip(self.layers, caches, strict=True):
            weight = ops.QkvWeight(hidden, heads, None, qkv)
            q = ops.qkv(ops.norm(x, self.norm), weight, cache, self.rope)
            a = ops.attention(q, cache, ops.AttentionSpec(config.layers[0].scale))
            x = ops.linear_add(a, ops.LinearWeight(hidden, heads.rows[0], output), x)
            gates = ops.GateUpWeight(hidden, config.intermediate_size, gate_up)
            a = ops.gate_up(ops.norm(x, self.norm), gates, config.activation)
            x = ops.linear_add(a, ops.LinearWeight(hidden, config.intermediate_size, down), x)
        return x

    def logits(self, x: ops.Value) -> ops.Value:
        """Return logits, like `Model.logits`."""
        return ops.head(x, self.norm, self.head)


def dense(rows: int, columns: int) -> DeviceMatrix:
    """Make a random matrix in bfloat16."""
    return DeviceMatrix(random(rows, columns) * columns**-0.5, None)


def quantised(name: str, rows: int, columns: int) -> DeviceMatrix:
    """Make a random matrix of codes."""
    return DeviceMatrix(random_codes(name, rows, columns), None)


def float8(rows: int, columns: int) -> DeviceMatrix:
    """Make a random matrix in FP8 with a scale per row, which products in FP8 can use."""
    codes = random_codes("fp8", rows, columns)
    codes.scales.copy_(codes.scales[:1].clone())
    return DeviceMatrix(codes, None)


def random_codes(name: str, rows: int, columns: int) -> CudaQuantMatrix:
    """Make a random matrix of one of `CODES`, scaled so that its values are about 1 / sqrt(columns)."""
    bits, group, zero, has_offsets = CODES[name]
    group, device = min(group, columns), gpu_timing.DEVICE
    most = 256 if bits == 4 else 120  # as FP8, larger codes would not be numbers
    codes = torch.randint(most, (rows, columns * bits // 8), dtype=torch.uint8, device=device)
    scales = (
        torch.rand(columns // group, -(-rows // 16) * 16, device=device)
        * (0.2 if bits == 4 else 0.02)
        * columns**-0.5
    )
    offsets = -8 * scales if has_offsets else None
    if name == "fp8":
        codes = codes.view(torch.float8_e4m3fn)
    elif name == "q8_0":
        scales = scales.half()
    elif name == "mxfp4":
        scales = torch.full(scales.shape, 125, dtype=torch.uint8, device=device) - columns.bit_length() // 2
    return CudaQuantMatrix(codes, scales, offsets, (rows, columns), bits, zero)


def block_table(batch: int, context: int) -> Tensor:
    """Return block tables [batch, context / BLOCK] in random order."""
    return torch.randperm(batch * context // BLOCK, device=gpu_timing.DEVICE).int().view(batch, -1)


def make_sampler(rows: int, vocab: int, sampling: SamplingParams) -> Callable[[Tensor], Tensor]:
    """Return a call that samples a token for each row of logits and returns the tokens."""
    device = gpu_timing.DEVICE
    state = CudaSampleState(rows, vocab, device)
    for slot in range(rows):
        state.start(slot, sampling, choice=slot, prompt_ids=[1])
    ids, num_top = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    is_finite, logprobs = torch.empty(rows, dtype=torch.bool, device=device), torch.empty(rows, device=device)
    result = DeviceSamples(
        ids, is_finite, logprobs, ids.new_empty(rows, 0), logprobs.new_empty(rows, 0), num_top
    )
    slots = torch.arange(rows, dtype=torch.int32, device=device)

    def sample(logits: Tensor) -> Tensor:
        state.sample(logits, slots, None, None, result)
        return ids

    return sample


def make_step(kind: StepKind, config: ModelConfig = SHAPE) -> Step:
    """Return a step of the random model: sequences that decode, and optionally a prompt's first chunk."""
    device, batch, prompt = gpu_timing.DEVICE, kind.batch, kind.prompt
    longest = max(kind.context, prompt)
    sequences = batch + (1 if prompt else 0)
    model = RandomLlama(config, longest, kind.weights)
    shape = (sequences * longest // BLOCK, 2, config.num_kv_heads, BLOCK, config.head_dim)
    kv = [CudaKvLayer(random(*shape).to(KV_TYPES[kind.kv])) for _ in range(config.num_layers)]
    limits = ops.StepLimits(
        max_tokens=batch + prompt, max_sequences=sequences, max_rows=sequences, max_context=longest
    )
    modes = CudaModes(prompt_attention=PromptAttention.AUTO, has_float8_products=kind.weights == "w8a8")
    program = CudaProgram(record(model, kv), limits, modes, max_blocks=longest // BLOCK, device=device)
    inputs, rows = _inputs(kind, block_table(sequences, longest))
    if program.gathering is not None and program.gathering.takes(prompt, prompt):
        inputs = replace(inputs, prompt_lens=((prompt, prompt),))
    sampler = make_sampler(sequences, config.vocab_size, _SAMPLINGS[kind.sampling]) if kind.sampling else None

    def call() -> Tensor:
        program.forward(inputs)
        program.head(rows)
        logits = program.logits[:sequences]
        return logits if sampler is None else sampler(logits)

    of_token = 2 * config.num_kv_heads * config.head_dim * config.num_layers * KV_TYPES[kind.kv].itemsize
    head = config.vocab_size * config.hidden_size
    flops = 2 * (model.num_weights * (batch + prompt) + head * sequences)
    flops += 2 * config.num_layers * config.num_heads * config.head_dim * prompt * prompt
    num_bytes = model.num_bytes + of_token * (batch * kind.context + prompt)
    return Step(call, num_bytes, flops, program.num_launches(inputs, sequences) + (sampler is not None))


def _inputs(kind: StepKind, table: Tensor) -> tuple[CudaBatch, Tensor]:
    """Return a step's batch on the device, and the tokens whose logits are wanted."""
    batch, prompt, device = kind.batch, kind.prompt, table.device
    chunk = torch.arange(prompt, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), kind.context, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    last = lengths.long() - 1
    slots = table[torch.arange(batch, device=device), last // BLOCK].long() * BLOCK + last % BLOCK
    if not prompt:
        return CudaBatch(starts[:-1], lengths - 1, slots, starts, lengths, table, batch, 0), starts[:-1]
    own = table[batch, chunk.long() // BLOCK].long() * BLOCK + chunk % BLOCK
    end = torch.tensor([batch + prompt], dtype=torch.int32, device=device)
    inputs = CudaBatch(
        torch.cat([starts[:-1], chunk]), torch.cat([lengths - 1, chunk]), torch.cat([slots, own]),
        torch.cat([starts, end]), torch.cat([lengths, end - batch]), table, batch, prompt,
    )  # fmt: skip
    return inputs, torch.cat([starts[:-1], end - 1])
