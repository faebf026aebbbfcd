"""The operators route, experts, experts_add and gated_add: the choice of experts and their results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, FAST, random_source, rounded
from tests.reference import experts as reference
from tests.reference.compare import assert_close, assert_same_bits, assert_within
from tests.reference.experts import Mlp
from tests.support import eager_ops
from tests.support.open_program import OpenProgram
from tests.support.random_weights import QUANTISED, decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops import ClampedGate, ExpertsWeight, RouteSpec, direct
from tgi_asgi.ops.recorder import Kind

BY_KIND = ops.Packing(is_exact=False, has_float_prompts=True)


@dataclass(frozen=True)
class Layer:
    """Experts in the kernels' form and in the reference's."""

    weight: ExpertsWeight
    mlps: list[Mlp]

    @property
    def precisions(self) -> tuple[str, str]:
        return self.weight.made.precision, self.weight.made.inner_precision


def make_layer(
    num_experts: int,
    columns: int,
    size: int,
    packing: ops.Packing,
    formats: Sequence[str] = ("F32", "F32", "F32"),
    *,
    has_biases: bool = False,
) -> Layer:
    """Make random experts; `formats` are those of gate, up and down."""
    made, mlps = [], []
    shapes = [(size, columns), (size, columns), (columns, size)]
    for expert in range(num_experts):
        sources = [
            random_weight(format, *shape, seed=3 * expert + part)
            for part, (format, shape) in enumerate(zip(formats, shapes, strict=True))
        ]
        biases = [random_source(rows) for rows, _ in shapes] if has_biases else [(None, None)] * 3
        of_gate_up = [source for _, source in biases[:2] if source is not None]
        gate_up = ops.gate_up_weight(sources[0], sources[1], packing, biases=of_gate_up or None)
        made.append((gate_up, ops.linear_weight(sources[2], packing, bias=biases[2][1])))
        gate, up, down = map(decoded_values, sources)
        mlps.append(Mlp(gate, up, down, [bias for bias, _ in biases]))
    return Layer(ops.experts_weight(made, packing), mlps)


def run(
    a: Tensor,
    logits: Tensor,
    spec: RouteSpec,
    layer: Layer | None = None,
    x: Tensor | None = None,
    num_sampled: int = 0,
    *,
    is_added: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Route, and add experts to x or zeros; return the weight of each expert [n, num_experts], and x.

    If the experts are not added but summed as rows, return these. Their buffer holds NaN before, and that of
    the logits beyond them.
    """
    recorder, num_tokens = ops.Recorder(), len(logits)
    values = [
        recorder.value(kind, tensor.shape[1])
        for kind, tensor in ((Kind.ROWS, logits), (Kind.ACTIVATION, a), (Kind.RESIDUAL, a))
    ]
    routing = ops.route(values[0], spec)
    out = values[2]
    if layer is not None and is_added:
        out = ops.experts_add(values[1], routing, layer.weight, values[2], **options)
    elif layer is not None:
        out = ops.experts(values[1], routing, layer.weight, **options)
    room = max(num_tokens, 1)
    program = OpenProgram(
        recorder, ops.StepLimits(max_tokens=room, max_sequences=2, max_rows=1, max_context=1),
        inputs=values[: 1 if layer is None else 3], outputs=[routing, out][: 1 if layer is None else 2],
    )  # fmt: skip
    buffers = program.buffers
    buffers.rows_of(values[0]).array()[:] = np.nan
    program.write(values[0], logits.numpy())
    if layer is not None:
        program.write(values[1], a.numpy())
        program.write(values[2], (torch.zeros_like(a) if x is None else x).numpy())
        if not is_added:
            buffers.rows_of(out).array()[:] = np.nan
    program.run(eager_ops.step(num_tokens, num_sampled), ())
    ids, weights = (torch.from_numpy(part[:num_tokens]) for part in buffers.routing_of(routing).arrays())
    dense = torch.zeros(num_tokens, spec.num_experts, dtype=torch.float64)
    dense.scatter_(1, ids.long(), weights.double())
    assert all(len(set(row.tolist())) == spec.top_k for row in ids)
    return dense, torch.empty(0) if layer is None else torch.from_numpy(program.read(out, num_tokens))


def spread(first: float, last: float, count: int) -> npt.NDArray[np.float32]:
    return np.linspace(first, last, count, dtype=np.float32)


