"""Faults planted in the CUDA kernels of routed experts, which the checks of `test_experts` must catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.cuda import test_experts
from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import Device
from tgi_asgi.ops import ClampedGate

pytestmark = pytest.mark.faults


def check_routes(device: Device) -> None:
    for spec in test_experts.SPECS[2], test_experts.SPECS[5], test_experts.SPECS[8]:
        test_experts.check_route(device, spec, 6)
    test_experts.check_ties(device)
    test_experts.check_plan(device, 700, 2, 33, is_streamed=True)


def check_products(device: Device) -> None:
    for tokens in (9, 90):
        test_experts.check_product(device, "plain", tokens, 1320, 40, is_gated=True, has_bias=True)
        test_experts.check_product(device, "Q4_1", tokens, 1280, 24, is_gated=False)
    test_experts.check_product(
        device, "plain", 5, 64, 8, is_gated=True, has_bias=True, clamped=ClampedGate(0.2, 1.7, 1.0)
    )


def check_floats(device: Device) -> None:
    for is_streamed in (True, False):
        test_experts.check_every_mxfp4(device, torch.bfloat16, is_streamed=is_streamed)


def check_float16(device: Device) -> None:
    test_experts.check_every_mxfp4(device, torch.float16, is_streamed=True)


def check_sums(device: Device) -> None:
    test_experts.check_sum(device, 9, 3, 1032, torch.bfloat16)
    test_experts.check_gated_add(device, 3, 516)


ROUTE, STREAM, TILE = "route.cu", "experts_stream.cu", "experts_tile.cu"
FAULTS = (
    [
        (check_routes, Fault(*fault))
        for fault in [
            ("padding has experts", ROUTE, "if (p.slots[token] < 0) {", "if (false) {", "result"),
            (
                "ties go up",
                ROUTE,
                "<< 32 | ~uint32_t(index)",
                "<< 32 | uint32_t(~index & 7)",
                "result|bounds|uninit",
            ),
            ("-0 is less than 0", ROUTE, "__float_as_uint(key + 0.0f)", "__float_as_uint(key)", "result"),
            (
                "all groups compete",
                ROUTE,
                "expert < num_experts && !is_kept",
                "!is_kept && p.eps > 1",
                "result",
            ),
            ("a group is its best expert", ROUTE, "? best + second : best", "? best : best", "result"),
            ("weights are not renormalised", ROUTE, "p.is_renormalised ?", "false ?", "result"),
            ("ids go beyond a warp's", ROUTE, "    before += __popc(all);\n", "", "result|race|uninit"),
            (
                "experts that were chosen count",
                ROUTE,
                "if (!before.has(i) && !is_far)",
                "if ((!before.has(i) || true) && !is_far)",
                "result",
            ),
            (
                "far experts count",
                ROUTE,
                "!before.has(i) && !is_far",
                "!before.has(i) && (!is_far || true)",
                "result",
            ),
            ("lists begin at 0", ROUTE, "    pairs_before += counts[i];\n", "", "result|blocks|race"),
            ("a list stays where it is", ROUTE, "    place += __popc(all);\n", "", "result|race"),
            ("tiles are full", ROUTE, "min(tile_pairs, count - first)", "tile_pairs", "result"),
            (
                "parts are not awaited",
                ROUTE,
                "own[warp] = mine;\n  __syncthreads();",
                "own[warp] = mine;",
                "race",
            ),
        ]
    ]
    + [
        (check_products, Fault(*fault))
        for fault in [
            (
                "pairs past the last are read",
                STREAM,
                "is_pair[j] ? p.pairs",
                "true ? p.pairs",
                "uninit|bounds|wild",
            ),
            (
                "rows are pairs'",
                STREAM,
                "divide_narrow(pair, p.pairs_per_row)",
                "int64_t{pair}",
                "bounds|result",
            ),
            (
                "the queue is read too early",
                STREAM,
                "async_wait<Q::kStages - 2>",
                "async_wait<Q::kStages - 1>",
                "async",
            ),
            (
                "sums are written over the queue",
                STREAM,
                "  __syncthreads();  // the queue is no longer needed\n",
                "",
                "race|async",
            ),
            (
                "pairs past the last are written",
                STREAM,
                "pair >= tile.count || first",
                "first",
                "uninit|bounds|wild|blocks|race|result",
            ),
            ("the gate is the up", STREAM, "sum_of(pair, 16 + column)", "sum_of(pair, column)", "result"),
            ("a part is missing", STREAM, "part = 0; part < kParts", "part = 1; part < kParts", "result"),
            ("scales are a step late", STREAM, "column_of(i + 1), groups", "column_of(i), groups", "result"),
            (
                "rows past the last are read",
                "experts.cuh",
                "is_inside && exists_[k]",
                "is_inside",
                "bounds",
                STREAM,
            ),
            (
                "all have the first expert",
                "experts.cuh",
                "whole_row = expert * rows.count + row",
                "whole_row = row",
                "result",
                STREAM,
            ),
            (
                "rows share a scale",
                "experts.cuh",
                "zero, high_group, upper",
                "zero, low_group, upper",
                "result",
                STREAM,
            ),
            ("ups are not clamped", "experts.cuh", "up < -p.limit ? -p.limit : up", "up", "result", STREAM),
            (
                "stages are overwritten",
                TILE,
                "    __syncthreads();  // all see",
                "    // all see",
                "race|async|uninit",
            ),
            (
                "the last columns are exceeded",
                TILE,
                "if (first >= rows.columns) continue;",
                "",
                "bounds|blocks|race|result",
            ),
            ("warps' sums overlap", TILE, "column / width * 32", "column / width * 16", "result|uninit"),
            (
                "biases are one row on",
                TILE,
                "rows.second + first + k;",
                "rows.second + first + k + 1;",
                "result|bounds|uninit",
            ),
        ]
    ]
    + [
        (check_floats, Fault(*fault))
        for fault in [
            ("codes change places", "codes.cuh", "up = 12 - 4 * k", "up = 4 * k", "result", STREAM),
            ("signs are lost", "codes.cuh", "(codes << (12 - 4 * k) & 0x80008000u) | ", "", "result", STREAM),
            ("a scale is denormal", "codes.cuh", "e < 2 ?", "e < 1 ?", "result", STREAM),
            (
                "scales past the last are read",
                "experts.cuh",
                "return exists ? static_cast<const e8m0*>(m.scales)[place] : Loaded{};",
                "return static_cast<const e8m0*>(m.scales)[place];",
                "bounds",
                STREAM,
            ),
            (
                "weights have no scale",
                "experts.cuh",
                "multiply_pairs<Element>(scaled, group.second)",
                "scaled",
                "result",
                TILE,
            ),
        ]
    ]
    + [
        (check_float16, Fault(*fault, STREAM, "fp16"))
        for fault in [
            ("codes are shifted too little", "codes.cuh", "? 6 : 3", "? 6 : 2", "result"),
            ("small scales vanish", "experts.cuh", "e < 127 ? e + 12", "e < 90 ? e + 12", "result"),
            ("zeros become NaN", "experts.cuh", "min(e - 1, 142u)", "e - 1", "result"),
        ]
    ]
    + [
        (check_sums, Fault(*fault))
        for fault in [
            (
                "padding is added",
                "experts.cu",
                "if (id < 0 || id >= p.num_experts)",
                "if (id < -7)",
                "result",
            ),
            (
                "the factor is left out",
                "experts.cu",
                "fmaf(p.factor, sum[k], values[k])",
                "sum[k] + values[k]",
                "result",
            ),
            (
                "the gate is open",
                "experts.cu",
                "p.factor * __fdividef(1.0f, 1.0f + expf(-p.gate[token]))",
                "p.factor",
                "result",
            ),
        ]
    ]
)


@pytest.mark.parametrize(
    ("check", "fault"), FAULTS, ids=lambda value: str(value) if isinstance(value, Fault) else ""
)
def test_a_planted_fault_is_caught(check: Callable[[Device], None], fault: Fault) -> None:
    assert_caught(fault, check)
