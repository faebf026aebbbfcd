"""Native computation of experts in `transformers` modules that use its `ExpertsInterface`.

The code between a module's products is probed, not guessed. If `ops.experts_add` computes the same on random
rows, a layer is one call. Otherwise each product is one call, with the module's own code in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.models.generic.modules import Mode
from tgi_asgi.ops import direct
from tgi_asgi.ops.tensors import from_tensor, plain_tensor

LEAVES = ("gate_up_proj", "up_proj", "down_proj")
_LIMITS = ("limit", "swiglu_limit")
_SLOPES = ("alpha", "swiglu_alpha")


class Experts(Protocol):
    """The packed experts of a layer."""

    @property
    def nbytes(self) -> int:
        """Bytes of their matrices."""

    def forward(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, added in ascending order of experts.

        hidden: [n_tokens, hidden]; index, weights: [n_tokens, k].
        """


@dataclass(frozen=True, slots=True)
class Gate:
    """How gates are combined with ups, in the terms of `ops.experts_add`."""

    activation: str = "silu"
    clamped: ops.ClampedGate | None = None
    is_interleaved: bool = False  # gate and up rows alternate, gates first

    def halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates and the ups of rows [..., 2 * size]."""
        if self.is_interleaved:
            return rows[..., ::2], rows[..., 1::2]
        first, second = rows.chunk(2, dim=-1)
        return first, second

    def apply(self, rows: Tensor) -> Tensor:
        """Return, computed with torch, the kernels' result for rows [n, 2 * size]."""
        gate, up = self.halves(rows)
        return direct.gated(gate, up, self.activation, self.clamped)


