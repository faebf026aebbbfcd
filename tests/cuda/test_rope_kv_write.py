"""The CUDA kernel rope_kv_write in emulation: head norms, rotation, and where keys and values are written."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close, assert_equal
from tests.reference.layers import norm as normed
from tests.reference.layers import rotate
from tests.support.eager_ops import norm_weight
from tgi_asgi.ops import NormWeight

HEADS, KV_HEADS, BLOCKS, EPS = 5, 2, 4, 1e-6
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """A kind of norm of query and key heads."""

    has_bias: bool = False
    is_each: bool = False  # weights for each head
    is_last: bool = False

    def make(self, heads: int, head_dim: int) -> NormWeight:
        """Make a norm with random weights, and with a bias if this kind has one."""
        count = heads * head_dim if self.is_each else head_dim
        return norm_weight(torch.randn(count), EPS, torch.randn(count) if self.has_bias else None)


def check(
    device: Device,
    tokens: int,
    head_dim: int,
    rotary_dim: int,
    *,
    dtype: torch.dtype = BF16,
    kv_dtype: torch.dtype = BF16,
    norm: HeadNorm | None = None,
    block_size: int = 16,
    padding: tuple[int, ...] = (),
) -> None:
    heads = HEADS + 2 * KV_HEADS
    qkv = device.tensor((torch.randn(tokens, heads, head_dim) + 0.5).to(dtype))
    positions = device.tensor(torch.randint(50, (tokens,), dtype=torch.int32))
    slots = torch.randperm(BLOCKS * block_size)[:tokens]
    slots[list(padding)] = -1
    angles = torch.rand(50, rotary_dim // 2) * 6
    cos, sin = device.tensor(angles.cos()), device.tensor(angles.sin())
    norms = None if norm is None else [norm.make(count, head_dim) for count in (HEADS, KV_HEADS)]
    arrays = [None] * 4 if norms is None else [norms[0].weight, norms[1].weight, norms[0].bias, norms[1].bias]
    parts = [None if array is None else device.tensor(torch.from_numpy(array)) for array in arrays]
    is_last = norm is not None and norm.is_last
    kv = device.empty((BLOCKS, 2, KV_HEADS, block_size, head_dim), kv_dtype)
    q = device.empty((tokens, HEADS, head_dim), dtype)
    scales = (0.5, 2.0) if kv_dtype is FP8 else (1.0, 1.0)
    written = slots[slots >= 0]
    untouched = torch.ones(BLOCKS * block_size, dtype=torch.bool).index_fill(0, written, False)
    for slot in untouched.nonzero()[:, 0].tolist():
        for plane in range(2):
            for head in range(KV_HEADS):
                device.forbid(kv[slot // block_size, plane, head, slot % block_size])
    device.run(
        "rope_kv_write", [q, kv], qkv=qkv, positions=positions, slots=device.tensor(slots), cos=cos, sin=sin,
        q_norm=parts[0], k_norm=parts[1], q_bias=parts[2], k_bias=parts[3], is_norm_last=is_last,
        norm_stride=head_dim if norm is not None and norm.is_each else 0, q=q, kv=kv, num_tokens=tokens,
        num_positions=50, num_heads=HEADS,
        num_kv_heads=KV_HEADS, head_dim=head_dim, rotary_dim=rotary_dim, num_blocks=BLOCKS,
        block_size=block_size, eps=EPS, key_scale=scales[0], value_scale=scales[1], type=TYPES[dtype],
        kv_type=TYPES[kv_dtype],
    )  # fmt: skip
    query, key, value = qkv.double().split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    place = positions.long()
    turned = []
    for index, x in enumerate((query, key)):
        if norms is None:
            turned.append(rotate(x, cos[place], sin[place]))
        elif is_last:
            turned.append(normed(rotate(x, cos[place], sin[place]), norms[index]))
        else:
            turned.append(rotate(normed(x, norms[index]), cos[place], sin[place]))
    assert_close(q.float(), turned[0], length=2, dtype=dtype)
    rows = (slots >= 0).nonzero()[:, 0]
    stored = kv.float()[written // block_size, :, :, written % block_size]  # [n, 2, KV_HEADS, head_dim]
    assert_close(stored[:, 0], turned[1][rows] / scales[0], length=2, dtype=kv_dtype)
    assert_equal(stored[:, 1], (value[rows] / scales[1]).float().to(kv_dtype).float())


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["same", "fp8"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (80, 32), (80, 20), (96, 96), (256, 256), (256, 4)]
)
def test_queries_keys_and_values_land_rotated_where_the_slots_say(
    device: Device, head_dim: int, rotary_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    check(device, 7, head_dim, rotary_dim, dtype=dtype, kv_dtype=kv_dtype or dtype)


@pytest.mark.parametrize("is_last", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("is_each", [False, True], ids=["all", "each"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 32), (80, 0), (80, 20)])
def test_heads_are_normed_before_or_behind_their_rotation(
    device: Device, head_dim: int, rotary_dim: int, has_bias: bool, is_each: bool, is_last: bool
) -> None:
    norm = HeadNorm(has_bias, is_each, is_last)
    check(device, 3, head_dim, rotary_dim, norm=norm, block_size=32)


def test_padding_rows_write_nothing_to_the_cache(device: Device) -> None:
    check(device, 6, 64, 64, padding=(1, 5))


FAULTS = [
    Fault(
        "the slot's offset is dropped",
        "rope_kv_write.cu",
        "p.block_size + offset) * head_dim",
        "p.block_size + 0 * offset) * head_dim",
        "bounds|blocks|race",
    ),
    Fault(
        "values are written over keys",
        "rope_kv_write.cu",
        "block * 2 + (is_value ? 1 : 0)",
        "block * 2",
        "blocks|race",
    ),
    Fault(
        "padding is written",
        "rope_kv_write.cu",
        "const int64_t slot = p.slots[token];",
        "const int64_t slot = max(p.slots[token], int64_t{0});",
        "bounds|blocks|race",
    ),
    Fault(
        "the rotation turns the other way",
        "rope_kv_write.cu",
        "first * cos[k][i] - second * sin[k][i]",
        "first * cos[k][i] + second * sin[k][i]",
        "result",
    ),
    Fault(
        "the norm forgets its other half",
        "rope_kv_write.cu",
        "x[k][side][i] = (x[k][side][i] - mean)",
        "if (side == 0) x[k][side][i] = (x[k][side][i] - mean)",
        "result",
    ),
    Fault(
        "all heads have the first one's norm",
        "rope_kv_write.cu",
        "if (weight != nullptr) weight += start;",
        "",
        "result",
    ),
    Fault(
        "keys take the norms behind the queries'",
        "rope_kv_write.cu",
        "(is_query ? head : head - p.num_heads) * p.norm_stride",
        "head * p.norm_stride",
        "bounds",
    ),
    Fault(
        "the mean is not taken off",
        "rope_kv_write.cu",
        "mean = __fdividef(sum",
        "mean = 0 * __fdividef(sum",
        "result",
    ),
    Fault(
        "a late norm comes early",
        "rope_kv_write.cu",
        "if (has_norm && !p.is_norm_last)",
        "if (has_norm)",
        "result",
    ),
    Fault(
        "a lane's runs are one too many",
        "rope_kv_write.cu",
        "is_valid[k] = 2 * start < head_dim;",
        "is_valid[k] = 2 * start <= head_dim;",
        "bounds|blocks|race",
    ),
    Fault(
        "values are rotated",
        "rope_kv_write.cu",
        "if (!is_value) angles.rotate",
        "angles.rotate",
        "result",
    ),
    Fault(
        "the rest of a head lies in two halves too",
        "rope_kv_write.cu",
        "(is_rotated[k] ? half : Width)",
        "half",
        "bounds|result|blocks|race",
    ),
    Fault(
        "lanes of two heads are summed together",
        "rope_kv_write.cu",
        "other = lanes / 2; other > 0",
        "other = lanes; other > 0",
        "result",
    ),
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def all_kinds(device: Device) -> None:
        check(device, 6, 80, 64, norm=HeadNorm(), padding=(1, 5))
        check(device, 3, 64, 32, norm=HeadNorm(has_bias=True, is_each=True))
        check(device, 3, 64, 32, norm=HeadNorm(is_last=True))

    assert_caught(fault, all_kinds)