ROUTES = {
    "softmax": RouteSpec(130, 8),
    "all of them": RouteSpec(3, 3, is_renormalised=True),
    "one": RouteSpec(2, 1),
    "renormalised": RouteSpec(64, 6, is_renormalised=True, eps=1e-20, scale=2.5),
    "sigmoid": RouteSpec(60, 4, "sigmoid", scale=0.5),
    "corrected": RouteSpec(40, 4, "sigmoid", spread(-1, 1, 40), is_renormalised=True, eps=1e-6),
    "corrected softmax": RouteSpec(33, 5, correction=spread(0.3, 0, 33)),
    "groups": RouteSpec(64, 6, num_groups=8, top_groups=3, scale=16.0),
    "groups of two best": RouteSpec(
        96,
        8,
        "sigmoid",
        spread(0.1, -0.1, 96),
        8,
        4,
        sums_top_two=True,
        is_renormalised=True,
    ),
    "groups of one": RouteSpec(16, 2, num_groups=16, top_groups=5, sums_top_two=True),
    "sparsemixer": RouteSpec(16, 2, "sparsemixer", jitter=0.01),
    "wide sparsemixer": RouteSpec(21, 3, "sparsemixer", jitter=0.4, scale=2.0),
    "scaled experts": RouteSpec(130, 8, is_renormalised=True, expert_scales=spread(-2, 3, 130)),
    "all scaled": RouteSpec(
        40,
        4,
        "sigmoid",
        spread(-1, 1, 40),
        8,
        4,
        is_renormalised=True,
        eps=1e-6,
        scale=2.5,
        expert_scales=spread(3, 0.1, 40),
    ),
    "scaled sparsemixer": RouteSpec(16, 2, "sparsemixer", jitter=0.4, expert_scales=spread(0, 2, 16)),
}


@pytest.mark.parametrize("tokens", [0, 1, 3, 70])
@pytest.mark.parametrize("name", ROUTES)
def test_choices_and_weights_equal_the_reference(kernel_set: str, name: str, tokens: int) -> None:
    _C.set_num_threads(2)
    spec = ROUTES[name]
    logits = torch.randn(tokens, spec.num_experts) * 2
    weights, _ = run(torch.zeros(tokens, 4), logits, spec)
    assert_close(weights.float(), reference.route(logits, spec), length=spec.num_experts)


def test_of_equal_scores_the_lower_expert_is_chosen(kernel_set: str) -> None:
    weights, _ = run(torch.zeros(2, 4), torch.zeros(2, 40), RouteSpec(40, 3, num_groups=4, top_groups=2))
    assert weights.nonzero()[:, 1].tolist() == [0, 1, 2] * 2
    logits = torch.tensor([[0.0, 2.0, -1.0, 2.0, 2.0]])
    weights, _ = run(torch.zeros(1, 4), logits, RouteSpec(5, 2, "sigmoid"))
    assert weights.nonzero()[:, 1].tolist() == [1, 3]


def test_logits_far_apart_and_those_that_are_no_numbers(kernel_set: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, -torch.inf], [-300.0, -200.0, -100.0, -torch.inf]])
    weights, _ = run(torch.zeros(2, 4), logits, RouteSpec(4, 2, is_renormalised=True))
    torch.testing.assert_close(weights, torch.eye(4, dtype=torch.float64)[[0, 2]])
    for spec in (RouteSpec(4, 2), RouteSpec(4, 2, "sigmoid"), RouteSpec(4, 2, "sparsemixer")):
        bad = torch.tensor([[0.0, torch.nan, 1.0, 2.0], [torch.nan] * 4])
        weights, _ = run(torch.zeros(2, 4), bad, spec)
        assert weights.isnan().any(dim=1).all(), "NaN must reach the weights, to show in the token's logits"


# Number of experts, experts per token, tokens, columns, inner size.
SHAPES = [(2, 1, 1, 3, 1), (5, 5, 7, 17, 33), (60, 4, 33, 72, 40), (130, 8, 40, 32, 20), (8, 2, 300, 40, 64)]


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_of_any_size_equal_the_reference(
    kernel_set: str, shape: tuple[int, ...], has_biases: bool
) -> None:
    _C.set_num_threads(2)
    num_experts, top_k, tokens, columns, size = shape
    layer = make_layer(num_experts, columns, size, EXACT, has_biases=has_biases)
    a, x = torch.randn(tokens, columns), torch.randn(tokens, columns)
    logits, spec = torch.randn(tokens, num_experts), RouteSpec(num_experts, top_k)
    weights, found = run(a, logits, spec, layer, x, factor=1.5)
    expected = reference.experts(a, weights, layer.mlps)
    length = 2 * columns + size + top_k
    assert_close(found, x.double() + 1.5 * expected, length=length)
    assert_close(run(a, logits, spec, layer, is_added=False)[1], expected, length=length)


