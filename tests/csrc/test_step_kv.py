"""The recorded step's cache: what is written against what was computed, and attention to what is there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.attention import attention as reference
from tests.reference.compare import assert_same_bits
from tests.reference.layers import rms_norm, rotate
from tgi_asgi import _C, ops
from tgi_asgi.ops.kv import kv_read
from tgi_asgi.ops.packed import head_order

HEADS, KV_HEADS = 4, 2
NUM_BLOCKS, EPS = 60, 1e-5
SCALE = 0.17
DTYPES = [torch.int8, torch.bfloat16, torch.float32]


class World:
    """One layer's attention over float32 weights, recorded; token i of the text is row i of the embedding.

    The residual is the embedding plus what attention gave, both [tokens, HEADS * head_dim].
    """

    def __init__(self, dtype: torch.dtype, head_dim: int, length: int, *, block_size: int = 16) -> None:
        torch.manual_seed(7)
        self.head_dim, self.block_size, self.dtype = head_dim, block_size, dtype
        width = HEADS * head_dim
        self.embedding = torch.randn(length, width)
        self.norm = torch.rand(width) + 0.5
        self.parts = [
            torch.randn(heads * head_dim, width) / width**0.5 for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        self.rope = ops.RopeTable.create([10 ** (-4 * i / head_dim) for i in range(head_dim // 2)], length)
        self.kv = ops.allocate_kv(1, NUM_BLOCKS, KV_HEADS, head_dim, block_size, dtype)[0]
        self.kv.pool.fill_(127 if dtype is torch.int8 else torch.nan)  # as scales of int8, NaN too
        packing = ops.Packing(is_exact=False)  # weights of float32 are multiplied in float32
        self.program = ops.StepProgram(max_tokens=length, max_sequences=4, max_rows=1, max_context=length)
        inputs = self.program.inputs
        heads: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": head_dim}
        qkv = ops.qkv_weight(*map(_source, self.parts), **heads, dtype=packing)
        identity = ops.linear_weight(_source(torch.eye(width)), dtype=packing)
        table = ops.linear_weight(_source(self.embedding), dtype=packing)
        x = ops.embed(inputs.ids, table)
        q = ops.qkv(ops.norm(x, self.norm, EPS), qkv, inputs.positions, inputs.slots, self.kv, self.rope)
        x = ops.linear_add(ops.attention(q, self.kv, inputs.tables, SCALE), identity, x)
        ops.head(x, inputs.rows, torch.ones(width), EPS, table)
        blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3))
        self.table = blocks[: -(-length // block_size)].int()

    def slots(self, start: int, stop: int) -> Tensor:
        places = torch.arange(start, stop)
        return self.table[places // self.block_size].long() * self.block_size + places % self.block_size

    def run(self, start: int, stop: int) -> Tensor:
        """Compute tokens [start, stop) after those before; return what attention gave, in double."""
        span = torch.arange(start, stop, dtype=torch.int32)
        tables = ops.AttentionTables(_int(0, stop - start), _int(stop), self.table[None])
        self.program.run(span, span, self.slots(start, stop), tables, _int())
        out = self.program.residual[: stop - start].double() - self.embedding[start:stop].double()
        return out.view(stop - start, HEADS, self.head_dim)

    def computed(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [length, heads, head_dim] in double, dims in the cache's order."""
        normed = rms_norm(self.embedding[:length].double(), self.norm.double(), EPS)
        heads = [(normed @ part.double().T).view(length, -1, self.head_dim) for part in self.parts]
        cos, sin = self.rope.cos[:length].double(), self.rope.sin[:length].double()
        order = torch.from_numpy(head_order(1, 0, self.head_dim))
        if self.dtype is torch.bfloat16:  # the two of a rotated pair share a word
            order = order.view(-1, 2, 16).transpose(1, 2).reshape(-1)
        return rotate(heads[0], cos, sin)[..., order], rotate(heads[1], cos, sin)[..., order], heads[2]


def _source(tensor: Tensor) -> ops.WeightSource:
    data = tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
    return ops.WeightSource(data, "F32", tuple(tensor.shape))


def _int(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _room(dtype: torch.dtype, values: Tensor) -> Tensor:
    """Return how far a written value may be from the computed one."""
    if dtype is torch.float32:
        return torch.full_like(values, 1e-5)
    if dtype is torch.bfloat16:
        return values.abs() / 256 + 1e-5
    blocks: Tensor = values.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True).expand(*values.shape[:-1], -1, 32)
    return largest.flatten(-2) / 127 * 0.51 + values.abs() / 2048 + 1e-5  # half a code; the scale has 11 bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(32, 16), (64, 32), (96, 16), (256, 64)])
def test_keys_and_values_are_written_as_close_as_the_type_allows(
    dtype: torch.dtype, head_dim: int, block_size: int, isa: str
) -> None:
    world = World(dtype, head_dim, 37, block_size=block_size)
    world.run(0, 5)
    world.run(5, 37)
    _, key, value = world.computed(37)
    found_key, found_value = kv_read(world.kv, world.slots(0, 37))
    assert ((found_key.double() - key).abs() <= _room(dtype, key)).all()
    assert ((found_value.double() - value).abs() <= _room(dtype, value)).all()
    written = set(world.slots(0, 37).tolist())
    others = torch.tensor([s for s in range(NUM_BLOCKS * block_size) if s not in written])
    if dtype is torch.int8:
        untouched = world.kv.pool.clone()
        world.run(0, 37)
        assert torch.equal(world.kv.pool, untouched), "written again, the same bytes"
    assert all(torch.isnan(part).all() for part in kv_read(world.kv, others)), (
        "a slot not asked for was written"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(32, 16), (64, 32), (96, 16), (256, 64)])
def test_attention_to_what_the_cache_holds_equals_the_reference(
    dtype: torch.dtype, head_dim: int, block_size: int, isa: str
) -> None:
    world = World(dtype, head_dim, 300, block_size=block_size)
    found = torch.cat(
        [world.run(start, stop) for start, stop in itertools.pairwise([0, 1, 18, 255, 299, 300])]
    )
    query, _, _ = world.computed(300)
    key, value = kv_read(world.kv, world.slots(0, 300))
    expected = reference(query, key, value, SCALE).view(300, HEADS, head_dim)
    # Queries and weights of bfloat16 are rounded; those of int8 have 16 bits.
    room = {torch.float32: 2e-5, torch.int8: 1e-4, torch.bfloat16: 1e-2}[dtype]
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= room * expected.abs().max()


def test_an_int8_cache_gives_the_same_bits_with_every_instruction_set() -> None:
    results, before = [], _C.isa()
    for isa in _C.supported_isas():
        _C.force_isa(isa)
        world = World(torch.int8, 64, 300)
        results.append(torch.cat([world.run(0, 299), world.run(299, 300)]))
    _C.force_isa(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden_by_an_int8_cache(value: float, isa: str) -> None:
    for which in (1, 2):  # a key, then a value
        world = World(torch.int8, 32, 20)
        world.run(0, 10)
        assert torch.isfinite(world.run(10, 12)).all()
        scales = world.kv.pool.view(torch.float16)[:, which - 1]
        scales[world.table[0], 0, 16 * 32 // 2 + 3] = value  # token 3, head 0
        assert not torch.isfinite(world.run(10, 12)).any()
