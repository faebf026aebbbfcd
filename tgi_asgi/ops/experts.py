"""The operators `route`, `experts`, `experts_add` and `gated_add`: mixture-of-experts layers.

    rows = ops.linear(a, w.router)                                # the router's logits
    routing = ops.route(rows, RouteSpec(num_experts=64, top_k=8))
    x = ops.experts_add(a, routing, w.experts, x)

Source: Shazeer et al., Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer, arXiv
1701.06538.
"""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.activation_names import GATED_ACTIVATIONS
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.routing import ClampedGate, RouteSpec
from tgi_asgi.ops.weights import ExpertsWeight


def route(logits: Value, spec: RouteSpec) -> Value:
    """Return each token's routing to experts, from a router's logits [n_tokens, num_experts]."""
    recorder = recorder_of("route", logits=(logits, Kind.ROWS, spec.num_experts))
    return recorder.note(calls.Route(recorder.value(Kind.ROUTING, spec.num_experts), logits, spec))


def experts(
    a: Value,
    routing: Value,
    weight: ExpertsWeight,
    activation: str = "silu",
    clamped: ClampedGate | None = None,
) -> Value:
    """Return the weighted sum of the outputs of each token's experts, rows [n_tokens, columns]. CPUs only.

    It is what `experts_add` adds to a residual, for models that norm the sum first.

    Args:
        a: Activation [n_tokens, columns].
        routing: Result of `route`.
        clamped: Bounds on gates and ups; requires silu.

    Raises:
        ValueError: if `activation` is not one of `GATED_ACTIVATIONS`, or other gates than silu's are clamped.
    """
    _check_gates(weight, activation, clamped)
    recorder = recorder_of(
        "experts", a=(a, Kind.ACTIVATION, weight.columns),
        routing=(routing, Kind.ROUTING, weight.num_experts),
    )  # fmt: skip
    out = recorder.value(Kind.ROWS, weight.columns)
    return recorder.note(calls.Experts(out, a, routing, weight, activation, clamped))


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

    An expert is f(a @ gate.T) * (a @ up.T) @ down.T, or f(a @ up.T) @ down.T, with biases if it has them. A
    token's experts are added in ascending order, so its bits do not depend on the step.

    Args:
        a: Activation [n_tokens, columns].
        routing: Result of `route`.
        x: Residual [n_tokens, columns], added to in place.
        clamped: Bounds on gates and ups; requires silu.

    Raises:
        ValueError: if `activation` is not one of `GATED_ACTIVATIONS`, or other gates than silu's are clamped.
    """
    _check_gates(weight, activation, clamped)
    recorder = recorder_of(
        "experts_add", a=(a, Kind.ACTIVATION, weight.columns),
        routing=(routing, Kind.ROUTING, weight.num_experts), x=(x, Kind.RESIDUAL, weight.columns),
    )  # fmt: skip
    added = recorder.added(x)
    return recorder.note(calls.ExpertsAdd(added, a, routing, weight, x, activation, clamped, factor))


def _check_gates(weight: ExpertsWeight, activation: str, clamped: ClampedGate | None) -> None:
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(GATED_ACTIVATIONS)}, got {activation}")
    if clamped is not None and not weight.is_gated:
        raise ValueError("`clamped` bounds gates, which these experts lack")
    if clamped is not None and activation != "silu":
        raise ValueError(f"only silu's gates are clamped, not {activation}'s")


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
