"""The CUDA kernels of decode attention in emulation: the plan, the split over the context, the merge."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.cuda.paged_cache import PagedCase, Shape, assert_attended, random_shape
from tests.emulation.device import Device

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def run(device: Device, shape: Shape) -> PagedCase:
    case = PagedCase(device, shape)
    num_bytes = device.attention_workspace_bytes(
        len(shape.contexts), case.block_table.shape[1], shape.block_size, shape.num_heads, shape.head_dim
    )
    workspace = device.empty((num_bytes,), torch.uint8)
    params = case.params(plan=new_plan(device, shape), workspace=workspace)
    device.launch("attention_plan", **params)
    device.run("attention_decode", [case.out, workspace], **params)
    return case


def new_plan(device: Device, shape: Shape) -> torch.Tensor:
    return device.empty((len(shape.contexts) + 1,), torch.int32)


def check(device: Device, shape: Shape) -> None:
    assert_attended(run(device, shape))


def one_each(*contexts: int, **kinds: object) -> Shape:
    return Shape(contexts, [1] * len(contexts), **kinds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape",
    [
        one_each(1),
        one_each(15, 16, 17, 3, 129),
        one_each(0, 1, 0),
        one_each(255, 256, 257, 600),
        one_each(65, dtype=FP16),
        one_each(33, 70, num_heads=9, num_kv_heads=3, block_size=32),
        one_each(40, num_heads=7, num_kv_heads=1, head_dim=80),
        one_each(20, num_heads=2, num_kv_heads=2, head_dim=96, block_size=64),
        one_each(100, 35, num_heads=6, num_kv_heads=2, head_dim=128),
        one_each(50, num_heads=16, num_kv_heads=1, head_dim=256),
        one_each(130, 40, num_heads=8, num_kv_heads=1, head_dim=256),
        one_each(300, 20, num_heads=12, num_kv_heads=1, head_dim=128),
        one_each(1200, 300, num_heads=1, num_kv_heads=1),  # many chunks
        one_each(4400, num_heads=1, num_kv_heads=1, head_dim=256),  # more than are loaded at once
        one_each(5, *[0] * 40, 20, *[0] * 31, 300, 0),  # looked for among more than 32
        one_each(70, 300, kv_dtype=FP8),
        one_each(70, 9, kv_dtype=FP8, head_dim=80, num_heads=12, num_kv_heads=1),
        one_each(70, 9, kv_dtype=FP8, head_dim=96),
        one_each(50, 130, kv_dtype=FP8, head_dim=256, num_heads=9, num_kv_heads=1),
        one_each(47, kv_dtype=FP8, head_dim=128, dtype=FP16),
        one_each(300, 40, 7, window=33),
        one_each(600, window=100, block_size=32),
        one_each(290, magnitude=30),
        one_each(300, 1, 40, soft_cap=5.0, magnitude=20),
        one_each(300, 1, 40, sinks=2.0),
        one_each(270, magnitude=30, sinks=80.0),  # above all scores
        one_each(270, magnitude=30, sinks=-200.0),  # below all scores
        one_each(300, 17, has_slopes=True, num_heads=6),
        one_each(600, 40, window=128, sinks=1.0, num_heads=16, kv_dtype=FP8),
        one_each(70, 40, window=32, soft_cap=50.0, head_dim=256, num_heads=2, num_kv_heads=1),
    ],
    ids=str,
)
def test_rows_equal_the_reference(device: Device, shape: Shape) -> None:
    check(device, shape)


@pytest.mark.parametrize("seed", range(6))
def test_any_kind_of_attention_equals_the_reference(device: Device, seed: int) -> None:
    torch.manual_seed(seed)
    check(device, random_shape(400, is_decode=True))


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(device: Device) -> None:
    shape = one_each(300, 64, 513, 31)
    case = run(device, shape)
    together = case.out.clone()
    workspace, plan = device.empty((1 << 20,), torch.uint8), device.empty((2,), torch.int32)
    for index in range(4):
        out = device.empty(case.out.shape[1:], shape.dtype)
        alone = case.params(
            q=case.q[index], out=out, plan=plan, workspace=workspace, context_len=case.context_len[index:],
            block_table=case.block_table[index], num_tokens=1, num_sequences=1,
        )  # fmt: skip
        device.launch("attention_plan", **alone)
        device.run("attention_decode", [out, workspace], **alone)
        assert torch.equal(out.view(torch.int16), together[index].view(torch.int16))


def test_chunks_grow_with_the_context_and_the_workspace_holds_them_all(device: Device) -> None:
    lengths = [1, 128, 129, 2048, 2049, 8192, 8193, 8448, 32768, 32769, 40000]
    stride = 40000 // 16
    num_bytes = device.attention_workspace_bytes(len(lengths), stride, 16, 1, 64)
    case = PagedCase(device, one_each(*[1] * len(lengths)))
    plan = new_plan(device, case.shape)
    contexts = device.tensor(torch.tensor(lengths, dtype=torch.int32))
    params = case.params(context_len=contexts, block_table_stride=stride, plan=plan)
    device.launch("attention_plan", **params)
    counts = [stop - start for start, stop in pairwise(plan.tolist())]
    assert counts == [1, 1, 2, 16, 9, 32, 17, 17, 64, 33, 40]
    assert num_bytes >= len(lengths) * max(counts) * 66 * 4


FAULTS = [
    Fault(
        "the block table is read one entry late",
        "attention_decode.cuh",
        "token / block_size];",
        "token / block_size + 1];",
        "bounds",
    ),
    Fault(
        "the next sequence's table is read",
        "attention_decode.cuh",
        "p.block_table[sequence * p.block_table_stride +",
        "p.block_table[(sequence + 1) * p.block_table_stride +",
        "bounds",
    ),
    Fault(
        "a token past the context is brought",
        "attention_decode.cuh",
        "token + row < item.end;",
        "token + row < item.end + 1;",
        "bounds",
    ),
    Fault(
        "the first tile is waited for too little",
        "attention_decode.cuh",
        "async_wait<1>()",
        "async_wait<2>()",
        "async",
    ),
    Fault(
        "later tiles are waited for too little",
        "attention_decode.cuh",
        "async_wait<0>()",
        "async_wait<1>()",
        "async",
    ),
    Fault(
        "the first tile's group is not committed",
        "attention_decode.cuh",
        "shared->tiles, 0);\n  async_commit();",
        "shared->tiles, 0);",
        "async",
    ),
    Fault(
        "warps do not wait for each other's copies of the first tile",
        "attention_decode.cuh",
        "      __syncthreads();  // the first tile is there",
        "      __syncwarp();  // the first tile is there",
        "race|async|uninit",
    ),
    Fault(
        "warps do not wait for each other's copies of later tiles",
        "attention_decode.cuh",
        "      __syncthreads();  // the tile is there for all",
        "      __syncwarp();  // the tile is there for all",
        "race|async|uninit",
    ),
    Fault(
        "the next item's queries replace the present ones",
        "attention_decode.cuh",
        "shared->queries[parity ^ 1]",
        "shared->queries[parity]",
        "async|race|result|uninit",
    ),
    Fault(
        "the stage in use is refilled",
        "attention_decode.cuh",
        "tile + 1, shared->tiles, stage ^ 1)",
        "tile + 1, shared->tiles, stage)",
        "async",
    ),
    Fault(
        "the stage in use is refilled with the next item",
        "attention_decode.cuh",
        "next, 0, shared->tiles, stage ^ 1)",
        "next, 0, shared->tiles, stage)",
        "async|race",
    ),
    Fault(
        "an item is looked for among 32 sequences only",
        "attention_decode.cuh",
        "last == kWarpSize - 1;)",
        "last == kWarpSize - 1; --last)",
        "bounds|uninit|result",
    ),
    Fault(
        "a rest beyond the group is stored",
        "attention_decode.cuh",
        "if (row < group) out[",
        "if (row <= group) out[",
        "result|race|bounds|uninit|blocks",
    ),
    Fault(
        "weights are computed before all maxima are there",
        "attention_decode_tile.cuh",
        "    __syncthreads();  // the maxima",
        "    __syncwarp();  // the maxima",
        "uninit|race",
    ),
    Fault(
        "values are multiplied before all weights are there",
        "attention_decode_tile.cuh",
        "    __syncthreads();  // the weights",
        "    __syncwarp();  // the weights",
        "uninit|race",
    ),
    Fault(
        "the running maximum is dropped",
        "attention_decode_tile.cuh",
        "float largest = max[half];",
        "float largest = -INFINITY;",
        "result",
    ),
    Fault(
        "one key too many is seen",
        "attention_decode_tile.cuh",
        "key >= stop)",
        "key > stop)",
        "result",
    ),
    Fault(
        "values are not transposed",
        "attention_decode_tile.cuh",
        "load_matrix_x4_transposed(a[1], at +",
        "load_matrix_x4(a[1], at +",
        "result",
    ),
    Fault(
        "sums are corrected by another row's factor",
        "attention_decode_tile.cuh",
        "lane() % 4 * 8 + 4)",
        "lane() % 4 * 8)",
        "result",
    ),
    Fault(
        "8-bit values of two head dimensions are mixed up",
        "attention_decode_tile.cuh",
        "0x3120",
        "0x3210",
        "result",
        "attention_decode_bf16_fp8.cu",
    ),
    Fault(
        "queries of 8-bit keys are in the order of 16-bit ones",
        "attention_decode_tile.cuh",
        "const uint2 four = chunk[column % 2];",
        "const uint2 four = chunk[1 - column % 2];",
        "result",
        "attention_decode_bf16_fp8.cu",
    ),
    Fault(
        "the merge reads the next sequence's chunk",
        "attention_decode_merge.cuh",
        "i >= count || column",
        "i > count || column",
        "result|uninit|bounds",
    ),
    Fault(
        "the merge weighs with the next sequence's sum",
        "attention_decode_merge.cuh",
        "lane < min(count, M::kLoads)",
        "lane <= min(count, M::kLoads)",
        "result|uninit|bounds",
    ),
    Fault(
        "only the last sixteen chunks count",
        "attention_decode_merge.cuh",
        "sum = sum * own + warp",
        "sum = warp",
        "result",
    ),
    Fault(
        "dimensions past the last are merged",
        "attention_decode_merge.cuh",
        "if (column >= M::kColumns) continue;",
        "if (column > M::kColumns) continue;",
        "result|blocks|bounds|race",
    ),
    Fault(
        "the window begins one late",
        "attention_context.cuh",
        "max(end - p.window, int64_t{0})",
        "max(end - p.window + 1, int64_t{0})",
        "result",
    ),
    Fault(
        "the window ends one early",
        "attention_context.cuh",
        "max(end - p.window, int64_t{0})",
        "max(end - p.window - 1, int64_t{0})",
        "result",
    ),
    Fault(
        "the window is not minded",
        "attention_context.cuh",
        "p.window > 0 ? max(end - p.window, int64_t{0}) : 0",
        "0",
        "bounds",
    ),
    Fault(
        "scores are not capped",
        "attention_decode_tile.cuh",
        "if (scores.bound != 0)",
        "if (scores.bound < 0)",
        "result",
    ),
    Fault(
        "the cap is off by the base of the exponents",
        "attention_tile.cuh",
        "bound = __fdividef(p.soft_cap * kLog2E, scale)",
        "bound = __fdividef(p.soft_cap, scale)",
        "result",
    ),
    Fault("the sinks are left out", "attention_tile.cuh", "p.sinks != nullptr", "false", "result"),
    Fault(
        "a sink's base is not the scores'",
        "attention_tile.cuh",
        "p.sinks[head] * kLog2E",
        "p.sinks[head]",
        "result",
    ),
    Fault("a sink is the next head's", "attention_tile.cuh", "p.sinks[head]", "p.sinks[head ^ 1]", "result"),
    Fault(
        "distances begin at the chunk's end",
        "attention_decode.cuh",
        "item.context_end - token,",
        "item.end - token,",
        "result",
    ),
    Fault(
        "both of a lane's rows have one slope",
        "attention_tile.cuh",
        "p.slopes[min(other_head, p.num_heads - 1)]",
        "p.slopes[min(head, p.num_heads - 1)]",
        "result",
    ),
    Fault(
        "chunks overlap the next sequence's",
        "attention_decode.cu",
        "p.plan[sequence + 1] = total + before;",
        "p.plan[sequence + 1] = total + before - own;",
        "result",
    ),
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    if fault.file.endswith(".cuh") and not fault.kernel:
        fault = replace(fault, kernel="attention_decode_bf16.cu")

    def all_kinds(device: Device) -> None:
        check(
            device, one_each(300, 40, 17, magnitude=200)
        )  # a maximum that falls by more than floats can hold
        check(device, one_each(300, 40, 17, window=20))
        check(device, one_each(40, 300, soft_cap=5.0, magnitude=20))
        check(device, one_each(40, 300, sinks=3.0))
        check(device, one_each(300, num_heads=12, num_kv_heads=1, has_slopes=True))
        check(device, one_each(40, 300, kv_dtype=FP8, num_heads=16))
        check(device, one_each(5, *[0] * 40, 300))
        check(device, one_each(4400, 300, num_heads=1, num_kv_heads=1))

    assert_caught(fault, all_kinds)
