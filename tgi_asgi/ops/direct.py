"""Products, norms, activations and embeddings of torch tensors, for models that compute in torch.

A row has the same bits whatever else is in the tensor. The memory of activations is reused by all calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.adapters import AdapterLayout
from tgi_asgi.ops.layout import round_up
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.packing import PackedExperts, PackedGateUp, PackedLinear, stacked
from tgi_asgi.ops.routing import ClampedGate
from tgi_asgi.ops.tensors import float_array
from tgi_asgi.ops.weights import ExpertsWeight, GateUpWeight, LinearWeight

# The functions of `ops.GATED_ACTIVATIONS`.
ACTIVATION_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "relu_squared": lambda x: torch.nn.functional.relu(x).square(),
}
_RECYCLED_FLOATS = 1 << 14  # from this size on, malloc may return memory to the system in each step
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
        return ACTIVATION_FUNCTIONS[activation](gate) * up
    (part,) = made.parts
    x = _ordered(x, part)
    out = new_rows(x.shape[0], part.matrix.num_stored_rows // 2)
    precision = "float32" if is_exact else part.precision
    changed = _changed(part, step, adapters)
    _C.gate_up_rows(part.matrix, part.bias, float_array(x), out.numpy(), precision, activation, *changed)
    return without_padding(out, weight.intermediate_size)


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
    `ops.experts`.

    Raises:
        ValueError: if x has another number of columns, or an id is negative.
        TypeError: if x or weights are not float32.
    """
    made: PackedExperts = weight.made
    _check_columns(x, weight.columns)
    out = new_rows(x.shape[0], round_up(weight.columns))
    native = _C.ExpertMlps(
        gate_up=made.gate_up, down=made.down, activation=activation, is_gated=weight.is_gated,
        **({} if clamped is None else asdict(clamped)),
    )  # fmt: skip
    precisions = ("float32", "float32") if is_exact else (made.precision, made.inner_precision)
    narrow = ids.clamp(-1, _MAX_ID - 1).to(torch.int32).contiguous()
    _C.experts_rows(
        native, narrow.numpy(), weights.contiguous().numpy(), float_array(x), out.numpy(), *precisions
    )
    return without_padding(out, weight.columns)


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
        out = new_rows(x.shape[0], round_up(self.rows))
        precision = "float32" if is_exact else self._precision
        _C.rows_by_expert(self._native, sizes.to(torch.int32).numpy(), float_array(x), out.numpy(), precision)
        return without_padding(out, self.rows)


def gated(gate: Tensor, up: Tensor, activation: str, clamped: ClampedGate | None) -> Tensor:
    """Return activated gates times ups [n, size], computed by torch as the kernels do."""
    if clamped is None:
        return ACTIVATION_FUNCTIONS[activation](gate) * up
    gate, up = gate.clamp(max=clamped.limit), up.clamp(-clamped.limit, clamped.limit)
    return gate * torch.sigmoid(clamped.slope * gate) * (up + clamped.offset)


def by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pairs of a token and an expert, ids [n, k], by expert; other ids select no expert.

    Returns the pairs' indices in `ids.flatten()`, the pairs' tokens, and the number of each expert's pairs.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    order = order[flat[order] < num_experts]
    return order, order // ids.shape[1], flat[order].bincount(minlength=num_experts)


def stack(weights: Sequence[LinearWeight]) -> LinearStack:
    """Return a product per expert; see `LinearStack`."""
    return LinearStack(weights)


def _product(
    made: PackedLinear,
    num_rows: int,
    x: Tensor,
    is_exact: bool,
    step: _C.FlatRows | None,
    adapters: AdapterLayout | None,
) -> Tensor:
    x = _ordered(x, made)
    out = new_rows(x.shape[0], made.matrix.num_stored_rows)
    precision = "float32" if is_exact else made.precision
    changed = _changed(made, step, adapters)
    _C.linear_rows(made.matrix, made.bias, float_array(x), out.numpy(), precision, *changed)
    return without_padding(out, num_rows)


def _ordered(x: Tensor, part: PackedLinear) -> Tensor:
    """Return x with its columns in the order of the matrix's."""
    return x if part.order is None else x.index_select(1, torch.from_numpy(part.order.indices.copy()))


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
    out = new_rows(ids.shape[0], round_up(weight.columns))
    narrow = ids.clamp(-1, _MAX_ID).to(torch.int32)  # clamped, as int32 would wrap 2^32 + 1 around to 1
    _C.embed_rows(made.matrix, narrow.contiguous().numpy(), factor, out.numpy())
    return without_padding(out, weight.columns)


def norm(x: Tensor, weight: NormWeight) -> Tensor:
    """Return the norm of each row of x, [n, columns] float32.

    Raises:
        ValueError: if the weight does not have one element per column of x.
        TypeError: if one of them is not float32.
    """
    out = new_rows(*x.shape)
    _C.norm_rows(float_array(x), weight.weight, weight.bias, weight.eps, out.numpy())
    return out


def activate(x: Tensor, activation: str) -> Tensor:
    """Return f(x), [n, columns] float32, for an activation of `ACTIVATION_FUNCTIONS`.

    Raises:
        ValueError: if there is no such activation.
        TypeError: if x is not float32.
    """
    out = new_rows(*x.shape)
    _C.activate_rows(float_array(x), activation, out.numpy())
    return out


def new_rows(num_rows: int, columns: int) -> Tensor:
    """Return rows [num_rows, columns] float32 with arbitrary values."""
    if num_rows * columns < _RECYCLED_FLOATS:
        return torch.empty(num_rows, columns, dtype=torch.float32)
    return torch.from_numpy(_C.new_rows(num_rows, columns))


def without_padding(rows: Tensor, columns: int) -> Tensor:
    """Return the first columns of rows [n, padded columns]: a view, or `rows` itself if these are all."""
    return rows if rows.shape[1] == columns else rows[:, :columns]


def _check_columns(x: Tensor, columns: int) -> None:
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"`x` must be [n, {columns}], got {tuple(x.shape)}")
