"""The operator qkv: three projections, rotation by position, keys and values in the cache."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import random_source, source
from tests.reference.compare import assert_close
from tests.reference.layers import linear, rms_norm, rotate
from tgi_asgi import ops
from tgi_asgi.ops.kv import kv_read

HEADS, KV_HEADS, DIM, HIDDEN = 3, 1, 16, 37


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_both_orders_of_rotary_pairs_give_the_reference(
    tokens: int, is_interleaved: bool, has_bias: bool
) -> None:
    parts = [torch.randn(heads * DIM, HIDDEN) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    biases = [torch.randn(len(part)) if has_bias else torch.zeros(len(part)) for part in parts]

    def stored(tensor: torch.Tensor, is_rotated: bool) -> ops.WeightSource:
        """Put pairs side by side, as GGUF does: row 2 i of the file is i, row 2 i + 1 is i + DIM / 2."""
        if is_interleaved and is_rotated:
            halves = tensor.view(len(tensor) // DIM, 2, DIM // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return source(tensor)

    weight = ops.qkv_weight(
        *(stored(part, i < 2) for i, part in enumerate(parts)),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        biases=tuple(stored(bias, i < 2) for i, bias in enumerate(biases)) if has_bias else None,  # type: ignore[arg-type]
        is_interleaved=is_interleaved,
    )
    kv = ops.allocate_kv(1, 3, KV_HEADS, DIM, 16, torch.float32)[0]
    rope = ops.RopeTable.create([10 ** (-i / 8) for i in range(DIM // 2)], 64)
    a, positions = torch.randn(tokens, HIDDEN), torch.randint(64, (tokens,))
    slots = torch.randperm(48)[:tokens]

    q = ops.qkv(a, weight, positions.int(), slots, kv, rope)

    q_ref, k_ref, v_ref = (
        linear(a, part, bias).view(tokens, len(part) // DIM, DIM)
        for part, bias in zip(parts, biases, strict=True)
    )
    cos, sin = rope.cos[positions], rope.sin[positions]
    key, value = kv_read(kv, slots)
    assert_close(q, rotate(q_ref, cos, sin), length=HIDDEN)
    assert_close(key, rotate(k_ref, cos, sin), length=HIDDEN)
    assert_close(value, v_ref, length=HIDDEN)


def test_heads_are_normalised_before_they_are_rotated() -> None:
    parts = [torch.randn(heads * DIM, HIDDEN) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    norms = ops.HeadNorms(torch.rand(DIM) + 0.5, torch.rand(DIM) + 0.5, 1e-3)
    weight = ops.qkv_weight(
        *map(source, parts),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        norms=norms,
    )
    kv = ops.allocate_kv(1, 3, KV_HEADS, DIM, 16, torch.float32)[0]
    rope = ops.RopeTable.create([10 ** (-i / 8) for i in range(DIM // 2)], 64)
    a, positions, slots = torch.randn(20, HIDDEN), torch.randint(64, (20,)), torch.randperm(48)[:20]

    q = ops.qkv(a, weight, positions.int(), slots, kv, rope)

    q_ref, k_ref, v_ref = (linear(a, part).view(20, len(part) // DIM, DIM) for part in parts)
    cos, sin = rope.cos[positions], rope.sin[positions]
    key, value = kv_read(kv, slots)
    assert_close(q, rotate(rms_norm(q_ref, norms.query, norms.eps), cos, sin), length=HIDDEN)
    assert_close(key, rotate(rms_norm(k_ref, norms.key, norms.eps), cos, sin), length=HIDDEN)
    assert_close(value, v_ref, length=HIDDEN)


def test_norms_that_are_not_of_a_heads_size_are_refused() -> None:
    query, key = random_source(HEADS * DIM, HIDDEN)[1], random_source(KV_HEADS * DIM, HIDDEN)[1]
    norms = ops.HeadNorms(torch.ones(DIM), torch.ones(DIM - 1), 1e-5)
    with pytest.raises(ValueError, match="`norms` must have 16 elements"):
        ops.qkv_weight(
            query, key, key, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32,
            norms=norms,
        )  # fmt: skip


def test_sources_that_do_not_fit_the_heads_are_refused() -> None:
    query, key = random_source(HEADS * DIM, HIDDEN)[1], random_source(KV_HEADS * DIM, HIDDEN)[1]
    with pytest.raises(ValueError, match="`key` must have 1 x 16 rows, got 48"):
        ops.qkv_weight(
            query, query, key, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32
        )


def test_a_rope_table_has_the_angles_of_transformers() -> None:
    rope = ops.RopeTable.create([1.0, 0.1234567], 2000)
    angle = torch.tensor(1999.0) * torch.tensor(0.1234567)  # rounded to float32, as there
    assert rope.cos[1999, 1] == angle.double().cos().float()
    assert rope.sin[1999, 1] == angle.double().sin().float()