class GatedExperts:
    """Experts whose gates the kernels support."""

    def __init__(
        self, gate: Gate, gate_up: list[ops.GateUpWeight], down: list[ops.LinearWeight], how: _How
    ) -> None:
        self._gate, self._mode = gate, how.mode
        self._weight = ops.experts_weight(zip(gate_up, down, strict=True), how.arithmetic)

    @property
    def nbytes(self) -> int:
        """Bytes of their matrices."""
        made = self._weight.made
        return sum(stack.nbytes for stack in (*made.gate_up, made.down))

    def forward(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' sum; see `Experts.forward`."""
        gate = self._gate
        return self._mode.backend.kernels.experts(
            self._weight, hidden, index, weights, gate.activation, gate.clamped, self._mode.is_exact
        )


class OtherExperts:
    """Experts whose own code runs between the products."""

    def __init__(self, up: list[ops.LinearWeight], down: list[ops.LinearWeight], how: _How) -> None:
        self._num_experts, self._mode = len(up), how.mode
        kernels = how.mode.backend.kernels
        self._up, self._down = kernels.stack(up), kernels.stack(down)

    @property
    def nbytes(self) -> int:
        """Bytes of their matrices."""
        return self._up.nbytes + self._down.nbytes

    def forward(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' sum; see `Experts.forward`."""
        order, tokens, sizes = direct.by_expert(index, self._num_experts)
        is_exact = self._mode.is_exact
        rows = self._up.multiply(hidden[tokens], sizes, is_exact)
        rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        rows = self._down.multiply(rows, sizes, is_exact)
        if getattr(module, "has_post_expert_norm", False):
            rows = module.post_expert_norm(rows)
        return torch.zeros_like(hidden).index_add_(0, tokens, rows * weights.flatten()[order, None])


@dataclass(frozen=True, slots=True)
class _How:
    """How experts are packed and computed."""

    arithmetic: ops.Arithmetic
    mode: Mode


class ExpertsLoader:
    """Packs a module's experts as their tensors arrive; they become the module's `tgi_experts`."""

    def __init__(self, module: Any, arithmetic: ops.Arithmetic, mode: Mode) -> None:
        self._module, self._how = module, _How(arithmetic.for_experts(), mode)
        self._gate = gate_of(module)
        self._waiting: dict[str, dict[str, Any]] = {}  # by product: the weight and bias received so far
        self._packed: dict[str, list[Any]] = {}

    def place(self, leaf: str, value: ops.WeightSource | Tensor | Iterator[ops.WeightSource]) -> bool:
        """Accept a tensor; return False if it is not of the experts, or comes in an unknown order."""
        name = leaf.removesuffix("_bias")
        module = self._module
        if name not in LEAVES or (isinstance(value, Iterator) and module.is_transposed):
            return False
        shape = getattr(module, leaf).shape
        waiting = self._waiting.setdefault(name, {})
        waiting["bias" if leaf.endswith("_bias") else "weight"] = (
            value if isinstance(value, Iterator) else tensor_of(value).reshape(shape)
        )
        if module.has_bias and len(waiting) < 2:
            return True
        pack = self._pack_down if name == "down_proj" else self._pack_up
        biases = waiting.get("bias", [None] * shape[0])
        matrices = zip(waiting["weight"], biases, strict=True)
        self._packed[name] = [pack(self._source(weight), bias) for weight, bias in matrices]
        module._parameters[name] = None  # any code that reads it fails loudly
        waiting.clear()
        if len(self._packed) == 2:
            self._finish()
        return True

    def _finish(self) -> None:
        down = self._packed.pop("down_proj")
        (up,) = self._packed.values()
        made: Experts = (
            OtherExperts(up, down, self._how)
            if self._gate is None
            else GatedExperts(self._gate, up, down, self._how)
        )
        self._module.__dict__["tgi_experts"] = made

    def _source(self, weight: Any) -> ops.WeightSource:
        if isinstance(weight, ops.WeightSource):
            return weight
        return from_tensor((weight.T if self._module.is_transposed else weight).contiguous())

    def _pack_down(self, source: ops.WeightSource, bias: Tensor | None) -> ops.LinearWeight:
        vector = None if bias is None else from_tensor(bias.contiguous())
        return ops.linear_weight(source, self._how.arithmetic, bias=vector)

    def _pack_up(self, source: ops.WeightSource, bias: Tensor | None) -> ops.GateUpWeight | ops.LinearWeight:
        if self._gate is None:
            return self._pack_down(source, bias)
        rows = source.shape[0]
        if self._gate.is_interleaved:
            matrix = plain_tensor(source.in_order())
            gate, up = (from_tensor(matrix[which::2].contiguous()) for which in (0, 1))
        else:
            gate, up = source.rows(0, rows // 2), source.rows(rows // 2, rows)
        biases = None
        if bias is not None:
            biases = [from_tensor(half.contiguous()) for half in self._gate.halves(bias)]
        return ops.gate_up_weight(gate, up, self._how.arithmetic, biases=biases)


def gate_of(module: Any) -> Gate | None:
    """Probe how a module of experts combines gates and ups; return None if the kernels do not support it."""
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 48, generator=generator) * 8  # exceeds any limit
    try:
        with torch.no_grad():
            found = module._apply_gate(rows)
    except Exception:  # the class requires other sizes
        return None
    for gate in _candidates(module):
        made = gate.apply(rows)
        if isinstance(found, Tensor) and found.shape == made.shape and torch.allclose(found, made, atol=1e-4):
            return gate
    return None


def _candidates(module: nn.Module) -> Iterator[Gate]:
    numbers = {name: getattr(module, name, None) for name in (*_LIMITS, *_SLOPES)}
    known = {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}
    for is_interleaved in (False, True):
        for activation in ops.GATED_ACTIVATIONS:
            yield Gate(activation, is_interleaved=is_interleaved)
        for limit in (known[name] for name in _LIMITS if name in known):
            for slope in (1.0, *(known[name] for name in _SLOPES if name in known)):
                for offset in (0.0, 1.0):
                    yield Gate("silu", ops.ClampedGate(limit, slope, offset), is_interleaved)


def is_experts(module: Any) -> bool:
    """Return whether a module holds the experts of a layer."""
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and hasattr(module, "down_proj")
        and isinstance(module.down_proj, nn.Parameter)
        and module.down_proj.dim() == 3
    )


def tensor_of(value: ops.WeightSource | Tensor) -> Tensor:
    """Return a weight as floats, in its own order of columns."""
    return value if isinstance(value, Tensor) else plain_tensor(value.in_order())
