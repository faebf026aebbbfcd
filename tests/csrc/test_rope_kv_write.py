"""The kernel rope_kv_write: rotation, and where keys and values land in the pool."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_close
from tests.reference.layers import rotate
from tgi_asgi.ops.kv import KvLayer, allocate_kv, kv_read
from tgi_asgi.ops.rope import RopeTable

HEADS, KV_HEADS = 6, 2


def pool(head_dim: int, block_size: int, dtype: torch.dtype) -> KvLayer:
    layer = allocate_kv(1, 5, KV_HEADS, head_dim, block_size, dtype)[0]
    layer.pool.fill_(torch.nan)
    return layer


def run(layer: KvLayer, qkv: Tensor, positions: Tensor, slots: Tensor, rope: RopeTable) -> Tensor:
    q = torch.full((qkv.shape[0], HEADS, layer.head_dim), torch.nan)
    torch.ops.tgi.rope_kv_write(
        qkv, positions.int(), slots, rope.cos, rope.sin, layer.block_size, q, layer.pool
    )
    return q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (64, 64), (80, 32), (256, 256)])
@pytest.mark.parametrize(("tokens", "block_size"), [(0, 16), (1, 16), (17, 32), (70, 64)])
def test_queries_keys_and_values_land_rotated_where_the_slots_say(
    tokens: int, block_size: int, head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    layer = pool(head_dim, block_size, dtype)
    rope = RopeTable.create([10000 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)], 300)
    positions = torch.randint(300, (tokens,))
    slots = torch.randperm(5 * block_size)[:tokens]
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * head_dim)
    query, key, value = qkv.view(tokens, HEADS + 2 * KV_HEADS, head_dim).split(
        [HEADS, KV_HEADS, KV_HEADS], dim=1
    )
    cos, sin = rope.cos[positions], rope.sin[positions]

    q = run(layer, qkv, positions, slots, rope)

    assert_close(q, rotate(query, cos, sin), length=2)
    written_key, written_value = kv_read(layer, slots)
    assert_close(written_key, rotate(key, cos, sin), length=2, dtype=dtype)
    assert torch.equal(written_value, value.to(dtype))
    others = torch.ones(5 * block_size, dtype=torch.bool).index_fill(0, slots, False).nonzero()[:, 0]
    assert all(torch.isnan(part).all() for part in kv_read(layer, others)), "a slot not asked for was written"


def test_bfloat16_rounds_to_the_nearest_even_and_keeps_nan() -> None:
    layer = pool(16, 16, torch.bfloat16)
    value = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, torch.inf, torch.nan, 1e-40, 0.1] * 2)
    qkv = torch.zeros(1, HEADS + 2 * KV_HEADS, 16)
    qkv[0, -1] = value
    rope = RopeTable.create([1.0], 1)
    run(layer, qkv.view(1, -1), torch.zeros(1), torch.tensor([37]), rope)
    written = kv_read(layer, torch.tensor([37]))[1][0, -1]
    torch.testing.assert_close(written, value.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("position", "slot", "message"),
    [
        (4, 0, r"`positions`\[0\] must be in \[0, 4\), got 4"),
        (-1, 0, r"`positions`\[0\]"),
        (0, 80, r"`slots`\[0\] must be in \[0, 80\), got 80"),
        (0, -1, r"`slots`\[0\]"),
    ],
)
def test_places_out_of_range_are_refused_before_anything_is_written(
    position: int, slot: int, message: str
) -> None:
    layer = pool(16, 16, torch.float32)
    qkv = torch.zeros(1, (HEADS + 2 * KV_HEADS) * 16)
    with pytest.raises(RuntimeError, match=message):
        run(layer, qkv, torch.tensor([position]), torch.tensor([slot]), RopeTable.create([1.0], 4))
    assert torch.isnan(layer.pool).all()
