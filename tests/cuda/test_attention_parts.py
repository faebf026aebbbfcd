"""The CUDA kernels around a library's attention in emulation: gathering keys and values, merging parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.cuda.paged_cache import PagedCase, Shape
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close, assert_equal

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def check_gather(device: Device, shape: Shape, num_zeros: int) -> None:
    case = PagedCase(device, shape)
    context, spare = shape.contexts[0], 5
    num_rows = context + num_zeros
    out = device.empty((2, shape.num_kv_heads, num_rows + spare, shape.head_dim), shape.dtype)
    device.run(
        "attention_gather", [out], kv=case.kv, block_table=case.block_table[0], out=out, context_len=context,
        num_rows=num_rows, capacity=num_rows + spare, num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim, num_blocks=case.kv.shape[0], block_size=shape.block_size,
        type=TYPES[shape.dtype], kv_type=TYPES[case.kv.dtype],
    )  # fmt: skip
    for plane, wanted in enumerate((case.keys[0], case.values[0])):
        stored = (wanted / case.kv_scales[plane]).to(shape.dtype)
        assert_equal(out[plane, :, :context], stored.transpose(0, 1))
    assert_equal(out[:, :, context:num_rows], torch.zeros_like(out[:, :, context:num_rows]))
    assert out[:, :, num_rows:].isnan().all()


def check_merge(
    device: Device, tokens: int, heads: int, head_dim: int, parts: int, dtype: torch.dtype
) -> None:
    given = [device.tensor(torch.randn(tokens, heads, head_dim).to(dtype)) for _ in range(parts)]
    # Part of the rows of each head; sums far apart, so that some parts count for nothing.
    sums = [device.tensor(torch.randn(heads, tokens + part) * 9 + 300) for part in range(parts)]
    out = device.empty((tokens, heads, head_dim), dtype)
    device.run(
        "attention_merge", [out], parts=given, lses=sums, lse_strides=[each.shape[1] for each in sums],
        out=out, num_parts=parts, num_tokens=tokens, num_heads=heads, head_dim=head_dim, value_scale=0.5,
        type=TYPES[dtype],
    )  # fmt: skip
    lses = torch.stack([each[:, :tokens].T for each in sums])
    weights = lses.double().softmax(0)[..., None]
    expected = (torch.stack(given).double() * weights).sum(0) / 2
    assert_close(out.float(), expected, length=2, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "num_zeros"),
    [
        (Shape([1], [1]), 0),
        (Shape([37], [1], head_dim=80, num_kv_heads=3, num_heads=3), 11),
        (Shape([129], [1], block_size=32, dtype=FP16, head_dim=128), 200),
        (Shape([70], [1], kv_dtype=FP8), 58),
        (Shape([33], [1], kv_dtype=FP8, dtype=FP16, head_dim=96), 0),
    ],
    ids=str,
)
def test_keys_and_values_are_gathered_and_padded(device: Device, shape: Shape, num_zeros: int) -> None:
    check_gather(device, shape, num_zeros)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "parts"), [(0, 2, 64, 2), (1, 1, 64, 1), (7, 3, 80, 2), (33, 4, 128, 16)]
)
def test_parts_are_merged_by_their_sums(
    device: Device, tokens: int, heads: int, head_dim: int, parts: int, dtype: torch.dtype
) -> None:
    check_merge(device, tokens, heads, head_dim, parts, dtype)


@pytest.mark.parametrize(
    "changes", [{"num_parts": 17}, {"num_parts": 0}, {"head_dim": 12}, {"num_tokens": 1 << 31}], ids=str
)
def test_what_the_kernel_does_not_merge_is_refused(device: Device, changes: dict[str, Any]) -> None:
    part, sums = device.empty((1, 1, 16), BF16), device.empty((1, 1), torch.float32)
    params: dict[str, Any] = {
        "parts": [part], "lses": [sums], "lse_strides": [1], "out": part, "num_parts": 1, "num_tokens": 1,
        "num_heads": 1, "head_dim": 16, "value_scale": 1.0, "type": 0,
    }  # fmt: skip
    with pytest.raises(AssertionError, match="refused"):
        device.launch("attention_merge", **params | changes)


WAIT = ("  wait_for_previous_kernel();\n", "", "dependent")
GATHER = [
    Fault(what, "attention_gather.cu", old, new, kind)
    for what, old, new, kind in (
        ("rows past the end are read", "if (row >= p.context_len) continue;", "", "bounds"),
        ("more is written", "if (at < p.num_rows * vectors) ", "", "bounds|result|race|blocks"),
        ("the place in the block is wrong", "p.block_size + row -", "p.block_size + 0 -", "bounds|result"),
        ("threads do not wait for the kernel before", *WAIT),
    )
]
MERGE = [
    Fault(what, "attention_merge.cu", old, new, kind)
    for what, old, new, kind in (
        ("one part is left out", "sum += weight;", "if (part) sum += weight;", "result"),
        ("sums overflow", " - largest)", ")", "result"),
        ("rows past the last are merged", "if (token >= p.num_tokens) return;", "", "bounds"),
        ("threads do not wait for the kernel before", *WAIT),
    )
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", GATHER, ids=str)
def test_a_fault_planted_in_the_gathering_is_caught(fault: Fault) -> None:
    assert_caught(fault, lambda device: check_gather(device, Shape([37], [1]), 11))


@pytest.mark.faults
@pytest.mark.parametrize("fault", MERGE, ids=str)
def test_a_fault_planted_in_the_merge_is_caught(fault: Fault) -> None:
    assert_caught(fault, lambda device: check_merge(device, 7, 3, 64, 2, BF16))
