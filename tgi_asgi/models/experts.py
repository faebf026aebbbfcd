"""The experts of a layer: their weights under any file's names, and what they add to the residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tgi_asgi import ops
from tgi_asgi.models import cutting
from tgi_asgi.models.layer_spec import ExpertsSpec
from tgi_asgi.models.layer_tensors import LayerTensors


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Tensor names of a layer's experts, relative to `model.layers.N.`.

    Attributes:
        corrections: Candidate names; the first that exists is used. A vector, or with `is_correction_row` a
            matrix of one row.
        experts, gate, up, down: A single expert's tensor is `experts.5.gate_proj.weight`; llama.cpp stores
            all of a kind in one tensor, `experts.gate_proj.weight` [experts, rows, columns]. Tools that
            quantise write the default names of gate, up and down, whatever the family's are.
        joined, joined_down: Joined tensors of `transformers` 5: all experts' gates and ups, and their downs.
        is_joined: Whether the publisher's files have these; only tools write each expert's tensors then.
        shared: The MLP that all tokens use; its products are named as in any MLP.
        shared_joined: Its gate and up in one tensor; None: never joined.
        scales: A vector of factors on the experts' weights.
        latent_in, latent_out: The products that lead to the experts' inputs and back from their results.
    """

    router: str = "mlp.gate"
    corrections: tuple[str, ...] = ("mlp.gate.e_score_correction_bias",)
    is_correction_row: bool = False
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    joined: str = "mlp.experts.gate_up_proj"
    joined_down: str = "mlp.experts.down_proj"
    is_joined: bool = False
    shared: str = "mlp.shared_experts"
    shared_joined: str | None = None
    shared_down: str = "down_proj"
    scales: str = ""
    latent_in: str = ""
    latent_out: str = ""


GGUF_CORRECTION = "mlp.correction.bias"  # canonical-style name for llama.cpp's `exp_probs_b`
_DOWN = "down_proj"
Matrices = tuple[ops.WeightSource, ...]  # gate, if there are any, up and down
ExpertProducts = tuple[ops.GateUpWeight | ops.LinearWeight, ops.LinearWeight]


class Experts:
    """A layer's experts, its router and its shared MLP, if it has one.

    Args:
        products: Gate and up, and down, of each expert in turn.
    """

    def __init__(
        self,
        weights: LayerTensors,
        names: ExpertNames,
        spec: ExpertsSpec,
        products: Iterator[ExpertProducts],
    ) -> None:
        config = weights.config
        hidden, self._activation = config.hidden_size, config.activation
        router = weights.get(f"{names.router}.weight", spec.num_experts, hidden)
        bias = weights.get(f"{names.router}.bias", spec.num_experts) if spec.has_bias else None
        self._router = ops.router_weight(router, weights.arithmetic, bias=bias)
        self._route = _route_of(spec, weights, names)
        self._clamped = None if spec.clamp is None else ops.ClampedGate(*spec.clamp)
        self._weight = ops.experts_weight(products, weights.arithmetic, is_partial=config.cut is not None)
        self._shared: ExpertProducts | None = None
        self._shared_gate: ops.LinearWeight | None = None
        self._latent: tuple[ops.LinearWeight, ops.LinearWeight] | None = None
        if latent := spec.latent_size:
            self._latent = (
                weights.linear(names.latent_in, latent, hidden, has_bias=False),
                weights.linear(names.latent_out, hidden, latent, has_bias=False),
            )
        if spec.shared_size:
            self._shared = _shared_of(weights, names, spec)
        if spec.has_shared_gate:
            self._shared_gate = _gate_of(weights, hidden)

    def rows(self, routed: ops.Value, a: ops.Value) -> ops.Value:
        """Return the output for the activation a, as rows, of experts that another activation selects."""
        routing = ops.route(ops.linear(routed, self._router), self._route)
        return ops.experts(a, routing, self._weight, self._activation, self._clamped)

    def add(self, a: ops.Value, x: ops.Value, factor: float) -> ops.Value:
        """Add the experts' output for the activation a, times `factor`, to the residual x."""
        if self._latent is None:
            routing = ops.route(ops.linear(a, self._router), self._route)
            x = ops.experts_add(a, routing, self._weight, x, self._activation, self._clamped, factor)
        else:
            to_latent, from_latent = self._latent
            rows = self.rows(a, ops.activation(ops.linear(a, to_latent)))
            x = ops.linear_add(ops.activation(rows), from_latent, x, factor)
        if self._shared is None:
            return x
        first, down = self._shared
        if isinstance(first, ops.GateUpWeight):
            inner = ops.gate_up(a, first, self._activation)
        else:
            inner = ops.up(a, first, self._activation)
        if self._shared_gate is None:
            return ops.linear_add(inner, down, x, factor)
        return ops.gated_add(ops.linear(inner, down), ops.linear(a, self._shared_gate), x, factor)


def _route_of(spec: ExpertsSpec, weights: LayerTensors, names: ExpertNames) -> ops.RouteSpec:
    correction = None
    if spec.has_correction:
        found = (name for name in (GGUF_CORRECTION, *names.corrections) if weights.has(name))
        name = next(found, names.corrections[0])
        shape = (1, spec.num_experts) if names.is_correction_row else (spec.num_experts,)
        correction = ops.vector(weights.get(name, *shape))
    scales = ops.vector(weights.get(names.scales, spec.num_experts)) if spec.has_scales else None
    return ops.RouteSpec(
        spec.num_experts, spec.top_k, spec.kind, correction, num_groups=spec.num_groups,
        top_groups=spec.top_groups, sums_top_two=spec.sums_top_two, is_renormalised=spec.is_renormalised,
        eps=spec.eps, scale=spec.scale, jitter=spec.jitter, expert_scales=scales,
    )  # fmt: skip


