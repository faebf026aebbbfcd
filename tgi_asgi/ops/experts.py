"""The operators `route`, `experts_add` and `gated_add`: mixture-of-experts layers.

    rows = ops.linear(a, w.router)                                # the router's logits
    routing = ops.route(rows, RouteSpec(num_experts=64, top_k=8))
    x = ops.experts_add(a, routing, w.experts, x)

Source: Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, arXiv
1701.06538.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tgi_asgi import _C
from tgi_asgi.ops import calls
from tgi_asgi.ops.activation_names import GATED_ACTIVATIONS
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.values import Kind, Value, recorder_of
from tgi_asgi.ops.weights import ExpertsWeight


@dataclass(frozen=True, eq=False, slots=True)
class RouteSpec:
    """How a token's experts are chosen and weighted.

        RouteSpec(64, 8)                                             # softmax, the eight best (OLMoE)
        RouteSpec(128, 8, "sigmoid", correction=bias, eps=1e-20, is_renormalised=True, scale=2.5)  # GLM 4.5

    If scores are equal, the expert with the lower index is chosen.

    Attributes:
        num_experts, top_k: Number of experts of the layer, and of a token.
        kind: Function from logits to scores: `softmax`, `sigmoid`, or `sparsemixer`, the softmax over the
            experts not yet chosen whose logits are near the best one's (Phi 3.5 MoE; Liu et al., arXiv
            2409.12136).
        correction: float32 [num_experts], added to the scores for the selection, not to the weights (Wang et
            al., Auxiliary-Loss-Free Load Balancing, arXiv 2408.15664).
        num_groups: Number of groups of consecutive experts; experts are chosen only from the best
            `top_groups` (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
        sums_top_two: Whether a group's score is the sum of its two best experts' scores, not its best
            expert's score.
        is_renormalised: Whether a token's weights are divided by their sum plus `eps`.
        scale: Factor on the weights, applied after renormalisation.
        jitter: For `sparsemixer`: logits count as near if their relative distance is at most twice this.

    Raises:
        ValueError: if a number is out of range, or groups do not divide the experts.
        TypeError: if `correction` is not float32.
    """

    num_experts: int
    top_k: int
    kind: str = "softmax"
    correction: Floats | None = None
    num_groups: int = 1
    top_groups: int = 1
    sums_top_two: bool = False
    is_renormalised: bool = False
    eps: float = 0.0
    scale: float = 1.0
    jitter: float = 0.01
    native: _C.RouteSpec = field(init=False, repr=False)

    def __post_init__(self) -> None:
        native = _C.RouteSpec(
            num_experts=self.num_experts, top_k=self.top_k, kind=self.kind, correction=self.correction,
            num_groups=self.num_groups, top_groups=self.top_groups, sums_top_two=self.sums_top_two,
            is_renormalised=self.is_renormalised, eps=self.eps, scale=self.scale, jitter=self.jitter,
        )  # fmt: skip
        object.__setattr__(self, "native", native)


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """A silu-like gate on clamped values: g * sigmoid(slope * g) * (up + offset), with g = min(gate, limit).

    `up` is clamped on both sides. gpt-oss has 7, 1.702 and 1 (its model card, arXiv 2508.10925).
    """

    limit: float
    slope: float = 1.0
    offset: float = 0.0


def route(logits: Value, spec: RouteSpec) -> Value:
    """Return each token's routing to experts, from a router's logits [n_tokens, num_experts]."""
    recorder = recorder_of("route", logits=(logits, Kind.ROWS, spec.num_experts))
    return recorder.note(calls.Route(recorder.value(Kind.ROUTING, spec.num_experts), logits, spec))


def experts_add(
    a: Value,
    routing: Value,
    weight: ExpertsWeight,
    x: Value,
    activation: str = "silu",
    clamped: ClampedGate | None = None,
    factor: float = 1.0,
) -> Value:
    """Add `factor` times the weighted sum of the outputs of each token's experts to x; return x.

    An expert is f(a @ gate.T) * (a @ up.T) @ down.T, with biases if it has them. A token's experts are added
    in ascending order, so its bits do not depend on the step.

    Args:
        a: Activation [n_tokens, columns].
        routing: Result of `route`.
        x: Residual [n_tokens, columns], added to in place.
        clamped: Bounds on gates and ups; requires silu.

    Raises:
        ValueError: if `activation` is not one of `GATED_ACTIVATIONS`, or not silu although gates are clamped.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(GATED_ACTIVATIONS)}, got {activation}")
    if clamped is not None and activation != "silu":
        raise ValueError(f"only silu's gates are clamped, not {activation}'s")
    recorder = recorder_of(
        "experts_add", a=(a, Kind.ACTIVATION, weight.columns),
        routing=(routing, Kind.ROUTING, weight.num_experts), x=(x, Kind.RESIDUAL, weight.columns),
    )  # fmt: skip
    added = recorder.added(x)
    return recorder.note(calls.ExpertsAdd(added, a, routing, weight, x, activation, clamped, factor))


def gated_add(rows: Value, gate: Value, x: Value, factor: float = 1.0) -> Value:
    """Add `factor * sigmoid(gate) * rows` to the residual x in place, and return it.

    rows: [n_tokens, hidden]; gate: rows [n_tokens, 1]. This adds a shared expert, which all tokens use,
    weighted by each token's gate.

    Raises:
        ValueError: if `rows` and `x` have different numbers of columns.
    """
    recorder = recorder_of(
        "gated_add", rows=(rows, Kind.ROWS, None), gate=(gate, Kind.ROWS, 1), x=(x, Kind.RESIDUAL, None)
    )
    if rows.columns != x.columns:
        raise ValueError(f"`gated_add` takes rows with the {x.columns} columns of `x`, not {rows.columns}")
    return recorder.note(calls.GatedAdd(recorder.added(x), rows, gate, x, factor))
