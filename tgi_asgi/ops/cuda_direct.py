"""Products, embeddings and experts of torch tensors on a CUDA device: the counterpart of `direct.py`.

Activations are float32, as on a CPU. A product rounds them to the type in which it multiplies, and sums in
float32. Nothing waits for the device, except experts that no kernel computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.adapters import AdapterLayout
from tgi_asgi.ops.cuda_experts import Routing, has_kernels, operands
from tgi_asgi.ops.cuda_linear import MAX_CODED_TOKENS, MAX_SKINNY_TOKENS, has_wide_products
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceExperts, DeviceMatrix
from tgi_asgi.ops.direct import ACTIVATION_FUNCTIONS, by_expert, gated
from tgi_asgi.ops.routing import ClampedGate
from tgi_asgi.ops.weights import ExpertsWeight, GateUpWeight, LinearWeight

_kernels: Any = torch.ops.tgi_cuda
_EXACT_BYTES = 256 << 20  # of a matrix's rows that are widened to float32 at a time


@dataclass(frozen=True, slots=True)
class CudaDirect:
    """The functions of `direct.py`, for weights that a `Repacking` of this type has made.

        kernels = CudaDirect(torch.bfloat16)
        rows = kernels.linear(weight, x)

    No function applies adapters. `is_exact` multiplies in float32, and rounds no activation.
    """

    dtype: torch.dtype

    def linear(
        self, weight: LinearWeight, x: Tensor, is_exact: bool = False, step: _C.FlatRows | None = None,
        adapters: AdapterLayout | None = None,
    ) -> Tensor:  # fmt: skip
        """Return x @ W.T (+ bias), [n, rows] float32, of x [n, columns] float32.

        Raises:
            ValueError: if x has another number of columns.
        """
        _check(x, weight.columns, adapters)
        return self._product(weight.made, x, is_exact)

    def gate_up(
        self, weight: GateUpWeight, x: Tensor, activation: str, is_exact: bool = False,
        step: _C.FlatRows | None = None, adapters: AdapterLayout | None = None,
    ) -> Tensor:  # fmt: skip
        """Return f(x @ gate.T) * (x @ up.T), [n, intermediate] float32; otherwise the same as `linear`."""
        _check(x, weight.columns, adapters)
        gate, up = self._product(weight.made, x, is_exact).chunk(2, dim=-1)
        return ACTIVATION_FUNCTIONS[activation](gate) * up

    def embed(self, weight: LinearWeight, ids: Tensor, factor: float = 1.0) -> Tensor:
        """Return factor * W[ids], [n, columns] float32, of ids [n] that are in the table."""
        made: DeviceMatrix = weight.made
        matrix = made.matrix
        rows = matrix.picked(ids).plain(self.dtype) if isinstance(matrix, CudaQuantMatrix) else matrix[ids]
        return rows.float() * factor

    def experts(
        self, weight: ExpertsWeight, x: Tensor, ids: Tensor, weights: Tensor, activation: str = "silu",
        clamped: ClampedGate | None = None, is_exact: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the weighted sum of the outputs of each row's experts, [n, columns] float32.

        ids, weights: [n, k]. An id beyond the experts selects none of them. The arithmetic is that of
        `ops.experts_add`. If `is_exact`, or if the kernels do not compute these sizes, experts are computed
        one after the other.

        Raises:
            ValueError: if x has another number of columns.
        """
        _check(x, weight.columns, None)
        if len(x) == 0:
            return torch.zeros_like(x)
        sizes = (weight.num_experts, weight.columns, weight.intermediate_size)
        if not is_exact and self.dtype is not torch.float32 and has_kernels(*sizes):
            return self._experts_by_kernels(weight, x, ids, weights, activation, clamped)
        made: DeviceExperts = weight.made
        order, tokens, counts = by_expert(ids, weight.num_experts)
        total, first = torch.zeros_like(x), 0
        for expert, size in enumerate(counts.tolist()):
            mine = slice(first, first + size)
            first += size
            if size == 0:
                continue
            up_rows, down_rows = 2 * weight.intermediate_size, weight.columns
            rows = self._product(_part(made.gate_up, expert, up_rows), x[tokens[mine]], is_exact)
            gate, up = rows.chunk(2, dim=-1)
            inner = gated(gate, up, activation, clamped)
            rows = self._product(_part(made.down, expert, down_rows), inner, is_exact)
            total.index_add_(0, tokens[mine], rows * weights.flatten()[order[mine], None])
        return total

    def stack(self, weights: Sequence[LinearWeight]) -> CudaLinearStack:
        """Return a product per expert.

        Raises:
            ValueError: if the weights' shapes differ.
        """
        return CudaLinearStack(self, weights)

    def _experts_by_kernels(
        self, weight: ExpertsWeight, x: Tensor, ids: Tensor, weights: Tensor, activation: str,
        clamped: ClampedGate | None,
    ) -> Tensor:  # fmt: skip
        made: DeviceExperts = weight.made
        num_tokens, top_k = ids.shape
        # Tokens add their experts' outputs in ascending order.
        sorted_ids, order = ids.clamp(max=weight.num_experts).sort(dim=1)
        routing = Routing.make(num_tokens, top_k, weight.num_experts, x.device)
        routing.ids.copy_(sorted_ids)
        routing.weights.copy_(weights.gather(1, order))
        _kernels.experts_plan(routing.ids, weight.num_experts, False, routing.pairs, routing.tiles)
        plan = (weight.num_experts, routing.pairs, routing.tiles, False)
        inner = x.new_empty(num_tokens, top_k, weight.intermediate_size, dtype=self.dtype)
        rows = x.new_empty(num_tokens, top_k, weight.columns, dtype=self.dtype)
        gate = (0.0, 1.0, 0.0) if clamped is None else (clamped.limit, clamped.slope, clamped.offset)
        a = x.to(self.dtype).contiguous()
        gate_up, down = (operands(each.matrix, each.bias) for each in (made.gate_up, made.down))
        _kernels.experts_gate_up(a, *gate_up, *plan, activation, *gate, inner)
        _kernels.experts_down(inner, *down, *plan, rows)
        total = torch.zeros_like(x, memory_format=torch.contiguous_format)
        _kernels.experts_sum(rows, routing.ids, routing.weights, weight.num_experts, 1.0, total)
        return total

    def _product(self, made: DeviceMatrix, x: Tensor, is_exact: bool) -> Tensor:
        """Return x @ W.T (+ bias), float32."""
        matrix, num_tokens = made.matrix, len(x)
        if is_exact or self.dtype is torch.float32:  # which no kernel multiplies
            rows = torch.cat([x @ piece.float().T for piece in self._pieces(matrix)], dim=1)
            return _with_bias(rows, made.bias)
        a = x.to(self.dtype)
        if isinstance(matrix, CudaQuantMatrix):
            if not 0 < num_tokens <= MAX_CODED_TOKENS:
                return _with_bias(_multiplied(a, matrix.plain(self.dtype)), made.bias)
            if matrix.order is not None:
                a = a.index_select(1, matrix.order)
            out = x.new_empty(num_tokens, matrix.shape[0])
            _kernels.quant_linear(
                a.contiguous(), matrix.codes, matrix.scales, matrix.offsets, made.bias, matrix.bits,
                matrix.zero, False, out,
            )  # fmt: skip
            return out
        if not 0 < num_tokens <= MAX_SKINNY_TOKENS or matrix.shape[1] % 8:
            return _with_bias(_multiplied(a, matrix), made.bias)
        out = x.new_empty(num_tokens, matrix.shape[0])
        _kernels.linear(a.contiguous(), matrix, made.bias, False, out)
        return out

    def _pieces(self, matrix: Tensor | CudaQuantMatrix) -> Iterator[Tensor]:
        """Yield a matrix's rows, as many at a time as may be widened."""
        num_rows, columns = matrix.shape
        step = max(_EXACT_BYTES // (4 * columns), 1)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            if isinstance(matrix, CudaQuantMatrix):
                yield matrix.sliced(first, last).plain(self.dtype)
            else:
                yield matrix[first:last]


class CudaLinearStack:
    """A product per expert, for rows sorted by expert: the counterpart of `direct.LinearStack`."""

    def __init__(self, kernels: CudaDirect, weights: Sequence[LinearWeight]) -> None:
        self.rows, self.columns = weights[0].rows, weights[0].columns
        if any((each.rows, each.columns) != (self.rows, self.columns) for each in weights):
            raise ValueError("the experts' matrices have different shapes")
        self._kernels, self._weights = kernels, weights
        self.nbytes = sum(each.made.matrix.nbytes for each in weights)

    def multiply(self, x: Tensor, sizes: Tensor, is_exact: bool = False) -> Tensor:
        """Return each row of x times its expert's matrix, [n, rows]; waits for `sizes` [num_experts]."""
        parts = torch.split(x, sizes.tolist())
        found = [
            self._kernels.linear(weight, part, is_exact)
            for weight, part in zip(self._weights, parts, strict=True)
            if len(part) > 0
        ]
        return torch.cat(found) if found else x.new_empty(0, self.rows)


def _check(x: Tensor, columns: int, adapters: AdapterLayout | None) -> None:
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"`x` must be [n, {columns}], got {tuple(x.shape)}")
    if adapters is not None:
        raise ValueError("no kernel applies adapters to a module's products on a GPU")


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows.add_(bias)


def _multiplied(a: Tensor, matrix: Tensor) -> Tensor:
    """Return a @ matrix.T in float32, not rounded before if torch supports that."""
    if has_wide_products(matrix.device, matrix.dtype):
        return torch.mm(a, matrix.T, out_dtype=torch.float32)
    return (a @ matrix.T).float()


def _part(stack: DeviceMatrix, index: int, num_rows: int) -> DeviceMatrix:
    """Return one expert's matrix of a stack."""
    matrix, first, last = stack.matrix, index * num_rows, (index + 1) * num_rows
    part = matrix.sliced(first, last) if isinstance(matrix, CudaQuantMatrix) else matrix[first:last]
    return DeviceMatrix(part, None if stack.bias is None else stack.bias[index].clone())  # aligned
