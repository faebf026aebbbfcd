"""Products, norms and embeddings of torch tensors, one call each, for models that compute in torch.

A row has the same bits whatever else is in the tensor. The memory of activations is reused by all calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.activations import GATED_ACTIVATIONS
from tgi_asgi.ops.adapters import AdapterLayout
from tgi_asgi.ops.experts import ClampedGate
from tgi_asgi.ops.packing import PackedExperts, PackedGateUp, PackedLinear, stacked
from tgi_asgi.ops.weights import ExpertsWeight, GateUpWeight, LinearWeight

_MAX_ID = torch.iinfo(torch.int32).max


def linear(
    weight: LinearWeight,
    x: Tensor,
    is_exact: bool = False,
    step: _C.FlatRows | None = None,
    adapters: AdapterLayout | None = None,
) -> Tensor:
    """Return x @ W.T (+ bias), [n, rows] float32, of x [n, columns] float32.

    x is rounded to the precision in which the weight is multiplied, unless `is_exact`. The result may be a
    view of a wider tensor, because rows are padded to whole strips. If x holds the tokens of `step` and
    `adapters` may change the weight, the adapters of the step's rows are applied.

    Raises:
        ValueError: if x has another number of columns.
        TypeError: if x is not float32.
    """
    _check_columns(x, weight.columns)
    return _product(weight.made, weight.rows, x, is_exact, step, adapters)


def gate_up(
    weight: GateUpWeight,
    x: Tensor,
    activation: str,
    is_exact: bool = False,
    step: _C.FlatRows | None = None,
    adapters: AdapterLayout | None = None,
) -> Tensor:
    """Return f(x @ gate.T) * (x @ up.T), [n, intermediate] float32; otherwise the same as `linear`."""
    made: PackedGateUp = weight.made
    _check_columns(x, weight.columns)
    if len(made.parts) == 2:  # of different formats
        gate, up = (
            _product(part, weight.intermediate_size, x, is_exact, step, adapters) for part in made.parts
        )
        return GATED_ACTIVATIONS[activation](gate) * up
    (part,) = made.parts
    out = torch.empty(x.shape[0], part.matrix.num_stored_rows // 2, dtype=torch.float32)
    precision = "float32" if is_exact else part.precision
    changed = _changed(part, step, adapters)
    _C.gate_up_rows(part.matrix, part.bias, _array(x), out.numpy(), precision, activation, *changed)
    return out if out.shape[1] == weight.intermediate_size else out[:, : weight.intermediate_size]


def experts(
    weight: ExpertsWeight,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    activation: str = "silu",
    clamped: ClampedGate | None = None,
    is_exact: bool = False,
) -> Tensor:
    """Return the weighted sum of the outputs of each row's experts, [n, columns] float32.

    ids, weights: [n, k]. An id beyond the experts selects none of them. The arithmetic is that of
    `ops.experts_add`.

    Raises:
        ValueError: if x has another number of columns, or an id is negative.
        TypeError: if x or weights are not float32.
    """
    made: PackedExperts = weight.made
    _check_columns(x, weight.columns)
    out = torch.empty(x.shape[0], -(-weight.columns // 32) * 32, dtype=torch.float32)
    native = _C.ExpertMlps(
        gate_up=made.gate_up, down=made.down, activation=activation,
        **({} if clamped is None else asdict(clamped)),
    )  # fmt: skip
    precisions = ("float32", "float32") if is_exact else (made.precision, made.inner_precision)
    narrow = ids.clamp(-1, _MAX_ID - 1).to(torch.int32).contiguous()
    _C.experts_rows(native, narrow.numpy(), weights.contiguous().numpy(), _array(x), out.numpy(), *precisions)
    return out if out.shape[1] == weight.columns else out[:, : weight.columns]


class LinearStack:
    """A product per expert, for rows sorted by expert.

    Raises:
        ValueError: if the weights' shapes differ.
    """

    def __init__(self, weights: Sequence[LinearWeight]) -> None:
        self.rows, self.columns = weights[0].rows, weights[0].columns
        self._native, self._precision = stacked([each.made for each in weights])
        self.nbytes = self._native.nbytes

    def multiply(self, x: Tensor, sizes: Tensor, is_exact: bool = False) -> Tensor:
        """Return each row of x times its expert's matrix, [n, rows].

        x is sorted by expert; `sizes` [num_experts] is the number of rows of each.

        Raises:
            ValueError: if x has another number of columns, or the sizes do not add up.
        """
        _check_columns(x, self.columns)
        out = torch.empty(x.shape[0], -(-self.rows // 32) * 32, dtype=torch.float32)
        precision = "float32" if is_exact else self._precision
        _C.rows_by_expert(self._native, sizes.to(torch.int32).numpy(), _array(x), out.numpy(), precision)
        return out if out.shape[1] == self.rows else out[:, : self.rows]


def _product(
    made: PackedLinear,
    num_rows: int,
    x: Tensor,
    is_exact: bool,
    step: _C.FlatRows | None,
    adapters: AdapterLayout | None,
) -> Tensor:
    out = torch.empty(x.shape[0], made.matrix.num_stored_rows, dtype=torch.float32)
    precision = "float32" if is_exact else made.precision
    changed = _changed(made, step, adapters)
    _C.linear_rows(made.matrix, made.bias, _array(x), out.numpy(), precision, *changed)
    return out if out.shape[1] == num_rows else out[:, :num_rows]


def _changed(
    part: PackedLinear, step: _C.FlatRows | None, adapters: AdapterLayout | None
) -> tuple[_C.FlatRows | None, int]:
    """Return the extension's adapter arguments: the step, and the index of this product in the layout."""
    number = None if step is None or adapters is None else adapters.product(part)
    return (None, 0) if number is None else (step, number)


def embed(weight: LinearWeight, ids: Tensor, factor: float = 1.0) -> Tensor:
    """Return factor * W[ids], [n, columns] float32, of ids [n].

    Raises:
        ValueError: if an id is not in the table.
    """
    made: PackedLinear = weight.made
    columns = -(-weight.columns // 32) * 32
    out = torch.empty(ids.shape[0], columns, dtype=torch.float32)
    narrow = ids.clamp(-1, _MAX_ID).to(torch.int32)  # clamped, as int32 would wrap 2^32 + 1 around to 1
    _C.embed_rows(made.matrix, narrow.contiguous().numpy(), factor, out.numpy())
    return out if columns == weight.columns else out[:, : weight.columns]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, [n, columns] float32.

    Raises:
        ValueError: if the weight does not have one element per column of x.
        TypeError: if one of them is not float32.
    """
    out = torch.empty(x.shape, dtype=torch.float32)
    _C.norm_rows(_array(x), weight.numpy(), eps, out.numpy())
    return out


def _check_columns(x: Tensor, columns: int) -> None:
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"`x` must be [n, {columns}], got {tuple(x.shape)}")


def _array(x: Tensor) -> _C.FloatArray:
    return (x if x.stride(-1) == 1 else x.contiguous()).numpy()
