"""One product of the recorded step, and what it must be: float64 on the activations as they are rounded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.ops.packed import PackedMatrix, plain_order

EPS = 1e-5


def as_int8(x: Tensor) -> Tensor:
    """Round float32 rows to eight bits in blocks of 32, as the kernels do."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(largest > 0, 127 / largest, torch.zeros(()))).round()
    return (codes.double() * (largest * torch.tensor(1 / 127)).double()).reshape(x.shape)


def rounded(x: Tensor, precision: str) -> Tensor:
    """Return float32 rows in float64, as a product of this precision reads them."""
    if precision == "int8":
        return as_int8(x)
    return x.to(torch.bfloat16).double() if precision == "bfloat16" else x.double()


def source_of(tensor: Tensor) -> ops.WeightSource:
    """Wrap a float32 tensor as a file has it."""
    return ops.WeightSource(
        tensor.contiguous().view(torch.uint8).reshape(-1).numpy(), "F32", tuple(tensor.shape)
    )


def packed_weight(
    data: np.ndarray, format: str, shape: tuple[int, int], precision: str, bias: Tensor | None = None
) -> ops.LinearWeight:
    """Pack a file's rows of any format that has a kernel, for products of this precision."""
    order = plain_order(shape[0])
    size = len(order) // 16 * torch.ops.tgi.packed_panel_bytes(format, shape[1])
    out = torch.full((size,), 0xA5, dtype=torch.uint8)
    torch.ops.tgi.pack_weight([torch.from_numpy(data)], format, shape[1], torch.from_numpy(order), out)
    return ops.LinearWeight(PackedMatrix((out,), (format,), shape, precision), bias)


class Product:
    """Norm and one product, recorded: `norm(x) @ W.T` for rows of a table of embeddings."""

    def __init__(self, weight: ops.LinearWeight, table: Tensor, norm_weight: Tensor) -> None:
        assert isinstance(weight.matrix, PackedMatrix)
        self.precision = weight.matrix.precision
        self._weight, self._table, self._norm_weight = weight, table, norm_weight
        packing = ops.Packing(is_exact=self.precision == "float32")
        embedding = ops.linear_weight(source_of(table), dtype=packing)
        self.program = ops.StepProgram(max_tokens=64, max_sequences=1, max_rows=64, max_context=64)
        x = ops.embed(self.program.inputs.ids, embedding)
        x = _attend_to_nothing(self.program, x, packing, table.shape[1])
        ops.head(x, self.program.inputs.rows, norm_weight, EPS, weight)

    def run(self, ids: list[int]) -> Tensor:
        """Return the outputs [len(ids), rows] of these rows of the table."""
        n = len(ids)
        tables = ops.AttentionTables(_int([0, n]), _int([n]), _int([[0, 1, 2, 3]]))
        positions = _int(range(n))
        arguments = (_int(ids), positions, torch.arange(n), tables, positions)
        self.program.run(*arguments).fill_(torch.nan)  # a view: what is not written stays NaN
        return self.program.run(*arguments).clone()

    def expected(self, weight: Tensor) -> Tensor:
        """Return what all rows of the table must give with a weight of this meaning."""
        mean = self._table.double().pow(2).mean(-1, keepdim=True)
        normed = (self._table.double() / (mean + EPS).sqrt() * self._norm_weight.double()).float()
        result = rounded(normed, self.precision) @ weight.double().T
        bias = self._weight.bias
        return result if bias is None else result + bias[: weight.shape[0]].double()


def _int(values: object) -> Tensor:
    return torch.tensor(list(values) if isinstance(values, range) else values, dtype=torch.int32)


def _attend_to_nothing(program: ops.StepProgram, x: Tensor, packing: ops.Packing, width: int) -> Tensor:
    """Add an attention whose weights are zero: a program learns the shape of its pool from one."""
    kv = ops.allocate_kv(1, 4, 1, 32, 16, torch.float32)[0]
    zeros = source_of(torch.zeros(32, width))
    weight = ops.qkv_weight(zeros, zeros, zeros, num_heads=1, num_kv_heads=1, head_dim=32, dtype=packing)
    output = ops.linear_weight(source_of(torch.zeros(width, 32)), dtype=packing)
    inputs, rope = program.inputs, ops.RopeTable(torch.ones(64, 16), torch.zeros(64, 16))
    q = ops.qkv(ops.norm(x, torch.ones(width), EPS), weight, inputs.positions, inputs.slots, kv, rope)
    return ops.linear_add(ops.attention(q, kv, inputs.tables, 1.0), output, x)
