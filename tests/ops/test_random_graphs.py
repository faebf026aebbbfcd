"""Random graphs of operators against the same graphs in float64: no buffer mixes two values.

Each graph runs in one step, in two steps, and by `run_and_sample`, which continues only with rows to sample.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.float64_graph import Graph, Shape, Twin, greedy_state
from tests.ops.helpers import EXACT, FAST
from tests.reference.compare import assert_same_bits
from tests.support import eager_ops
from tests.support.kv import poison
from tests.support.scale import Scale
from tgi_asgi import _C, ops

SHAPES = [
    Shape(hidden=72, intermediate=100, heads=4, kv_heads=2, head_dim=20, rotary_dim=12),
    Shape(hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, rotary_dim=32),
    Shape(hidden=60, intermediate=60, heads=3, kv_heads=3, head_dim=20, rotary_dim=20),
    Shape(hidden=96, intermediate=32, heads=6, kv_heads=2, head_dim=16, rotary_dim=2),
]
OPERATORS = [
    "norm", "activation", "linear", "linear_add", "norm_add", "norm_in_place", "gate_up", "up", "qkv",
    "attention", "layer", "experts", "experts_add", "gated_add", "change_rows", "act_mul", "queries",
]  # fmt: skip
# Limits on the error of logits. A value halfway between two codes may round either way, and such errors add
# up, but only in few graphs.
TOLERANCES, USUAL_TOLERANCE = {True: 2e-4, False: 6e-2}, 1e-4


@dataclass
class Pools:
    """The values of a graph that operators can use as operands."""

    graph: Graph
    x: Twin
    tame: list[Twin] = field(default_factory=list)  # small activations, whatever x is
    any: list[Twin] = field(default_factory=list)
    rows: list[Twin] = field(default_factory=list)
    queries: list[tuple[Twin, int]] = field(default_factory=list)
    num_layers: int = 0  # that have keys

    def apply(self, operator: str, which: int, option: int) -> None:
        """Add a call if its operands exist; `which` picks among them."""
        graph = self.graph
        if operator == "norm":
            rows = self.rows[which % len(self.rows)] if self.rows and option == 2 else None
            self.tame.append(graph.norm(self.x if rows is None else rows))
        elif operator == "norm_in_place":
            self.x = graph.norm_in_place(self.x)
        elif operator == "activation":
            self.any.append(graph.activation(self.x))
        elif operator == "layer":
            self.apply("norm", 0, 0)
            self.apply("qkv", -1, option)
            self.apply("attention", -1, option)
            self.x = graph.linear_add(self.tame[-1], self.x, 0.7)
        elif operator == "norm_add" and self.rows:
            rows, scale = self.rows[which % len(self.rows)], [1.0, 0.7, 1.3][which % 3]
            self.x = graph.norm_add(rows, self.x, [1.0, 0.3, -0.5][option], scale)
        elif operator == "change_rows" and self.rows:
            self._change_rows(which % len(self.rows), option)
        elif operator == "act_mul" and self.rows and self.tame:
            rows = self.rows[which % len(self.rows)]
            first = 32 * (which % 2)
            if rows.value.columns >= first + 32:
                gate = self.tame[which % len(self.tame)]
                self.any.append(graph.act_mul(gate, rows, ["silu", "gelu_tanh", "gelu"][option], 32, first))
        elif operator == "queries" and self.queries and self.tame:
            owner, layer = self.queries[which % len(self.queries)]
            norms = [None, "heads", "last"][option]
            a = self.tame[which % len(self.tame)]
            made = graph.qkv(a, layer, norms, has_rope=which % 3 > 0, keys_of=owner)
            self.queries.append((made, layer))
        elif operator == "attention" and self.queries:
            query, layer = self.queries[which % len(self.queries)]
            self.tame.append(graph.attention(query, layer, [None, 1, 9][option]))
        elif operator in ("linear", "linear_add") and self.tame + self.any:
            a = (self.tame + self.any)[which % len(self.tame + self.any)]
            if operator == "linear":
                self.rows.append(graph.linear(a))
            else:
                self.x = graph.linear_add(a, self.x, [1.0, 0.3, -0.5][option])
        elif operator in ("experts", "experts_add") and (inputs := self._as_wide_as_the_residual()):
            a = inputs[which % len(inputs)]
            if operator == "experts":
                self.rows.append(graph.experts(a, 1 + option))
            else:
                self.x = graph.experts_add(a, self.x, 1 + option, [1.0, 0.3, -0.5][option])
        elif operator == "gated_add" and self.rows and self.tame:
            a = self.tame[which % len(self.tame)]
            rows = self.rows[which % len(self.rows)]
            self.x = graph.gated_add(rows, a, self.x, [1.0, 0.3, -0.5][option])
        elif operator in ("gate_up", "up", "qkv") and self.tame:
            a = self.tame[which % len(self.tame)]
            if operator == "gate_up":
                self.any.append(graph.gate_up(a, ["silu", "gelu_tanh", "gelu"][option]))
            elif operator == "up":
                self.any.append(graph.up(a, ["gelu", "relu_squared", "xielu"][option]))
            elif self.num_layers < graph.num_layers:
                layer = self.num_layers
                self.num_layers += 1
                norms = [None, "heads", "values", "whole", "layer", "last"][(which + option) % 6]
                has_rope, is_interleaved = which % 3 > 0, which % 2 > 0
                made = graph.qkv(a, layer, norms, has_rope=has_rope, is_interleaved=is_interleaved)
                self.queries.append((made, layer))

    def _change_rows(self, index: int, option: int) -> None:
        """Replace rows by their norm, by their sum with embeddings, or by a sum with other rows' norm."""
        graph, rows = self.graph, self.rows[index]
        if option == 0:
            width = rows.value.columns
            self.rows[index] = graph.norm_in_place(rows, 1 if width % 32 else width // 32)
        elif option == 1:
            self.rows[index] = graph.embed_add(rows, 0.4)
        elif len(self.rows) > 1:
            other = self.rows[index - 1]
            self.rows[index] = graph.norm_add(other, rows, 0.6, 0.9)

    def _as_wide_as_the_residual(self) -> list[Twin]:
        """Return the activations that experts can read, as their results have the same width."""
        return [a for a in self.tame if a.value.columns == self.graph.shape.hidden]


@dataclass(frozen=True)
class Plan:
    """A random graph and how its tokens are cut into steps."""

    shape: Shape
    is_exact: bool
    calls: list[tuple[str, int, int]]
    lengths: list[int]
    cuts: list[int]
    sampled: list[int]
    threads: int
    seed: int
    num_orders: int = 0  # of columns of weights, besides that of their input
    is_proportional: bool = False


PLANS = st.builds(
    Plan,
    shape=st.sampled_from(SHAPES),
    is_exact=st.booleans(),
    calls=st.lists(
        st.tuples(st.sampled_from(OPERATORS), st.integers(0, 11), st.integers(0, 2)), min_size=1, max_size=14
    ),
    lengths=st.lists(st.sampled_from([1, 2, 3, 7, 20, 35]), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 34), min_size=3, max_size=3),
    sampled=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    threads=st.sampled_from([1, 1, 2, 3]),
    seed=st.integers(0, 1000),
    num_orders=st.integers(0, 2),
    is_proportional=st.booleans(),
)