def _shared_of(weights: LayerTensors, names: ExpertNames, spec: ExpertsSpec) -> ExpertProducts:
    """Return the products of the shared MLP."""
    hidden, joined = weights.config.hidden_size, f"{names.shared}.{names.shared_joined}.weight"
    down, size, cut = "down_proj", spec.shared_size, weights.config.cut
    part = None if cut is None else cut.of_shared
    if not spec.has_gate:
        return (
            weights.linear_rows(f"{names.shared}.up_proj", size, hidden, part, has_bias=False),
            weights.linear_columns(f"{names.shared}.{down}", hidden, size, part, has_bias=False),
        )
    if names.shared_joined is not None and weights.has(joined):
        both, down = weights.get(joined, 2 * size, hidden), names.shared_down
        gate, up = both.rows(0, size), both.rows(size, 2 * size)
    else:
        gate, up = (
            weights.get(f"{names.shared}.{name}.weight", size, hidden) for name in ("gate_proj", "up_proj")
        )
    if part is not None:
        gate, up = cutting.rows_of((gate, up), (part, part))
    return (
        ops.gate_up_weight(gate, up, weights.arithmetic),
        weights.linear_columns(f"{names.shared}.{down}", hidden, size, part, has_bias=False),
    )


def _gate_of(weights: LayerTensors, hidden: int) -> ops.LinearWeight:
    """Return the one-row product that gates the shared expert per token."""
    source = weights.get("mlp.shared_expert_gate.weight", 1, hidden)
    return ops.router_weight(source, weights.arithmetic)


def read_products(weights: LayerTensors, names: ExpertNames, spec: ExpertsSpec) -> Iterator[ExpertProducts]:
    """Yield the products of each expert in turn, so that no expert stays in memory in the file's format."""
    for matrices in _matrices(weights, names, spec):
        yield make_products(weights, matrices)


def make_products(
    weights: LayerTensors, matrices: Matrices, biases: Matrices | None = None
) -> ExpertProducts:
    """Make one expert's products, or a shard's part of them, from its matrices and a bias for each."""
    arithmetic, cut = weights.arithmetic.for_experts(), weights.config.cut
    *first, down = matrices
    of_first, of_down = ([], None) if biases is None else (list(biases[:-1]), biases[-1])
    if cut is not None:
        part = cut.of_expert
        first, of_first = ([each.rows(part.start, part.stop) for each in of] for of in (first, of_first))
        down = down.columns(part.start, part.stop)
        of_down = of_down if cut.rank == 0 else None  # the results of all shards are summed
    inner: ops.GateUpWeight | ops.LinearWeight
    if len(first) == 2:
        inner = ops.gate_up_weight(first[0], first[1], arithmetic, biases=of_first or None)
    else:
        inner = ops.linear_weight(first[0], arithmetic, bias=of_first[0] if of_first else None)
    return inner, ops.linear_weight(down, arithmetic, bias=of_down)


def down_names(names: ExpertNames, num_experts: int) -> list[str]:
    """Return the names that files may have for the last product of the experts."""
    each = [f"{names.experts}.{index}" for index in range(num_experts)]
    found = [f"{prefix}.{name}.weight" for prefix in (names.experts, *each) for name in {names.down, _DOWN}]
    return [*found, names.joined_down]


def shared_down_names(names: ExpertNames) -> list[str]:
    """Return the names that files may have for the last product of the MLP that all tokens use."""
    return [f"{names.shared}.{name}.weight" for name in {names.shared_down, _DOWN}]


def _matrices(weights: LayerTensors, names: ExpertNames, spec: ExpertsSpec) -> Iterator[Matrices]:
    hidden = spec.latent_size or weights.config.hidden_size
    inner, count = spec.intermediate_size, spec.num_experts
    first = 0 if spec.has_gate else 1
    kinds, usual = (names.gate, names.up, names.down)[first:], ("gate_proj", "up_proj", "down_proj")[first:]
    if weights.has(f"{names.experts}.0.{usual[0]}.weight"):
        kinds = usual
    elif names.is_joined or weights.has(names.joined) or weights.has(names.joined_down):
        num_parts = len(kinds) - 1
        joined = stack(weights, names.joined, count, num_parts * inner, hidden)
        downs = stack(weights, names.joined_down, count, hidden, inner)
        for each, down in zip(joined, downs, strict=True):
            yield *(each.rows(part * inner, (part + 1) * inner) for part in range(num_parts)), down
        return
    shapes = zip(kinds, ((inner, hidden), (inner, hidden), (hidden, inner))[first:], strict=True)
    matrices = [
        each_expert(weights, names.experts, f"{kind}.weight", count, *shape) for kind, shape in shapes
    ]
    yield from zip(*matrices, strict=True)


def each_expert(
    weights: LayerTensors, prefix: str, name: str, count: int, *shape: int
) -> Iterator[ops.WeightSource]:
    """Return each expert's matrix or vector, each to be used at once, from one tensor or one per expert."""
    joined = f"{prefix}.{name}"
    if weights.is_gguf or weights.has(joined):
        return stack(weights, joined, count, *shape)
    return (weights.get(f"{prefix}.{index}.{name}", *shape) for index in range(count))


def stack(weights: LayerTensors, name: str, count: int, *shape: int) -> Iterator[ops.WeightSource]:
    """Yield the matrices or vectors of a tensor [count, *shape], each to be used at once.

    Each is requested on its own: the file releases the pages read before, and of a type that is decoded while
    it is loaded only one is in memory. A layer's experts are large compared with the rest of it.
    """
    for index in range(count):
        yield replace(weights.get(name, count, *shape, part=slice(index, index + 1)), shape=shape)
