"""Llama-3-8B's shape with random weights on the device: what a step costs does not depend on their values.

Used by bench/gpu_stages.py; the forward pass is that of models/llama.py, over the same operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from tgi_asgi.models.batch import Batch
from torch import Tensor

from bench import gpu_stages
from bench.gpu_stages import random
from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.ops.cuda import CudaBatch, CudaKvLayer, CudaProgram
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix

SHAPE = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, context_length=32768, norm_eps=1e-5,
    rope_theta=500000.0,
)  # fmt: skip
BLOCK = 16
_GROUP = 128  # columns that share a scale


class RandomLlama:
    """A model of this shape for `CudaProgram` and `CudaRunner`, which take it as they take `Llama`.

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
        self.head = dense(config.vocab_size, hidden)
        make = dense if weights == "bf16" else int4
        self.layers = [[make(*shape) for shape in shapes] for _ in range(config.num_layers)]
        self.norm = random(hidden, dtype=torch.float32)
        inverse = [config.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
        self.rope = ops.RopeTable.create(inverse, max_positions)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self.head.num_bytes + sum(weight.num_bytes for layer in self.layers for weight in layer)

    def forward(self, batch: Batch, kv: Sequence[ops.KvLayer]) -> Tensor:
        """Return the residual, as `Llama.forward`."""
        config, eps = self.config, self.config.norm_eps
        x = ops.embed(batch.ids, self.head)
        for (qkv, output, gate_up, down), layer in zip(self.layers, kv, strict=True):
            weight = ops.QkvWeight(qkv, config.num_heads, config.num_kv_heads, config.head_dim)
            a = ops.norm(x, self.norm, eps)
            q = ops.qkv(a, weight, batch.positions, batch.slots, layer, self.rope)
            x = ops.linear_add(ops.attention(q, layer, batch.tables, config.scale), output, x)
            a = ops.gate_up(ops.norm(x, self.norm, eps), ops.GateUpWeight(gate_up))
            x = ops.linear_add(a, down, x)
        return x

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return logits, as `Llama.logits`."""
        return ops.head(x, rows, self.norm, self.config.norm_eps, self.head)


def dense(rows: int, columns: int) -> ops.LinearWeight:
    """Make a random matrix in bfloat16."""
    return ops.LinearWeight(random(rows, columns) * columns**-0.5)


def int4(rows: int, columns: int) -> ops.LinearWeight:
    """Make a random matrix of codes of four bits."""
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=gpu_stages.DEVICE)
    scales = torch.rand(rows, columns // _GROUP, device=gpu_stages.DEVICE) * 0.2 * columns**-0.5
    return ops.LinearWeight(CudaQuantMatrix(codes, scales, -8 * scales, (rows, columns), 4, 0))


def block_table(batch: int, context: int) -> Tensor:
    """Return block tables [batch, context / BLOCK] in random order."""
    return torch.randperm(batch * context // BLOCK, device=gpu_stages.DEVICE).int().view(batch, -1)


def decode_program(
    batch: int, context: int, config: ModelConfig = SHAPE, weights: str = "bf16"
) -> tuple[Callable[[], Tensor], int, int]:
    """Return a decode step, which returns logits, the bytes it must read, and how many calls it makes."""
    device = gpu_stages.DEVICE
    model = RandomLlama(config, context, weights)
    program = CudaProgram(
        max_tokens=batch, max_sequences=batch, max_rows=batch, max_blocks=context // BLOCK,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    shape = (batch * context // BLOCK, 2, config.num_kv_heads, BLOCK, config.head_dim)
    kv: Any = [CudaKvLayer(random(*shape)) for _ in range(config.num_layers)]
    given = program.inputs
    x = model.forward(Batch(given.ids, given.positions, given.slots, given.tables), kv)
    model.logits(x, given.rows)
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

    kv_bytes = sum(cast(CudaKvLayer, layer).pool.nbytes for layer in kv)
    return call, model.num_bytes + kv_bytes, program.num_calls + 2