def make(plan: Plan) -> tuple[Graph, ops.CpuProgram]:
    torch.manual_seed(plan.seed)
    formats = ("F32", "BF16", "Q8_0", "Q4_0", "F16")[plan.seed % 4 :]
    formats += ((), ("Q8_0@1",), ("Q8_0@1", "Q8_0@1", "Q8_0@2"))[plan.num_orders]
    packing = EXACT if plan.is_exact else FAST
    num_layers = sum(operator in ("qkv", "layer") for operator, _, _ in plan.calls) or 1
    graph = Graph(plan.shape, plan.lengths, formats, packing, num_layers, plan.is_proportional)
    pools = Pools(graph, graph.embed([1.0, 3.0][plan.seed % 2], has_positions=plan.seed % 3 == 0))
    for call in plan.calls:
        pools.apply(*call)
    graph.head(pools.x, 0.5, [0.0, 20.0][plan.seed // 2 % 2])
    return graph, graph.program()


def run_in_steps(graph: Graph, program: ops.CpuProgram, cuts: list[int]) -> Tensor:
    """Return the logits of all tokens; those before the cuts are computed in an earlier step."""
    poison(graph.pool)
    middle = [min(cut, length) for cut, length in zip(cuts, graph.lengths, strict=False)]
    out = torch.full((sum(graph.lengths), graph.shape.vocab), torch.nan)
    for bounds in (zip([0] * 3, middle, strict=False), zip(middle, graph.lengths, strict=True)):
        spans = list(bounds)
        if all(start == stop for start, stop in spans):
            continue
        batch, tokens = graph.step(spans)
        out[tokens] = torch.from_numpy(program.run(batch, range(len(tokens))))
    return out


def check(plan: Plan) -> float:
    """Compare a graph with float64 and with itself in other steps; return its relative error."""
    _C.set_num_threads(plan.threads)
    graph, program = make(plan)
    logits = run_in_steps(graph, program, [0] * 3)
    error = float((logits.double() - graph.exact_logits).norm() / graph.exact_logits.norm().clamp_min(1e-30))
    assert error <= TOLERANCES[plan.is_exact]
    assert_same_bits(run_in_steps(graph, program, plan.cuts), logits)
    rows = sorted({row % len(logits) for row in plan.sampled})
    slots, vocab = list(range(len(rows))), graph.shape.vocab
    expected = eager_ops.sample(logits[rows].contiguous(), greedy_state(len(rows), vocab), slots)
    poison(graph.pool)
    batch, _ = graph.step([(0, length) for length in plan.lengths])
    found = program.run_and_sample(batch, rows, slots, greedy_state(len(rows), vocab))
    assert found.top_ids.tolist() == expected.top_ids.tolist()
    assert_same_bits(found.top_logprobs, expected.top_logprobs)
    return error


def test_a_graph_means_the_same_recorded_cut_and_sampled(scale: Scale) -> None:
    examples = scale(120, 3000)
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    errors: list[float] = []

    @settings(max_examples=examples, suppress_health_check=quiet)
    @given(PLANS)
    def check_plan(plan: Plan) -> None:
        errors.append(check(plan))

    check_plan()
    assert statistics.median(errors) <= USUAL_TOLERANCE


@pytest.mark.parametrize("num_orders", [0, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.hidden))
def test_each_operator_is_part_of_a_graph(kernel_set: str, shape: Shape, num_orders: int) -> None:
    calls = [(operator, 1, option) for option in range(3) for operator in OPERATORS]
    check(Plan(shape, True, calls, [20, 1, 35], [7, 0, 34], [0, 20, 55], 2, 1, num_orders))


def test_embeddings_may_be_added_after_the_last_keys(kernel_set: str) -> None:
    calls = [("layer", 0, 0), ("linear", 0, 0), ("change_rows", 0, 1), ("norm_add", 0, 0)]
    check(Plan(SHAPES[0], True, calls, [20, 1, 35], [7, 0, 34], [0, 20, 55], 2, 1))
