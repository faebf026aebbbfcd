"""Llama-3-8B's shape with random weights on the device: what a step costs does not depend on their values.

Used by bench/gpu_stages.py; the forward pass is that of models/decoder.py, over the same operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import gpu_stages
from bench.gpu_stages import random
from tgi_asgi import ops
from tgi_asgi.models.config import LayerSpec, ModelConfig, RopeSpec
from tgi_asgi.models.family import record
from tgi_asgi.ops.cuda import CudaBatch, CudaKvLayer, CudaProgram
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceMatrix

SHAPE = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_heads=32, num_kv_heads=8, head_dim=128, context_length=32768, norm_eps=1e-5,
    layers=(LayerSpec(RopeSpec(128, 500000.0), None, 128**-0.5),) * 32,
)  # fmt: skip
BLOCK = 16
_GROUP = 128  # columns that share a scale


class RandomLlama:
    """A model of this shape, for `CudaProgram` and `CudaRunner`.

    Args:
        weights: bf16, or int4 (a scale and an offset for each 128 columns; embedding and head stay bf16).
    """

    def __init__(self, config: ModelConfig, max_positions: int, weights: str = "bf16") -> None:
        self.config = config
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        shapes = (
            ((heads + 2 * config.num_kv_heads) * dim, hidden), (hidden, heads * dim),
            (2 * config.intermediate_size, hidden), (hidden, config.intermediate_size),
        )  # fmt: skip
        self.head = ops.LinearWeight(config.vocab_size, hidden, dense(config.vocab_size, hidden))
        make = dense if weights == "bf16" else int4
        self.layers = [[make(*shape) for shape in shapes] for _ in range(config.num_layers)]
        self.norm = ops.NormWeight(random(hidden, dtype=torch.float32), config.norm_eps)
        spec = config.layers[0].rope
        assert spec is not None
        inverse = [spec.theta ** (-2 * i / dim) for i in range(dim // 2)]
        self.rope = ops.RopeTable.create(inverse, max_positions)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        matrices = [self.head.made, *(made for layer in self.layers for made in layer)]
        return sum(made.matrix.nbytes for made in matrices)

    def forward(self, batch: ops.RecordedBatch, caches: Sequence[ops.Cache]) -> ops.Value:
        """Return the residual, as `Model.forward`."""
        config = self.config
        heads, kv_heads, dim, hidden = (
            config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size,
        )  # fmt: skip
        x = ops.embed(batch, self.head, 1.0)
        for (qkv, output, gate_up, down), cache in zip(self.layers, caches, strict=True):
            weight = ops.QkvWeight(hidden, heads, kv_heads, dim, dim, None, qkv)
            q = ops.qkv(ops.norm(x, self.norm), weight, cache, self.rope)
            a = ops.attention(q, cache, config.layers[0].scale)
            x = ops.linear_add(a, ops.LinearWeight(hidden, heads * dim, output), x)
            gates = ops.GateUpWeight(hidden, config.intermediate_size, gate_up)
            a = ops.gate_up(ops.norm(x, self.norm), gates, config.activation)
            x = ops.linear_add(a, ops.LinearWeight(hidden, config.intermediate_size, down), x)
        return x

    def logits(self, x: ops.Value) -> ops.Value:
        """Return logits, as `Model.logits`."""
        return ops.head(x, self.norm, self.head)


def dense(rows: int, columns: int) -> DeviceMatrix:
    """Make a random matrix in bfloat16."""
    return DeviceMatrix(random(rows, columns) * columns**-0.5, None)


def int4(rows: int, columns: int) -> DeviceMatrix:
    """Make a random matrix of codes of four bits."""
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=gpu_stages.DEVICE)
    scales = torch.rand(rows, columns // _GROUP, device=gpu_stages.DEVICE) * 0.2 * columns**-0.5
    return DeviceMatrix(CudaQuantMatrix(codes, scales, -8 * scales, (rows, columns), 4, 0), None)


def block_table(batch: int, context: int) -> Tensor:
    """Return block tables [batch, context / BLOCK] in random order."""
    return torch.randperm(batch * context // BLOCK, device=gpu_stages.DEVICE).int().view(batch, -1)


def decode_program(
    batch: int, context: int, config: ModelConfig = SHAPE, weights: str = "bf16"
) -> tuple[Callable[[], Tensor], int, int]:
    """Return a decode step, which returns logits, the bytes it must read, and how many calls it makes."""
    device = gpu_stages.DEVICE
    model = RandomLlama(config, context, weights)
    shape = (batch * context // BLOCK, 2, config.num_kv_heads, BLOCK, config.head_dim)
    kv = [CudaKvLayer(random(*shape)) for _ in range(config.num_layers)]
    program = CudaProgram(
        record(model, kv), max_tokens=batch, max_sequences=batch, max_rows=batch,
        max_blocks=context // BLOCK, dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    table = block_table(batch, context)
    full = torch.full((batch,), context, dtype=torch.int32, device=device)
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    inputs = CudaBatch(
        ids=rows, positions=full - 1, slots=table[:, -1].long() * BLOCK + BLOCK - 1,
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=device), context_len=full,
        block_table=table, num_decodes=batch, max_query_len=0,
    )  # fmt: skip

    def call() -> Tensor:
        program.forward(inputs)
        program.head(rows)
        return program.logits[:batch]

    kv_bytes = sum(layer.pool.nbytes for layer in kv)
    return call, model.num_bytes + kv_bytes, program.num_calls + 2
