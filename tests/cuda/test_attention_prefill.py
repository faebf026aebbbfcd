"""The CUDA kernels of prefill attention in emulation: whole prompts, chunks after a prefix, windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.cuda.paged_cache import PagedCase, Shape, assert_attended, random_shape
from tests.emulation.device import Device

FP16, FP8 = torch.float16, torch.float8_e4m3fn


def run(device: Device, shape: Shape) -> PagedCase:
    case = PagedCase(device, shape)
    device.run("attention_prefill", [case.out], **case.params())
    return case


def check(device: Device, shape: Shape) -> None:
    assert_attended(run(device, shape))


@pytest.mark.parametrize(
    "shape",
    [
        Shape([1], [1]),
        Shape([17, 3, 64], [17, 3, 64]),
        Shape([129], [129], num_heads=2, num_kv_heads=1),
        Shape([90, 40], [20, 40], dtype=FP16, block_size=32),  # a chunk after a prefix, a whole prompt
        Shape([65, 130, 1], [65, 1, 1], num_heads=3, num_kv_heads=1),  # decode rows alongside a prompt
        Shape([5, 0, 9], [5, 0, 9]),
        Shape([70], [33], num_heads=6, num_kv_heads=2, head_dim=80),
        Shape([40], [40], num_heads=1, num_kv_heads=1, head_dim=96, block_size=64),
        Shape([100], [37], num_heads=7, num_kv_heads=1, head_dim=128),
        Shape([70], [40], num_heads=2, num_kv_heads=2, head_dim=256),
        Shape([75], [30], kv_dtype=FP8),
        Shape([40], [40], kv_dtype=FP8, head_dim=128, dtype=FP16),
        Shape([150], [80], window=20),
        Shape([90], [90], window=64, num_heads=3, num_kv_heads=3),
        Shape([80], [80], magnitude=30),
        Shape([90, 20], [60, 20], soft_cap=5.0, magnitude=20),
        Shape([90, 20], [60, 20], sinks=2.0),
        Shape([40], [40], magnitude=30, sinks=80.0),  # above all scores
        Shape([90, 20], [60, 20], has_slopes=True, num_heads=6),
        Shape([150], [80], window=33, sinks=1.0, num_heads=16, kv_dtype=FP8),
        Shape([70], [40], window=32, soft_cap=50.0, head_dim=256, num_heads=2, num_kv_heads=1),
    ],
    ids=str,
)
def test_rows_equal_the_reference(device: Device, shape: Shape) -> None:
    check(device, shape)


@pytest.mark.parametrize("seed", range(6))
def test_any_kind_of_attention_equals_the_reference(device: Device, seed: int) -> None:
    torch.manual_seed(seed)
    check(device, random_shape(150, is_decode=False))


def test_a_prompt_has_the_same_bits_however_it_is_cut(device: Device) -> None:
    whole = run(device, Shape([150], [150], num_heads=3, num_kv_heads=1))
    for start, stop in ((0, 41), (41, 128), (128, 150)):
        out = device.empty((stop - start, 3, 64), torch.bfloat16)
        part = whole.params(
            q=whole.q[start:stop], out=out, num_tokens=stop - start, max_query_len=stop - start,
            query_start=device.tensor(torch.tensor([0, stop - start], dtype=torch.int32)),
            context_len=device.tensor(torch.tensor([stop], dtype=torch.int32)),
        )  # fmt: skip
        device.run("attention_prefill", [out], **part)
        assert torch.equal(out.view(torch.int16), whole.out[start:stop].view(torch.int16))


@pytest.mark.parametrize("sinks", [None, 1.0])
def test_rows_that_see_no_key_are_zero(device: Device, sinks: float | None) -> None:
    """Padding has a context of 0; of two queries with a context of 1, the first sees nothing."""
    case = PagedCase(device, Shape([3, 3], [3, 3], sinks=sinks))
    out = device.empty(tuple(case.q.shape), torch.bfloat16)
    context_len = device.tensor(torch.tensor([0, 1], dtype=torch.int32))
    device.run("attention_prefill", [out], **case.params(out=out, context_len=context_len))
    assert out.float().abs().amax(dim=(1, 2)).gt(0).tolist() == [False] * 5 + [True]
    assert not out.isnan().any()


FAULTS = [
    Fault(
        "the block table is read one entry late",
        "attention_prefill.cuh",
        "table[position / block_size]",
        "table[position / block_size + 1]",
        "bounds",
    ),
    Fault(
        "a token past the context is brought",
        "attention_prefill.cuh",
        "position >= begin && position < end",
        "position >= begin && position < end + 1",
        "bounds",
    ),
    Fault(
        "rows are brought before it is known where they lie",
        "attention_prefill.cuh",
        "  __syncthreads();\n  Kernel::load_tile(",
        "  Kernel::load_tile(",
        "race|uninit",
    ),
    Fault(
        "where rows lie is overwritten while it is read",
        "attention_prefill.cuh",
        "token + 2 * Kernel::kKeys, begin",
        "token + Kernel::kKeys, begin",
        "race",
    ),
    Fault(
        "values are read where keys lie",
        "attention_prefill.cuh",
        "row, i, at + cache.value_offset, is_valid",
        "row, i, at, is_valid",
        "result",
    ),
    Fault(
        "a tile is read before it is there", "attention_prefill.cuh", "    async_wait<0>();\n", "", "async"
    ),
    Fault(
        "warps do not wait for each other's copies",
        "attention_prefill.cuh",
        "    __syncthreads();  // all threads see this tile",
        "    __syncwarp();  // all threads see this tile",
        "async|race|uninit",
    ),
    Fault(
        "the stage in use is refilled",
        "attention_prefill.cuh",
        "tiles + (stage ^ 1) * 2",
        "tiles + stage * 2",
        "async",
    ),
    Fault(
        "queries past the last are read",
        "attention_prefill.cuh",
        "from < num_rows ? q + offset : q, from < num_rows",
        "q + offset, true",
        "bounds",
    ),
    Fault(
        "rows past the last are written",
        "attention_prefill.cuh",
        "    if (own_row >= num_rows) continue;\n",
        "",
        "bounds",
    ),
    Fault(
        "a query sees the token after it",
        "attention_prefill.cuh",
        "stop[half] = position[half] + 1 - token",
        "stop[half] = position[half] + 2 - token",
        "result",
    ),
    Fault(
        "unmasked one tile too soon", "attention_prefill.cuh", "<= nearest + 1", "<= nearest + 64", "result"
    ),
    Fault(
        "the window is one short",
        "attention_prefill.cuh",
        "position[half] + 1 - window",
        "position[half] + 2 - window",
        "result",
    ),
    Fault(
        "blocks behind the window are read",
        "attention_prefill.cuh",
        "window > 0 ? max(nearest - window + 1, 0) : 0",
        "0",
        "bounds",
    ),
    Fault(
        "the running maximum is dropped",
        "attention_tile.cuh",
        "fmaxf(state.max[half], largest * scores.scale)",
        "largest * scores.scale",
        "result",
    ),
    Fault(
        "one key too many is seen",
        "attention_tile.cuh",
        "key >= visible.stop[i / 2]",
        "key > visible.stop[i / 2]",
        "result",
    ),
    Fault(
        "values are not transposed",
        "attention_tile.cuh",
        "load_matrix_x4_transposed(\n          b,",
        "load_matrix_x4(\n          b,",
        "result",
    ),
    Fault(
        "scores are not capped",
        "attention_tile.cuh",
        "if (scores.bound != 0)",
        "if (scores.bound < 0)",
        "result",
    ),
    Fault(
        "a row's sink is another head's",
        "attention_prefill.cuh",
        "inverse_sum(p, head,",
        "inverse_sum(p, kv_head * group,",
        "result",
    ),
    Fault(
        "a row's slope is another head's",
        "attention_prefill.cuh",
        "kv_head * group + (row + 8) % group)",
        "kv_head * group + row % group)",
        "result",
    ),
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def all_kinds(device: Device) -> None:
        check(device, Shape([144], [70], num_heads=3, num_kv_heads=1, window=75))
        check(device, Shape([144], [40], window=20))
        check(device, Shape([144], [3], magnitude=200))  # a maximum that falls by more than floats can hold
        check(device, Shape([40], [30], soft_cap=5.0, magnitude=20))
        check(device, Shape([40], [30], sinks=3.0, num_heads=3, num_kv_heads=1))
        check(device, Shape([40], [30], has_slopes=True, num_heads=3, num_kv_heads=1))

    assert_caught(replace(fault, kernel="attention_prefill_bf16.cu"), all_kinds)
