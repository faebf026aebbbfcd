"""Modules of ours that take the place of a model's: products, embeddings and norms on packed weights.

Each takes tensors of any leading dimensions, float32, and gives a row the same bits whatever rows are
beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.ops import AdapterLayout, FlatRows, GateUpWeight, LinearWeight, direct


@dataclass(slots=True)
class Precision:
    """How a model's products compute now; all its modules share one.

    Attributes:
        is_exact: activations stay float32: how a model is checked when it is loaded.
        step: whose tokens they compute, and the adapters that these have; None: there are none.
    """

    is_exact: bool = False
    step: FlatRows | None = None


class PackedModule(nn.Module):
    """A module whose weight is packed. Others may ask a weight's type, device or shape; its values are NaN.

    Attributes:
        made: the packed weight, once there is one.
    """

    def __init__(self, rows: int, columns: int, *, has_bias: bool, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.made: LinearWeight | None = None
        nothing = torch.full((1,), torch.nan)
        self.weight = nn.Parameter(nothing.expand(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(nothing.expand(rows), requires_grad=False) if has_bias else None

    @property
    def packed(self) -> LinearWeight:
        """The packed weight."""
        if self.made is None:
            raise RuntimeError("the weight has not been loaded")
        return self.made


class Linear(PackedModule):
    """`nn.Linear`, and GPT-2's `Conv1D`."""

    def __init__(self, rows: int, columns: int, *, has_bias: bool, precision: Precision) -> None:
        super().__init__(rows, columns, has_bias=has_bias, precision=precision)
        self.in_features, self.out_features = columns, rows
        self.adapters: AdapterLayout | None = None  # which may change it

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ W.T (+ bias)`."""
        rows = x.reshape(-1, self.in_features)
        rows = direct.linear(self.packed, rows, self.precision.is_exact, self.precision.step, self.adapters)
        return rows.reshape(*x.shape[:-1], self.out_features)


class GatedMlp(nn.Module):
    """`down(f(gate(x)) * up(x))`, of which gate and up are one product."""

    def __init__(self, activation: str, precision: Precision) -> None:
        super().__init__()
        self.activation, self.precision = activation, precision
        self.gate_up: GateUpWeight | None = None
        self.down: LinearWeight | None = None
        self.adapters: AdapterLayout | None = None  # which may change it

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's rows."""
        assert self.gate_up is not None and self.down is not None
        how, rows = self.precision, x.reshape(-1, x.shape[-1])
        rows = direct.gate_up(self.gate_up, rows, self.activation, how.is_exact, how.step, self.adapters)
        return direct.linear(self.down, rows, how.is_exact, how.step, self.adapters).reshape(x.shape)


class Embedding(PackedModule):
    """`nn.Embedding`, and subclasses that multiply its rows by a number."""

    def __init__(self, rows: int, columns: int, *, factor: float, precision: Precision) -> None:
        super().__init__(rows, columns, has_bias=False, precision=precision)
        self.num_embeddings, self.embedding_dim, self.factor = rows, columns, factor

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids."""
        rows = direct.embed(self.packed, ids.reshape(-1), self.factor)
        return rows.reshape(*ids.shape, self.embedding_dim)


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        """Return `x / rms(x) * weight`."""
        rows = direct.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.variance_epsilon)
        return rows.view(x.shape)


class Head(nn.Module):
    """The head: of all rows that it is given it computes those that are asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rows: Tensor | None = None  # indices of tokens; None: all

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the rows that are asked for."""
        logits: Tensor = self.inner(x if self.rows is None else x[:, self.rows])
        return logits

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)  # `weight`, `bias`, `out_features`