@pytest.mark.parametrize("format", [*QUANTISED, "F16", "BF16"])
def test_experts_in_every_format(kernel_set: str, format: str) -> None:
    columns = size = ops.FORMATS[format].block_columns if ops.FORMATS[format].block_columns > 32 else 96
    layer = make_layer(6, columns, size, FAST, [format] * 3)
    for tokens in (1, 2, 29):
        check_fast(layer, tokens, columns)


def check_fast(layer: Layer, tokens: int, columns: int) -> None:
    """Compare experts with the reference on rounded activations; few inner values may round differently."""
    of_input, inner = layer.precisions
    a = torch.randn(tokens, columns)
    spec = RouteSpec(len(layer.mlps), 2, is_renormalised=True)
    weights, found = run(a, torch.randn(tokens, len(layer.mlps)), spec, layer)
    expected = reference.experts(
        rounded(a, of_input), weights, layer.mlps, round_inner=lambda x: rounded(x.float(), inner)
    )
    assert_within(found, expected, whole=3e-3, worst=1e-2)


@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize(
    "formats",
    [("Q8_0", "Q4_0", "Q6_K"), ("BF16", "F32", "BF16"), ("Q5_0", "BF16", "F16"), ("Q4_1", "Q4_1", "F32")],
)
def test_the_products_of_an_expert_may_be_of_different_formats(
    kernel_set: str, formats: tuple[str, ...], packing: ops.Packing
) -> None:
    _C.set_num_threads(2)
    layer = make_layer(5, 96, 256, packing, formats, has_biases=True)
    assert len(layer.weight.made.gate_up) == (1 if formats[0] == formats[1] else 2)
    check_fast(layer, 9, 96)


def test_experts_may_be_of_different_formats_each() -> None:
    made, mlps = [], []
    for expert, format in enumerate(("Q8_0", "F16", "F32")):
        sources = [random_weight(format, 32, 32, seed=3 * expert + part) for part in range(3)]
        gate_up = ops.gate_up_weight(sources[0], sources[1], FAST)
        made.append((gate_up, ops.linear_weight(sources[2], FAST)))
        mlps.append(Mlp(decoded_values(sources[0]), decoded_values(sources[1]), decoded_values(sources[2])))
    layer = Layer(ops.experts_weight(made, FAST), mlps)
    assert layer.precisions == ("float32", "float32")
    check_fast(layer, 7, 32)


@pytest.mark.parametrize(
    "gate",
    [ClampedGate(0.3, 1.702, 1.0), ClampedGate(0.1), ClampedGate(1e30, 1.702, 1.0), "gelu_tanh"],
    ids=str,
)
@pytest.mark.parametrize("formats", [("F32",) * 3, ("F32", "BF16", "F32")], ids=["one", "two"])
def test_gates_are_clamped_and_activated(
    kernel_set: str, gate: ClampedGate | str, formats: tuple[str, ...]
) -> None:
    layer, a = make_layer(4, 40, 50, EXACT, formats, has_biases=True), torch.randn(11, 40)
    options: dict[str, Any] = {"activation": gate} if isinstance(gate, str) else {"clamped": gate}
    logits = torch.randn(11, 4)
    for is_added in (True, False):
        weights, found = run(a, logits, RouteSpec(4, 2), layer, is_added=is_added, **options)
        assert_close(found, reference.experts(a, weights, layer.mlps, **options), length=300)


