"""Launches of routed experts on a CUDA device. Nothing waits for the host, so graphs can capture them.

    route            router's logits      -> each token's experts and weights
    experts_plan     experts by token     -> tokens by expert, in tiles
    experts_gate_up  activations          -> f(gate) * up, a row per token and expert
    experts_down     those rows           -> a row per token and expert
    experts_sum      those rows, weights  -> added to the residual

Each product is one launch for all experts, whatever their number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.cuda_list import Input, LaunchList, tokens_of
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceExperts, DeviceMatrix
from tgi_asgi.ops.cuda_scratch import Scratch
from tgi_asgi.ops.cuda_weights import DeviceWeights
from tgi_asgi.ops.routing import RouteSpec

_MIN_TILE = 8  # tokens of the smallest tile of one expert's tokens
_MAX_EXPERTS = 1024  # kMaxExperts of csrc/cuda/kernels.h
_MAX_WEIGHTS = 1 << 29  # of an expert's gate and up: offsets in it have 32 bits


def has_kernels(num_experts: int, columns: int, intermediate_size: int) -> bool:
    """Return whether the kernels compute experts of these sizes."""
    is_small = num_experts <= _MAX_EXPERTS and 2 * columns * intermediate_size < _MAX_WEIGHTS
    return is_small and columns % 8 == 0 and intermediate_size % 8 == 0


def operands(matrix: Tensor | CudaQuantMatrix, bias: Tensor | None) -> tuple[object, ...]:
    """Return a product's weight, scales, offsets, bias, bits and zero point, as its kernels take them."""
    if isinstance(matrix, CudaQuantMatrix):
        return matrix.codes, matrix.scales, matrix.offsets, bias, matrix.bits, matrix.zero
    return matrix, None, None, bias, 16, 0


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of each token, and each expert's tokens: the buffers of a routing value."""

    ids: Tensor  # [max_tokens, top_k] int32, ascending; padding tokens have num_experts
    weights: Tensor  # [max_tokens, top_k] float32
    pairs: Tensor  # [max_tokens, top_k] int32
    tiles: Tensor  # [max_tiles + 1, 4] int32

    @classmethod
    def make(cls, max_tokens: int, top_k: int, num_experts: int, device: torch.device) -> Routing:
        """Allocate buffers for steps of at most `max_tokens`."""
        shape = (max_tokens, top_k)
        max_tiles = max_tokens * top_k // _MIN_TILE + num_experts
        return cls(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(max_tiles + 1, 4, dtype=torch.int32, device=device),
        )


class CudaExperts:
    """Appends the launches of a program's layers with experts.

    Args:
        is_streamed: Whether few and many tokens use one kernel, so that a token's results have the same bits
            whatever else is in the step. Weights are then read again for every 16 tokens of an expert.
    """

    def __init__(
        self,
        launches: LaunchList,
        scratch: Scratch,
        weights: DeviceWeights,
        max_tokens: int,
        *,
        is_streamed: bool,
    ) -> None:
        self._launches, self._scratch, self._weights = launches, scratch, weights
        self._max_tokens, self._is_streamed = max_tokens, is_streamed

    def route(self, logits: Tensor, spec: RouteSpec, routing: Routing) -> None:
        """Select experts by a router's logits [max_tokens, num_experts] float32, and sort tokens by expert.

        Padding, which has no slot in the cache, selects none: its experts would be read for nothing.
        """
        ids = tokens_of(routing.ids)
        self._launches.add(
            "tgi_cuda::route", tokens_of(logits), Input.SLOTS, self._weights.floats(spec.correction),
            spec.kind, spec.num_groups, spec.top_groups, spec.sums_top_two, spec.is_renormalised, spec.eps,
            spec.scale, spec.jitter, ids, tokens_of(routing.weights),
        )  # fmt: skip
        self._launches.add(
            "tgi_cuda::experts_plan", ids, spec.num_experts, self._is_streamed, tokens_of(routing.pairs),
            routing.tiles,
        )  # fmt: skip

    def add(self, call: calls.ExpertsAdd, a: Tensor, routing: Routing, x: Tensor, factor: float) -> None:
        """Add `factor` times the experts of activations a to x, both [max_tokens, columns], x in float32."""
        weight, made, clamped = call.weight, call.weight.made, call.clamped
        if not isinstance(made, DeviceExperts):
            raise TypeError("a CUDA step is recorded with a device's weights: make them with a `Repacking`")
        shape = (self._max_tokens, routing.ids.shape[1])
        inner = tokens_of(self._scratch.buffer("experts' inner rows", (*shape, weight.intermediate_size)))
        rows = tokens_of(self._scratch.buffer("experts' rows", (*shape, weight.columns)))
        plan = (weight.num_experts, tokens_of(routing.pairs), routing.tiles, self._is_streamed)
        gate = (0.0, 1.0, 0.0) if clamped is None else (clamped.limit, clamped.slope, clamped.offset)
        self._launches.add(
            "tgi_cuda::experts_gate_up", tokens_of(a), *self._matrix(made.gate_up), *plan, call.activation,
            *gate, inner,
        )  # fmt: skip
        self._launches.add("tgi_cuda::experts_down", inner, *self._matrix(made.down), *plan, rows)
        self._launches.add(
            "tgi_cuda::experts_sum", rows, tokens_of(routing.ids), tokens_of(routing.weights),
            weight.num_experts, factor, tokens_of(x),
        )  # fmt: skip

    def _matrix(self, made: DeviceMatrix) -> tuple[object, ...]:
        return operands(self._weights.matrix(made), self._weights.floats(made.bias))
