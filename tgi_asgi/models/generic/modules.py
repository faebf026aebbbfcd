"""Native modules that replace a model's own: products and embeddings on packed weights, norms, activations.

Each accepts float32 tensors with any leading dimensions, and computes a row's bits independently of the other
rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.models.generic.backend import Backend
from tgi_asgi.ops import AdapterLayout, FlatRows, GateUpWeight, LinearWeight, NormWeight, direct


@dataclass(slots=True)
class Mode:
    """How a model's products currently compute; all its modules share one instance.

    Attributes:
        backend: The device that computes them.
        is_packed_exactly: Whether weights are packed for exact products.
        is_exact: Whether activations stay float32, as in the self-check at load.
        step: The step whose tokens are computed, for its adapters; None outside a step.
    """

    backend: Backend
    is_packed_exactly: bool = False
    is_exact: bool = False
    step: FlatRows | None = None

    @property
    def keeps_floats(self) -> bool:
        """Whether what is multiplied stays float32."""
        return self.is_exact or self.is_packed_exactly

    @contextlib.contextmanager
    def exactly(self) -> Iterator[None]:
        """Let activations stay float32 in the body."""
        self.is_exact = True
        try:
            yield
        finally:
            self.is_exact = False


class PackedModule(nn.Module):
    """A module whose weight is packed.

    `weight` has the dtype, device and shape that other code may ask for, but its values are NaN.

    Attributes:
        made: The packed weight, once loaded.
    """

    def __init__(self, rows: int, columns: int, *, has_bias: bool, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.made: LinearWeight | None = None
        nothing = torch.full((1,), torch.nan, device=mode.backend.device)
        self.weight = nn.Parameter(nothing.expand(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(nothing.expand(rows), requires_grad=False) if has_bias else None

    @property
    def packed(self) -> LinearWeight:
        """The packed weight.

        Raises:
            RuntimeError: if it has not been loaded.
        """
        if self.made is None:
            raise RuntimeError("the weight has not been loaded")
        return self.made


class Linear(PackedModule):
    """Replaces `nn.Linear` and GPT-2's `Conv1D`."""

    def __init__(self, rows: int, columns: int, *, has_bias: bool, mode: Mode) -> None:
        super().__init__(rows, columns, has_bias=has_bias, mode=mode)
        self.in_features, self.out_features = columns, rows
        self.adapters: AdapterLayout | None = None  # adapters that may change it

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ W.T (+ bias)`."""
        rows = x.reshape(-1, self.in_features)
        kernels, mode = self.mode.backend.kernels, self.mode
        rows = kernels.linear(self.packed, rows, mode.is_exact, mode.step, self.adapters)
        # Rows that are padded to whole tiles are not contiguous, and other code may call `view`.
        return rows.contiguous().view(*x.shape[:-1], self.out_features)


class GatedMlp(nn.Module):
    """`down(f(gate(x)) * up(x))`, with gate and up as one product."""

    def __init__(self, activation: str, mode: Mode) -> None:
        super().__init__()
        self.activation, self.mode = activation, mode
        self.gate_up: GateUpWeight | None = None
        self.down: LinearWeight | None = None
        self.adapters: AdapterLayout | None = None  # adapters that may change it

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output."""
        assert self.gate_up is not None and self.down is not None
        mode, kernels, rows = self.mode, self.mode.backend.kernels, x.reshape(-1, x.shape[-1])
        rows = kernels.gate_up(self.gate_up, rows, self.activation, mode.is_exact, mode.step, self.adapters)
        rows = kernels.linear(self.down, rows, mode.is_exact, mode.step, self.adapters)
        return rows.reshape(*x.shape[:-1], -1)  # Idefics 2 has one with other columns than its input's


class Embedding(PackedModule):
    """Replaces `nn.Embedding` and subclasses that multiply its rows by a constant."""

    def __init__(self, rows: int, columns: int, *, factor: float, mode: Mode) -> None:
        super().__init__(rows, columns, has_bias=False, mode=mode)
        self.num_embeddings, self.embedding_dim, self.factor = rows, columns, factor

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids."""
        rows = self.mode.backend.kernels.embed(self.packed, ids.reshape(-1), self.factor)
        return rows.reshape(*ids.shape, self.embedding_dim)


class Norm(nn.Module):
    """An RMSNorm or a LayerNorm over the last dimension."""

    def __init__(self, made: NormWeight) -> None:
        super().__init__()
        self.made = made
        # Other code may read both.
        self.weight = nn.Parameter(torch.from_numpy(made.weight), requires_grad=False)
        bias = None if made.bias is None else torch.from_numpy(made.bias)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of each row."""
        return direct.norm(x.reshape(-1, x.shape[-1]), self.made).view(x.shape)


class Activation(nn.Module):
    """A function of each number, one of `ops.GATED_ACTIVATIONS`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        if x.dim() > 1 and x.stride(-2) == 1 < x.stride(-1):  # a transposed tensor stays one, as in torch
            return self.forward(x.transpose(-2, -1)).transpose(-2, -1)
        return direct.activate(x.reshape(-1, x.shape[-1]), self.name).view(x.shape)


class Head(nn.Module):
    """Wraps the head, which computes only the requested rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rows: Tensor | None = None  # indices of the requested tokens; None: all

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the requested rows."""
        logits: Tensor = self.inner(x if self.rows is None else x[:, self.rows])
        return logits

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)  # `weight`, `bias`, `out_features`