LAYERS: dict[str, tuple[ops.Packing, tuple[str, ...]]] = {
    "exact": (EXACT, ("F32",) * 3),
    "int8": (FAST, ("Q4_0",) * 3),
    "bfloat16": (FAST, ("BF16",) * 3),
    "two parts": (FAST, ("Q8_0", "Q4_0", "Q8_0")),
    "by kind": (BY_KIND, ("Q4_0",) * 3),
    "by kind, then not": (BY_KIND, ("Q4_0", "Q4_0", "BF16")),
    "not, then by kind": (BY_KIND, ("BF16", "BF16", "Q4_0")),
    "two parts by kind": (BY_KIND, ("Q8_0", "Q4_0", "Q8_0")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_token_has_the_same_bits_in_any_step_and_team(kernel_set: str, name: str) -> None:
    packing, formats = LAYERS[name]
    layer, spec = make_layer(12, 64, 96, packing, formats, has_biases=True), RouteSpec(12, 3)
    a, x, logits = torch.randn(40, 64), torch.randn(40, 64), torch.randn(40, 12)
    logits[:20] = logits[:1]  # so that some experts get many tokens
    one = [slice(row, row + 1) for row in range(40)]
    sampled, of_prompts = (
        torch.cat([run(a[row], logits[row], spec, layer, x[row], num_sampled)[1] for row in one])
        for num_sampled in (1, 0)
    )
    assert "by kind" in name or torch.equal(sampled, of_prompts)
    steps = ((2, 2), (2, 1), (2, 0), (7, 3), (40, 40), (40, 0), (40, 17))
    for threads, (size, num_sampled) in itertools.product((1, 3), steps):
        _C.set_num_threads(threads)
        found = run(a[:size], logits[:size], spec, layer, x[:size], num_sampled)[1]
        assert_same_bits(found, torch.cat([sampled[:num_sampled], of_prompts[num_sampled:size]]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_sum_of_experts_has_the_bits_that_are_added_to_zero(kernel_set: str, name: str) -> None:
    packing, formats = LAYERS[name]
    layer, spec = make_layer(12, 64, 96, packing, formats, has_biases=True), RouteSpec(12, 3)
    a, logits = torch.randn(40, 64), torch.randn(40, 12)
    steps = ((0, 0), (1, 1), (1, 0), (2, 1), (7, 3), (40, 17))
    for threads, (size, num_sampled) in itertools.product((1, 3), steps):
        _C.set_num_threads(threads)
        operands = (a[:size], logits[:size], spec, layer, None, num_sampled)
        assert_same_bits(run(*operands, is_added=False)[1], run(*operands)[1])


def test_sets_of_one_arithmetic_agree_to_the_bit() -> None:
    layers = [make_layer(9, 64, 96, FAST, (format,) * 3) for format in ("Q4_0", "F32")]
    a, logits = torch.randn(19, 64), torch.randn(19, 9)
    found: dict[str, list[Tensor]] = {}
    before = _C.kernel_set()
    for name in _C.kernel_sets():
        _C.use_kernel_set(name)
        parts = [run(a, logits, RouteSpec(9, 3, "sigmoid"), layer) for layer in layers]
        found.setdefault(_C.kernel_arithmetic(), []).append(
            torch.cat([part.float() for each in parts for part in each], dim=1)
        )
    _C.use_kernel_set(before)
    for results in found.values():
        for each in results:
            assert_same_bits(each, results[0])


def test_many_experts_take_several_passes() -> None:
    """Use more rows than the buffers of a pass hold, with each token routed to all experts."""
    _C.set_num_threads(2)
    layer = make_layer(30, 32, 16, EXACT)
    a = torch.randn(50, 32)
    logits, spec = torch.randn(50, 30), RouteSpec(30, 30)
    weights, found = run(a, logits, spec, layer)
    assert_close(found, reference.experts(a, weights, layer.mlps), length=200)
    assert_same_bits(run(a, logits, spec, layer, is_added=False)[1], found)


@pytest.mark.parametrize("format", ["F32", "Q4_0"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 41])
def test_experts_of_tensors_are_those_of_a_program(kernel_set: str, tokens: int, format: str) -> None:
    _C.set_num_threads(2)
    layer, spec = make_layer(10, 64, 32, FAST, (format,) * 3, has_biases=True), RouteSpec(10, 4)
    a, logits = torch.randn(tokens, 64), torch.randn(tokens, 10)
    dense, expected = run(a, logits, spec, layer)
    weights, ids = dense.float().topk(4)
    assert_same_bits(direct.experts(layer.weight, a, ids, weights), expected)
    wide = torch.randn(tokens, 80)[:, :64].copy_(a)  # rows that are not adjacent
    assert_same_bits(direct.experts(layer.weight, wide, ids, weights), expected)


def test_tensors_may_name_an_expert_twice_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "new_rows", lambda *shape: torch.full(shape, torch.nan))
    layer, a = make_layer(3, 8, 8, EXACT), torch.randn(20, 8)
    ids = torch.tensor([[0, 0, 7]] * 19 + [[3, 7, 7]])
    weights = torch.tensor([[0.25, 0.5, 9.0]] * 20)
    dense = torch.tensor([[0.75, 0, 0]] * 19 + [[0, 0, 0]]).double()
    expected = reference.experts(a, dense, layer.mlps)
    assert_close(direct.experts(layer.weight, a, ids, weights), expected, length=30)
    none = direct.experts(layer.weight, a, ids[19:].expand(20, 3), weights)
    assert_same_bits(none, torch.zeros(20, 8))
    with pytest.raises(ValueError, match=r"`ids`\[0\] must be in \[0, "):
        direct.experts(layer.weight, a, ids - 1, weights)
    with pytest.raises(ValueError, match=r"`x` must be \[n, 8\]"):
        direct.experts(layer.weight, a[:, :7], ids, weights)
    with pytest.raises(ValueError, match="`weights` must have shape"):
        direct.experts(layer.weight, a, ids, weights[:, :2])


@pytest.mark.parametrize(("tokens", "columns"), [(0, 4), (1, 33), (17, 72)])
def test_rows_are_added_as_much_as_their_gate_says(kernel_set: str, tokens: int, columns: int) -> None:
    _C.set_num_threads(2)
    rows, x = torch.randn(tokens, columns), torch.randn(tokens, columns)
    gate = torch.randn(tokens, 1) * 3
    expected = x.double() - 0.5 * gate.double().sigmoid() * rows.double()
    assert_close(eager_ops.gated_add(rows, gate, x, -0.5), expected, length=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, r"`num_experts` must be in \[1, 1024\], got 0"),
        ({"num_experts": 1025}, r"`num_experts` must be in \[1, 1024\]"),
        ({"top_k": 9}, r"`top_k` must be in \[1, 8\], got 9"),
        ({"top_k": 0}, r"`top_k` must be in \[1, 8\], got 0"),
        ({"kind": "tanh"}, "`kind` must be softmax, sigmoid or sparsemixer, got tanh"),
        ({"num_groups": 3}, "`num_groups` must divide the 8 experts, got 3"),
        ({"num_groups": 4, "top_groups": 5}, r"`top_groups` must be in \[1, 4\], got 5"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "`top_groups` have fewer than `top_k` experts"),
        ({"correction": np.zeros(7, np.float32)}, r"`correction` must have shape \[8\]"),
        ({"correction": np.full(8, np.nan, np.float32)}, "`correction` must be finite"),
        ({"scale": float("inf")}, "`scale` must be finite"),
        ({"expert_scales": np.ones(9, np.float32)}, r"`expert_scales` must have shape \[8\]"),
        ({"expert_scales": np.full(8, np.inf, np.float32)}, "`expert_scales` must be finite"),
        ({"kind": "sparsemixer", "num_groups": 2, "top_groups": 2}, "sparsemixer has neither"),
    ],
    ids=str,
)
def test_a_route_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouteSpec(**{"num_experts": 8, "top_k": 2, **options})


@pytest.mark.parametrize("name", ["correction", "expert_scales"])
def test_vectors_of_a_route_must_be_float32(name: str) -> None:
    options: dict[str, Any] = {name: np.ones(8)}
    with pytest.raises(TypeError):
        RouteSpec(8, 2, **options)


def test_experts_that_do_not_fit_are_refused() -> None:
    def expert(columns: int, size: int, format: str = "F32") -> tuple[ops.GateUpWeight, ops.LinearWeight]:
        gate, up, down = (
            random_weight(format, *shape, seed=0)
            for shape in ((size, columns), (size, columns), (columns, size))
        )
        return ops.gate_up_weight(gate, up, FAST), ops.linear_weight(down, FAST)

    with pytest.raises(ValueError, match="must have an expert"):
        ops.experts_weight([], FAST)
    with pytest.raises(ValueError, match="must be of 32 columns and 64 inner ones"):
        ops.experts_weight([expert(32, 64), expert(32, 32)], FAST)
    layer, other = make_layer(4, 32, 64, FAST), make_layer(5, 32, 64, FAST)
    with pytest.raises(ValueError, match="`experts_add` takes 5 columns as `routing`, not 4"):
        run(torch.zeros(1, 32), torch.zeros(1, 4), RouteSpec(4, 2), other)
    with pytest.raises(ValueError, match="`experts_add` takes 32 columns as `a`, not 40"):
        run(torch.zeros(1, 40), torch.zeros(1, 4), RouteSpec(4, 2), layer)
    with pytest.raises(ValueError, match="`experts` takes 32 columns as `a`, not 40"):
        run(torch.zeros(1, 40), torch.zeros(1, 4), RouteSpec(4, 2), layer, is_added=False)
    options: dict[str, Any] = {"activation": "gelu_tanh", "clamped": ClampedGate(7.0)}
    for is_added in (True, False):
        operands = (torch.zeros(1, 32), torch.zeros(1, 4), RouteSpec(4, 2), layer)
        with pytest.raises(ValueError, match="`activation` must be one of"):
            run(*operands, is_added=is_added, activation="tanh")
        with pytest.raises(ValueError, match="only silu's gates are clamped"):
            run(*operands, is_added=is_added, **options)
