"""Recording: what operators refuse, and that a value means the same for every operator that reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.float64_graph import Graph, Shape, Twin, greedy_state
from tests.ops.helpers import EXACT, FAST, random_source, rope_table
from tests.reference.compare import assert_close, assert_same_bits
from tests.support import eager_ops
from tests.support.batches import flat_rows
from tests.support.eager_ops import norm_weight
from tests.support.kv import poison, poisoned_pool
from tests.support.open_program import OpenProgram
from tests.support.state_steps import Shape as StateShape
from tgi_asgi import _C, ops
from tgi_asgi.models.config import CacheShape
from tgi_asgi.ops import calls, cpu_calls, cuda
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.ops.recorder import Call, Kind
from tgi_asgi.ops.tensors import from_tensor

ODD = Shape(hidden=60, intermediate=100, heads=3, kv_heads=1, head_dim=20, rotary_dim=12)


class Values:
    """One value of each kind, and the operands that operators combine with them."""

    def __init__(self) -> None:
        self.recorder = ops.Recorder()
        self.square = ops.linear_weight(random_source(48, 48)[1], EXACT)
        parts = [random_source(rows, 48)[1] for rows in (48, 16, 16)]
        self.heads = ops.qkv_weight(parts, EXACT, ops.QkvHeads(3, 1, 16, rotary_dim=16))
        self.gates = ops.gate_up_weight(random_source(40, 48)[1], random_source(40, 48)[1], EXACT)
        self.layer = poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32").layers[0]
        self.ones = norm_weight(torch.ones(48), 1e-5)
        self.residual = ops.embed(self.recorder.batch, self.square)
        self.activation = ops.norm(self.residual, self.ones)
        self.rows = ops.linear(self.activation, self.square)
        self.query = ops.qkv(self.activation, self.heads, self.layer, None)
        self.gate = self.recorder.value(Kind.ROWS, 1)
        self.wide = self.recorder.value(Kind.ROWS, 32)
        self.steps = self.recorder.value(Kind.ROWS, 2)
        self.route = ops.RouteSpec(48, 2)
        self.routing = ops.route(self.rows, self.route)
        expert = ops.gate_up_weight(random_source(32, 48)[1], random_source(32, 48)[1], EXACT)
        down = ops.linear_weight(random_source(48, 32)[1], EXACT)
        self.experts = ops.experts_weight([(expert, down)] * 48, EXACT)
        self.states = ops.StatePool([StateShape(48, 3, 256)], num_slots=1).layers[0]
        self.taps = ops.ShortConvWeight(np.ones((48, 3), np.float32))
        one = np.ones(1, np.float32)
        self.scan = ops.SelectiveScanWeight(1, 16, 1, 16, -one, one, one)
        self.channels = ops.ChannelScanWeight(-np.ones((16, 16), np.float32), np.ones(16, np.float32))
        self.channel, self.parts = (self.recorder.value(Kind.ROWS, columns) for columns in (16, 32))
        self.rule = ops.DeltaRuleWeight(1, 16, 1, 16, -one, one)
        self.head = ops.HeadsWeight(1, 48, 48, self.square.made)
        shape = CacheShape(1, 64, 32, is_latent=True)
        self.latents = ops.KvPool([shape], num_blocks=1, block_size=16, dtype="float32").layers[0]
        self.absorbed, self.latent = (self.recorder.value(Kind.ROWS, columns) for columns in (32, 64))
        self.latent_norm, self.latent_rope = norm_weight(torch.ones(32), 1e-5), rope_table(32, 4)


OPERATORS: dict[str, tuple[str, Callable[[Values, Any], object]]] = {
    "norm": ("a residual", lambda v, x: ops.norm(x, v.ones)),
    "norm_in_place": ("a residual", lambda v, x: ops.norm_in_place(x, v.ones)),
    "embed_add": ("rows", lambda v, x: ops.embed_add(v.recorder.batch, v.square, x)),
    "image_rows": ("a residual", lambda v, x: ops.image_rows(x)),
    "activation": ("a residual", lambda v, x: ops.activation(x)),
    "head": ("a residual", lambda v, x: ops.head(x, v.ones, v.square)),
    "linear": ("an activation", lambda v, x: ops.linear(x, v.square)),
    "linear_add": ("an activation", lambda v, x: ops.linear_add(x, v.square, v.residual)),
    "up": ("an activation", lambda v, x: ops.up(x, v.square, "relu")),
    "gate_up": ("an activation", lambda v, x: ops.gate_up(x, v.gates)),
    "act_mul": ("rows", lambda v, x: ops.act_mul(v.wide, x)),
    "qkv": ("an activation", lambda v, x: ops.qkv(x, v.heads, v.layer, None)),
    "attention": ("a query", lambda v, x: ops.attention(x, v.layer, ops.AttentionSpec(0.25))),
    "norm_add": ("rows", lambda v, x: ops.norm_add(x, v.ones, v.residual)),
    "route": ("rows", lambda v, x: ops.route(x, v.route)),
    "experts": ("a routing of experts", lambda v, x: ops.experts(v.activation, x, v.experts)),
    "experts_add": (
        "a routing of experts",
        lambda v, x: ops.experts_add(v.activation, x, v.experts, v.residual),
    ),
    "gated_add": ("rows", lambda v, x: ops.gated_add(x, v.gate, v.residual)),
    "short_conv": ("rows", lambda v, x: ops.short_conv(x, v.taps, v.states)),
    "selective_scan": ("rows", lambda v, x: ops.selective_scan(x, v.gate, v.scan, v.states)),
    "channel_scan": (
        "rows",
        lambda v, x: ops.channel_scan(v.channel, v.channel, v.parts, x, v.channels, v.states),
    ),
    "delta_rule": ("rows", lambda v, x: ops.delta_rule(x, v.steps, v.rule, v.states)),
    "gated_norm": ("rows", lambda v, x: ops.gated_norm(x, v.rows, None, group_width=48, eps=1e-5)),
    "heads_linear": ("an activation", lambda v, x: ops.heads_linear(x, v.head)),
    "latent_qkv": (
        "rows",
        lambda v, x: ops.latent_qkv(v.absorbed, x, v.latent, v.latent_norm, v.latent_rope, v.latents),
    ),
}
KINDS = {
    "a residual": "residual", "an activation": "activation", "rows": "rows", "a query": "query",
    "a routing of experts": "routing",
}  # fmt: skip


def test_every_call_can_be_emitted_and_is_tested_here() -> None:
    kinds = {kind for kind in vars(calls).values() if isinstance(kind, type)}
    every = {kind for kind in kinds if issubclass(kind, Call)} - {Call}
    assert set(cpu_calls._EMITTERS) == every
    assert set(cuda._EMITTERS) == every
    names = {re.sub(r"(?<!^)(?=[A-Z])", "_", call.__name__).lower() for call in every}
    assert names - {"embed"} == set(OPERATORS), "only `embed` has no value as an operand"


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_value_of_another_kind_is_refused_by_both_names(operator: str, given: str) -> None:
    wanted, call = OPERATORS[operator]
    values = Values()
    if wanted == given or (given == "rows" and operator in ("norm", "norm_in_place", "activation")):
        call(values, getattr(values, KINDS[given]))
        return
    with pytest.raises(TypeError, match=rf"`{operator}` takes {wanted} as `\w+`, not {given}"):
        call(values, getattr(values, KINDS[given]))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("given", [None, 3, "x"], ids=str)
def test_what_is_no_value_is_refused(operator: str, given: object) -> None:
    wanted, call = OPERATORS[operator]
    with pytest.raises(TypeError, match=rf"`{operator}` takes {wanted} as `\w+`, not {type(given).__name__}"):
        call(Values(), given)


def test_tensors_and_values_do_not_mix() -> None:
    values = Values()
    with pytest.raises(TypeError, match="`linear_add` takes a residual as `x`, not Tensor"):
        ops.linear_add(values.activation, values.square, torch.randn(2, 48))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`norm_add` takes a residual as `x`, not Tensor"):
        ops.norm_add(values.rows, values.ones, torch.randn(2, 48))  # type: ignore[arg-type]
    with pytest.raises((TypeError, AttributeError)):
        ops.linear_add(torch.randn(2, 48), values.square, values.residual)  # type: ignore[arg-type]


def test_a_value_fails_where_torch_would_compute() -> None:
    x: Any = Values().residual
    with pytest.raises(TypeError):
        torch.add(x, 1)
    with pytest.raises(TypeError):
        x + 1


def test_values_of_two_recordings_are_refused() -> None:
    values, others = Values(), Values()
    with pytest.raises(TypeError, match="`linear_add` was given values of two recordings"):
        ops.linear_add(values.activation, values.square, others.residual)
    with pytest.raises(TypeError, match="`norm_add` was given values of two recordings"):
        ops.norm_add(values.rows, values.ones, others.residual)


@pytest.mark.parametrize(
    "operator", ["norm", "activation", "head", "linear_add", "norm_add", "norm_in_place"]
)
def test_a_residual_is_refused_once_it_was_added_to(operator: str) -> None:
    values = Values()
    old = values.residual
    new = ops.linear_add(values.activation, values.square, old)
    if operator.endswith("add"):
        values.residual, given = old, {"linear_add": values.activation, "norm_add": values.rows}[operator]
    else:
        given = old
    with pytest.raises(TypeError, match=rf"`{operator}` was given as `x` a residual that changed in place"):
        OPERATORS[operator][1](values, given)
    ops.norm(new, values.ones)


@pytest.mark.parametrize(
    "operator",
    ("norm", "norm_in_place", "head", "linear", "linear_add", "up", "gate_up", "qkv", "norm_add", "route",
     "experts", "experts_add"),
)  # fmt: skip
def test_other_columns_are_refused_by_both_numbers(operator: str) -> None:
    wanted, call = OPERATORS[operator]
    values = Values()
    kind = next(kind for kind in Kind if kind.value == wanted)
    with pytest.raises(ValueError, match=rf"`{operator}` takes 48 columns as `\w+`, not 40"):
        call(values, values.recorder.value(kind, 40))


def made(recorder: ops.Recorder) -> OpenProgram:
    limits = ops.StepLimits(max_tokens=4, max_sequences=1, max_rows=1, max_context=16)
    return OpenProgram(recorder, limits)


def test_what_a_program_cannot_be_is_refused_when_it_is_made() -> None:
    values = Values()
    for scale in (0.25, 0.5):
        a = ops.attention(values.query, values.layer, ops.AttentionSpec(scale))
    x = ops.linear_add(a, values.square, values.residual)
    with pytest.raises(ValueError, match="a query can be used with only one scale"):
        made(values.recorder)
    values = Values()
    ops.head(values.residual, values.ones, values.square)
    x = ops.linear_add(values.activation, values.square, values.residual)
    with pytest.raises(ValueError, match="`head` must be the last operator"):
        made(values.recorder)
    assert x.kind is Kind.RESIDUAL


def run_all(graph: Graph, program: ops.CpuProgram) -> Tensor:
    """Return the logits of all tokens, computed in one step."""
    poison(graph.pool)
    batch, tokens = graph.step([(0, length) for length in graph.lengths])
    return torch.from_numpy(program.run(batch, range(len(tokens))).copy())


def assert_samples_as_it_runs(graph: Graph, program: ops.CpuProgram, rows: list[int]) -> None:
    """Require the tokens and log-probabilities of `run_and_sample` to have the bits of `run` and `sample`."""
    logits = run_all(graph, program)[rows].contiguous()
    slots, vocab = list(range(len(rows))), graph.shape.vocab
    expected = eager_ops.sample(logits, greedy_state(len(rows), vocab), slots)
    poison(graph.pool)
    batch, _ = graph.step([(0, length) for length in graph.lengths])
    found = program.run_and_sample(batch, rows, slots, greedy_state(len(rows), vocab))
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.top_ids.tolist() == expected.top_ids.tolist()
    assert_same_bits(found.top_logprobs, expected.top_logprobs)


def parallel_layer(graph: Graph, x: Twin, layer: int) -> Twin:
    """Add attention and MLP of the same norm to x, one after the other, so x changes in between."""
    a = graph.norm(x)
    q = graph.qkv(a, layer, None, has_rope=True)
    x = graph.linear_add(graph.attention(q, layer, None), x, 0.7)
    return graph.linear_add(graph.gate_up(a, "silu"), x, 0.7)


@pytest.mark.parametrize("lengths", [(1,), (2,), (17, 5, 1)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_value_taken_again_is_what_it_was_when_the_residual_has_changed(
    lengths: tuple[int, ...], threads: int
) -> None:
    _C.set_num_threads(threads)
    graph = Graph(ODD, lengths, ["F32"], EXACT, num_layers=2)
    x = graph.embed(1.0)
    for layer in range(2):
        x = parallel_layer(graph, x, layer)
    graph.head(x, 1.0, 0.0)
    program = graph.program()
    assert_close(run_all(graph, program), graph.exact_logits, length=4000)
    # The norm's lifetime spans the last write to the cache, so `run_and_sample` must keep its row, too.
    assert_samples_as_it_runs(graph, program, [sum(lengths) - 1])


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_activation_is_taken_in_three_precisions(kernel_set: str, tokens: int, threads: int) -> None:
    _C.set_num_threads(threads)
    shape = Shape(hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, rotary_dim=32)
    graph = Graph(shape, (tokens,), ["Q8_0", "BF16", "F32"], FAST, num_layers=1)
    x = graph.embed(1.0)
    a = graph.norm(x)
    attended = graph.attention(graph.qkv(a, 0, None, has_rope=True), 0, None)
    gated = graph.gate_up(a, "silu")
    for each in (attended, gated, a, attended, gated, a):  # alternates weights of three formats
        x = graph.linear_add(each, x, 0.5)
    graph.head(x, 1.0, 0.0)
    assert {call.a.columns for call in graph.recorder.calls if hasattr(call, "a")} == {64, 96}
    error = run_all(graph, graph.program()).double() - graph.exact_logits
    assert error.norm() <= 1e-5 * graph.exact_logits.norm()


def test_what_was_not_finite_in_one_step_is_not_seen_in_the_next(kernel_set: str) -> None:
    graph = Graph(ODD, (9,), ["F32"], EXACT, num_layers=2)
    x = graph.embed(float("inf"))
    program = layers_with_norms_behind(graph, x)
    assert not torch.isfinite(run_all(graph, program)).any()
    table = torch.randn(ODD.vocab, ODD.hidden)
    table[1] = torch.nan
    after_nan = logits_of_last_step(table, [1, 2])
    fresh = logits_of_last_step(table, [2])
    assert torch.isfinite(fresh).all()
    assert_same_bits(after_nan, fresh)


def logits_of_last_step(table: Tensor, steps: list[int]) -> Tensor:
    """Run a step for each of `steps`, with that token nine times, in one program; return the last logits."""
    torch.manual_seed(5)
    graph = Graph(ODD, (9,), ["F32"], EXACT, num_layers=2)
    weight = ops.linear_weight(from_tensor(table), EXACT)
    x = Twin(ops.embed(graph.recorder.batch, weight), table.double()[graph.ids])
    program = layers_with_norms_behind(graph, x)
    for token in steps:
        graph.ids = [token] * 9
        logits = run_all(graph, program)
    return logits


def layers_with_norms_behind(graph: Graph, x: Twin) -> ops.CpuProgram:
    """Add two layers in which rows of products and of attention have one width and could share buffers."""
    for layer in range(2):
        q = graph.qkv(graph.activation(x), layer, "whole", has_rope=True)
        x = graph.norm_add(graph.linear(graph.attention(q, layer, None)), x, 1.0)
        x = graph.norm_add(graph.linear(graph.gate_up(graph.activation(x), "gelu_tanh")), x, 1.0)
    graph.head(x, 1.0, 0.0)
    return graph.program()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_query_that_was_given_is_that_of_the_rows_sampled_after(threads: int) -> None:
    _C.set_num_threads(threads)
    values = Values()
    given = values.recorder.value(Kind.QUERY, 48)
    attended = ops.attention(given, values.layer, ops.AttentionSpec(0.25))
    x = ops.linear_add(attended, values.square, values.residual)
    ops.head(x, values.ones, values.square)
    limits = ops.StepLimits(max_tokens=9, max_sequences=1, max_rows=2, max_context=16)
    program = OpenProgram(values.recorder, limits, inputs=[given])
    batch, query = flat_rows([(0, 9)], [[3]], 16, ids=range(9)), torch.randn(9, 48)
    program.write(given, query.numpy())
    logits = program.run(batch, [4, 8])
    expected = ops.sample(logits, greedy_state(2, 48), [0, 1])
    program.write(given, query.numpy())
    found = program.run_and_sample(batch, [4, 8], [0, 1], greedy_state(2, 48))
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
        assert_same_bits(getattr(found, name), getattr(expected, name))


def test_a_value_that_nobody_wanted_cannot_be_read() -> None:
    values = Values()
    program = made(values.recorder)
    with pytest.raises(LookupError, match="an activation has no buffer as float32"):
        program.read(values.activation, 1)
    with pytest.raises(LookupError, match="a query has no buffer as rows"):
        program.write(values.query, np.zeros((1, 48), np.float32))


def made_for_cuda(recorder: ops.Recorder) -> cuda.CudaProgram:
    limits = ops.StepLimits(max_tokens=1, max_sequences=1, max_rows=1, max_context=1)
    return cuda.CudaProgram(recorder, limits, CudaModes(), max_blocks=1, device=torch.device("cpu"))


def test_a_cuda_program_names_what_its_attention_lacks() -> None:
    recorder = ops.Recorder()
    layer = CudaKvLayer(torch.zeros(2, 2, 1, 16, 32))
    ops.attention(recorder.value(Kind.QUERY, 64), layer, ops.AttentionSpec(0.25, chunk=8))
    with pytest.raises(ValueError, match="no CUDA kernel supports attention with `chunk`"):
        made_for_cuda(recorder)


def test_a_cuda_program_names_what_its_routing_lacks() -> None:
    recorder = ops.Recorder()
    spec = ops.RouteSpec(4, 2, expert_scales=np.ones(4, np.float32))
    ops.route(recorder.value(Kind.ROWS, 4), spec)
    with pytest.raises(ValueError, match="no CUDA kernel supports routing with `expert_scales`"):
        made_for_cuda(recorder)


def test_a_cuda_program_names_what_no_kernel_computes() -> None:
    recorder = ops.Recorder()
    a, routing = (recorder.value(kind, 48) for kind in (Kind.ACTIVATION, Kind.ROUTING))
    ops.experts(a, routing, Values().experts)
    with pytest.raises(TypeError, match="Experts is computed on CPUs only, not on CUDA"):
        made_for_cuda(recorder)
