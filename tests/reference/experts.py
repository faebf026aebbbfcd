"""Float64 reference for routed experts, token by token: slow and plain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.layers import activate, double, linear
from tgi_asgi.ops import ClampedGate, RouteSpec


@dataclass(frozen=True)
class Mlp:
    """One expert's matrices and their biases."""

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: Sequence[Tensor | None] = (None, None, None)


def route(logits: Tensor, spec: RouteSpec) -> Tensor:
    """Return each expert's weight for each token, [n_tokens, num_experts]: 0 if it is not chosen."""
    out = torch.zeros(len(logits), spec.num_experts, dtype=torch.float64)
    for row, weights in zip(logits.double(), out, strict=True):
        if spec.kind == "sparsemixer":
            _mix(row, weights, spec)
        else:
            _choose(row, weights, spec)
    return out if spec.expert_scales is None else out * double(spec.expert_scales)


def _choose(row: Tensor, weights: Tensor, spec: RouteSpec) -> None:
    scores = row.softmax(0) if spec.kind == "softmax" else row.sigmoid()
    keys = scores.clone() if spec.correction is None else scores + double(spec.correction)
    groups = keys.view(spec.num_groups, -1)
    best = groups.topk(2 if spec.sums_top_two and groups.shape[1] > 1 else 1).values.sum(1)
    kept = best.topk(spec.top_groups).indices
    allowed = torch.zeros_like(groups, dtype=torch.bool).index_fill_(0, kept, value=True).view(-1)
    ids = keys.masked_fill(~allowed, -torch.inf).topk(spec.top_k).indices
    found = scores[ids]
    if spec.is_renormalised:
        found = found / (found.sum() + spec.eps)
    weights[ids] = found * spec.scale


def _mix(row: Tensor, weights: Tensor, spec: RouteSpec) -> None:
    left = row.clone()
    for _ in range(spec.top_k):
        top, index = left.max(0)
        distance = (top - row) / row.abs().clamp(min=top)
        near = left.masked_fill(distance > 2 * spec.jitter, -torch.inf)
        weights[index] = near.softmax(0)[index] * spec.scale
        left[index] = -torch.inf


def gate(x: Tensor, up: Tensor, activation: str, clamped: ClampedGate | None) -> Tensor:
    """Return the activated gate times up, optionally clamped."""
    if clamped is None:
        return activate(x, activation) * up
    x = x.clamp(max=clamped.limit)
    up = up.clamp(-clamped.limit, clamped.limit)
    return x * torch.sigmoid(clamped.slope * x) * (up + clamped.offset)


def experts(
    a: Tensor,
    weights: Tensor,
    mlps: Sequence[Mlp],
    activation: str = "silu",
    clamped: ClampedGate | None = None,
    round_inner: Callable[[Tensor], Tensor] = Tensor.double,
) -> Tensor:
    """Return the sum of each token's experts, weighted by weights [n_tokens, num_experts].

    `round_inner` rounds the input of `down`.
    """
    out = torch.zeros(len(a), mlps[0].down.shape[0], dtype=torch.float64)
    for mlp, share in zip(mlps, weights.T, strict=True):
        of_gate, of_up, of_down = mlp.biases
        inner = gate(linear(a, mlp.gate, of_gate), linear(a, mlp.up, of_up), activation, clamped)
        out += share[:, None] * linear(round_inner(inner), mlp.down, of_down)
    return out
