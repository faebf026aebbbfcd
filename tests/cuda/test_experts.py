"""The CUDA kernels of routed experts in emulation: routes, plans, products of each format, sums."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.test_quant_linear import FORMATS, every_mxfp4, random_source, weight_params
from tests.emulation.device import TYPES, Device
from tests.reference import experts as reference
from tests.reference.compare import assert_close, assert_equal
from tgi_asgi.ops import ACTIVATIONS, ClampedGate, RouteSpec
from tgi_asgi.ops.cuda_quant import repack

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = {"softmax": 0, "sigmoid": 1, "sparsemixer": 2}
SPECS = [
    RouteSpec(8, 2, is_renormalised=True),  # Mixtral
    RouteSpec(60, 4),  # Qwen 2
    RouteSpec(128, 8, is_renormalised=True),  # Qwen 3
    RouteSpec(1, 1),
    RouteSpec(33, 33, scale=0.5),
    RouteSpec(
        64, 6, "sigmoid", correction=np.linspace(-0.4, 0.5, 64, dtype=np.float32), num_groups=8,
        top_groups=3, sums_top_two=True, is_renormalised=True, eps=1e-20, scale=2.5,
    ),  # DeepSeek V3
    RouteSpec(40, 6, num_groups=40, top_groups=7),
    RouteSpec(1024, 5, "sigmoid", num_groups=4, top_groups=2),
    RouteSpec(16, 2, "sparsemixer", jitter=0.1),
]  # fmt: skip


def route_params(spec: RouteSpec, device: Device) -> dict[str, Any]:
    return {
        "correction": None if spec.correction is None else device.tensor(torch.from_numpy(spec.correction)),
        "num_experts": spec.num_experts, "top_k": spec.top_k, "num_groups": spec.num_groups,
        "top_groups": spec.top_groups, "sums_top_two": spec.sums_top_two,
        "is_renormalised": spec.is_renormalised, "eps": spec.eps, "scale": spec.scale, "jitter": spec.jitter,
        "kind": KINDS[spec.kind],
    }  # fmt: skip


def run_route(device: Device, spec: RouteSpec, logits: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    tokens = len(logits)
    ids, weights = (device.empty((tokens, spec.top_k), dtype) for dtype in (torch.int32, torch.float32))
    device.run(
        "route", [ids, weights], logits=device.tensor(logits), slots=device.tensor(slots), ids=ids,
        weights=weights, num_tokens=tokens, **route_params(spec, device),
    )  # fmt: skip
    return ids, weights


def check_route(device: Device, spec: RouteSpec, tokens: int) -> None:
    logits = torch.randn(tokens, spec.num_experts) * 2
    slots = torch.arange(tokens)
    slots[1::4] = -1
    ids, weights = run_route(device, spec, logits, slots)
    expected = reference.route(logits, spec)
    expected[1::4] = 0
    assert (ids[1::4] == spec.num_experts).all(), "padding has no experts"
    assert (ids.diff(dim=1) > 0)[slots >= 0].all(), "ascending"
    found = torch.zeros(tokens, spec.num_experts + 1)
    found.scatter_(1, ids.long(), weights)
    assert_equal(found[:, :-1] != 0, expected != 0)
    assert_close(found[:, :-1], expected, length=16)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.num_experts}-{spec.top_k}")
def test_routes_equal_the_reference(device: Device, spec: RouteSpec) -> None:
    for tokens in (0, 1, 3, 9):
        check_route(device, spec, tokens)


def test_among_equal_scores_the_lowest_experts_are_selected(device: Device) -> None:
    check_ties(device)


def check_ties(device: Device) -> None:
    logits = torch.zeros(2, 64)
    logits[1, 40:44] = 1.0
    logits[0, :3] = -0.0  # equals 0
    for kind in KINDS:
        ids, _ = run_route(device, RouteSpec(64, 6, kind), logits, torch.arange(2))
        assert ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 40, 41, 42, 43]]
    groups = RouteSpec(64, 3, num_groups=8, top_groups=2)
    assert run_route(device, groups, logits, torch.arange(2))[0].tolist() == [[0, 1, 2], [40, 41, 42]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_is_no_number_reaches_the_weights(device: Device, kind: str) -> None:
    logits = torch.randn(1, 40)
    logits[0, 7] = torch.nan
    ids, weights = run_route(device, RouteSpec(40, 3, kind), logits, torch.arange(1))
    assert kind == "softmax" or 7 in ids[0], "softmax makes every score NaN"
    assert weights.isnan().any()


def random_ids(tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Return each token's experts, ascending: some chosen more often, some never, and padding."""
    likely = torch.rand(num_experts) ** 4
    likely[: num_experts // 4] = 0
    likely[num_experts // 4 : num_experts // 4 + top_k] += 0.5
    chosen = [torch.multinomial(likely, top_k).sort().values for _ in range(tokens)]
    ids = torch.stack([*chosen, torch.zeros(top_k)])[:-1].int()
    ids[2::7] = num_experts
    return ids


class Plan:
    """A step's pairs in the order of experts."""

    def __init__(self, device: Device, ids: Tensor, num_experts: int, *, is_streamed: bool = False) -> None:
        count = ids.numel()
        most = device.experts_max_tiles(count, num_experts, is_streamed)
        self.pairs = device.empty(ids.shape, torch.int32)
        self.tiles = device.empty((1 + most, 4), torch.int32)
        self.sizes = {"num_pairs": count, "num_experts": num_experts, "is_streamed": is_streamed}
        device.run(
            "experts_plan", [self.pairs, self.tiles], ids=device.tensor(ids), pairs=self.pairs,
            tiles=self.tiles, **self.sizes,
        )  # fmt: skip


def check_plan(device: Device, tokens: int, top_k: int, num_experts: int, *, is_streamed: bool) -> None:
    ids = random_ids(tokens, top_k, num_experts)
    plan = Plan(device, ids, num_experts, is_streamed=is_streamed)
    order = ids.flatten().sort(stable=True)
    pairs = order.indices[order.values < num_experts]
    assert_equal(plan.pairs.flatten()[: len(pairs)], pairs.int())
    size = (
        8 if ids.numel() <= 4 * num_experts else 16 if is_streamed or ids.numel() <= 16 * num_experts else 64
    )
    if size == 64 and ids.numel() <= 32 * num_experts:
        size = 32
    expected, first = [], 0
    for expert, count in enumerate(order.values[: len(pairs)].bincount(minlength=num_experts).tolist()):
        expected += [[expert, first + start, min(size, count - start), 0] for start in range(0, count, size)]
        first += count
    assert plan.tiles[0, 0] == len(expected) <= len(plan.tiles) - 1
    assert plan.tiles[1 : 1 + len(expected)].tolist() == expected


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"),
    [(0, 2, 8), (1, 2, 8), (5, 8, 128), (37, 3, 5), (300, 2, 16), (700, 2, 33), (40, 1, 1), (60, 6, 260)],
)
def test_plans_list_each_expert_s_pairs_in_order(
    device: Device, tokens: int, top_k: int, num_experts: int, is_streamed: bool
) -> None:
    check_plan(device, tokens, top_k, num_experts, is_streamed=is_streamed)


@dataclasses.dataclass(frozen=True)
class Stack:
    """The matrices of experts [num_experts, rows, columns], as kernels read them and as values."""

    values: Tensor
    params: dict[str, Any]

    @classmethod
    def random(
        cls, device: Device, name: str, num_experts: int, rows: int, columns: int, dtype: torch.dtype
    ) -> Stack:
        if name == "plain":
            values = torch.randn(num_experts * rows, columns).to(dtype)
            params: dict[str, Any] = {
                "codes": device.tensor(values), "scales": None, "offsets": None, "group": 0,
                "scale_stride": 0, "bits": 16,
                "zero": 0, "has_wide_scales": False, "has_float_codes": False,
                "num_rows": num_experts * rows, "num_columns": columns,
            }  # fmt: skip
        else:
            source, values = random_source(name, num_experts * rows, columns)
            matrix = repack([source])
            params = weight_params(device, matrix)
        return cls(values.to(dtype).view(num_experts, rows, columns), params)


def expected_product(stack: Stack, a: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
    """Return each pair's row in float64, NaN for padding. a: [tokens, columns] or [tokens, top_k, columns]"""
    rows = a.double() if a.dim() == 3 else a.double()[:, None].expand(-1, ids.shape[1], -1)
    out = torch.full((*ids.shape, stack.values.shape[1]), torch.nan, dtype=torch.float64)
    for expert, matrix in enumerate(stack.values.double()):
        out[ids == expert] = rows[ids == expert] @ matrix.T + (0 if bias is None else bias[expert].double())
    return out


def check_product(
    device: Device,
    name: str,
    tokens: int,
    columns: int,
    inner: int,
    *,
    num_experts: int = 4,
    top_k: int = 2,
    dtype: torch.dtype = BF16,
    is_gated: bool,
    is_streamed: bool = False,
    has_bias: bool = False,
    activation: str = "silu",
    clamped: ClampedGate | None = None,
) -> None:
    rows = 2 * inner if is_gated else inner
    stack = Stack.random(device, name, num_experts, rows, columns, dtype)
    ids = random_ids(tokens, top_k, num_experts)
    plan = Plan(device, ids, num_experts, is_streamed=is_streamed)
    a = (torch.randn(tokens, *(() if is_gated else (top_k,)), columns) / columns**0.5).to(dtype)
    bias = torch.randn(num_experts, rows) if has_bias else None
    out = device.empty((tokens, top_k, inner), dtype)
    clamp = clamped or ClampedGate(0.0)
    device.run(
        "experts_product", [out], **stack.params, **plan.sizes, a=device.tensor(a),
        bias=None if bias is None else device.tensor(bias), pairs=plan.pairs, tiles=plan.tiles, out=out,
        pairs_per_row=top_k if is_gated else 1, is_gated=is_gated, activation=ACTIVATIONS.index(activation),
        limit=clamp.limit, slope=clamp.slope, offset=clamp.offset, type=TYPES[dtype],
    )  # fmt: skip
    expected = expected_product(stack, a, ids, bias)
    if is_gated:
        expected = reference.gate(expected[..., :inner], expected[..., inner:], activation, clamped)
    is_pair = ids < num_experts
    assert out[~is_pair].isnan().all(), "rows of padding are not written"
    assert_close(out[is_pair].float(), expected[is_pair], length=3, dtype=dtype)


# Tokens of four experts, two each: tiles of 8, 16, 32 and 64 pairs.
SIZES = (3, 8, 9, 31, 60, 90)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("is_gated", [False, True])
def test_products_of_plain_weights_equal_the_reference(
    device: Device, is_gated: bool, dtype: torch.dtype
) -> None:
    for tokens, columns, inner in zip(
        SIZES, (8, 264, 296, 40, 136, 1064), (8, 40, 24, 72, 200, 40), strict=True
    ):
        check_product(device, "plain", tokens, columns, inner, is_gated=is_gated, dtype=dtype)
        device.reset()


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_each_format_equal_the_reference(device: Device, name: str) -> None:
    for tokens, columns in ((2, 1280), (20, 256), (50, 512), (80, 256)):
        check_product(device, name, tokens, columns, 24, is_gated=tokens % 4 == 0)
        device.reset()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_of_mxfp4_are_exact_for_every_exponent(device: Device, dtype: torch.dtype) -> None:
    for is_streamed in (False, True):
        check_every_mxfp4(device, dtype, is_streamed=is_streamed)


def check_every_mxfp4(device: Device, dtype: torch.dtype, *, is_streamed: bool) -> None:
    """Multiply matrices of all finite weights by the unit vectors."""
    rows, columns = 64, 128
    source, values = every_mxfp4(rows, columns, most=252 if dtype is BF16 else 140)
    plan = Plan(device, torch.zeros(columns, 1, dtype=torch.int32), 1, is_streamed=is_streamed)
    a, out = device.tensor(torch.eye(columns, dtype=dtype)[:, None]), device.empty((columns, 1, rows), dtype)
    device.run(
        "experts_product", [out], **weight_params(device, repack([source])), **plan.sizes, a=a, bias=None,
        pairs=plan.pairs, tiles=plan.tiles, out=out, pairs_per_row=1, is_gated=False, activation=0, limit=0.0,
        slope=1.0, offset=0.0, type=TYPES[dtype],
    )  # fmt: skip
    assert_equal(out[:, 0], values.T.to(dtype))


@pytest.mark.parametrize("tokens", [5, 90])
def test_gates_are_clamped_and_biased(device: Device, tokens: int) -> None:
    clamped = ClampedGate(1.5, 1.702, 1.0)
    check_product(device, "plain", tokens, 64, 40, is_gated=True, has_bias=True, clamped=clamped)
    check_product(device, "MXFP4", tokens, 64, 40, is_gated=True, has_bias=True, clamped=clamped, dtype=FP16)
    check_product(device, "plain", tokens, 64, 40, is_gated=False, has_bias=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu", "relu_squared"])
def test_gates_use_each_activation(device: Device, activation: str) -> None:
    for tokens in (5, 90):
        check_product(device, "plain", tokens, 64, 24, is_gated=True, activation=activation)


def test_random_shapes_equal_the_reference(device: Device) -> None:
    for _ in range(10):
        tokens, columns, inner, num_experts = (int(torch.randint(1, end, ())) for end in (40, 60, 12, 12))
        check_product(
            device, "plain", tokens, 8 * columns, 8 * inner, num_experts=num_experts, top_k=1,
            is_gated=bool(tokens % 2), is_streamed=bool(columns % 2),
        )  # fmt: skip
        device.reset()


@pytest.mark.parametrize("name", ["plain", "Q4_1", "Q8_0", "MXFP4"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_streamed_results_have_the_same_bits_in_any_batch(device: Device, name: str, is_gated: bool) -> None:
    stack = Stack.random(device, name, 4, 48, 1312, BF16)
    ids = random_ids(70, 2, 4)
    a = torch.randn(70, *(() if is_gated else (2,)), 1312).bfloat16()

    def compute(first: int, last: int) -> Tensor:
        plan = Plan(device, ids[first:last], 4, is_streamed=True)
        out = device.empty((last - first, 2, 24 if is_gated else 48), BF16)
        device.run(
            "experts_product", [out], **stack.params, **plan.sizes, a=device.tensor(a[first:last]), bias=None,
            pairs=plan.pairs, tiles=plan.tiles, out=out, pairs_per_row=2 if is_gated else 1,
            is_gated=is_gated, activation=0, limit=0.0, slope=1.0, offset=0.0, type=TYPES[BF16],
        )  # fmt: skip
        return out.clone()

    whole = compute(0, 70)
    for first, last in ((0, 1), (3, 11), (20, 50)):
        is_pair = ids[first:last] < 4
        assert torch.equal(compute(first, last)[is_pair], whole[first:last][is_pair])


@pytest.mark.parametrize(
    "changes",
    [{"num_columns": 12}, {"num_rows": 60}, {"num_experts": 3}, {"pairs_per_row": 0}, {"bits": 5}],
    ids=str,
)
def test_what_the_kernel_does_not_compute_is_refused(device: Device, changes: dict[str, Any]) -> None:
    stack = Stack.random(device, "plain", 4, 16, 16, BF16)
    plan = Plan(device, random_ids(3, 2, 4), 4)
    params = stack.params | plan.sizes | {
        "a": device.empty((3, 16), BF16), "bias": None, "pairs": plan.pairs, "tiles": plan.tiles,
        "out": device.empty((3, 2, 8), BF16), "pairs_per_row": 2, "is_gated": True, "activation": 0,
        "limit": 0.0, "slope": 1.0, "offset": 0.0, "type": 0,
    }  # fmt: skip
    with pytest.raises(AssertionError, match="refused"):
        device.launch("experts_product", **params | changes)


def check_sum(device: Device, tokens: int, top_k: int, hidden: int, dtype: torch.dtype) -> None:
    ids = random_ids(tokens, top_k, 32)
    rows, weights = torch.randn(tokens, top_k, hidden).to(dtype), torch.rand(tokens, top_k)
    rows[ids == 32] = torch.nan
    x = torch.randn(tokens, hidden)
    out = device.tensor(x)
    device.run(
        "experts_sum", [out], rows=device.tensor(rows), ids=device.tensor(ids),
        weights=device.tensor(weights), x=out, num_tokens=tokens, num_experts=32, top_k=top_k, hidden=hidden,
        factor=0.5, type=TYPES[dtype],
    )  # fmt: skip
    terms = (rows.double() * weights.double()[..., None]).masked_fill((ids == 32)[..., None], 0)
    assert_close(out, x.double() + 0.5 * terms.sum(1), length=top_k)


def check_gated_add(device: Device, tokens: int, hidden: int) -> None:
    rows, gate, x = torch.randn(tokens, hidden), torch.randn(tokens, 1) * 3, torch.randn(tokens, hidden)
    out = device.tensor(x)
    device.run(
        "gated_add", [out], rows=device.tensor(rows), gate=device.tensor(gate), x=out, num_tokens=tokens,
        hidden=hidden, factor=0.7,
    )  # fmt: skip
    assert_close(out, x.double() + 0.7 * gate.double().sigmoid() * rows.double(), length=4)


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 8), (1, 8), (17, 1032), (3, 4104)])
def test_results_are_added_to_the_residual(device: Device, tokens: int, hidden: int) -> None:
    for top_k, dtype in ((2, BF16), (7, FP16)):
        check_sum(device, tokens, top_k, hidden, dtype)
    check_gated_add(device, tokens, hidden)
