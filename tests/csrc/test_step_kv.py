"""The cache that a recorded layer writes and reads is as precise as its type allows, especially int8."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, random_source, rope_table, with_each_kernel_set
from tests.reference.attention import attention as reference
from tests.reference.compare import assert_same_bits
from tests.reference.layers import linear, rms_norm, rotate
from tests.support.batches import flat_rows, slots_of
from tests.support.eager_ops import norm_weight
from tests.support.kv import poisoned_pool, read_kv
from tests.support.open_program import OpenProgram
from tgi_asgi import ops
from tgi_asgi.ops.recorder import Kind

HEADS, KV_HEADS = 4, 2
HIDDEN = 96
NUM_BLOCKS, EPS = 60, 1e-5
SCALE = 0.17
DTYPES: list[ops.KvDtype] = ["int8", "bfloat16", "float32"]
SHAPES = [(32, 32, 16), (64, 64, 32), (96, 48, 16), (256, 256, 64), (80, 20, 16)]  # head, rotary, block


class World:
    """One layer's recorded attention over float32 weights: `attention(qkv(norm(x)))` of given rows."""

    def __init__(
        self, dtype: ops.KvDtype, head_dim: int, length: int, rotary_dim: int, block_size: int
    ) -> None:
        torch.manual_seed(7)
        self.head_dim, self.rotary_dim, self.block_size, self.length = (
            head_dim,
            rotary_dim,
            block_size,
            length,
        )
        self.x, self.norm = torch.randn(length, HIDDEN), torch.rand(HIDDEN) + 0.5
        counts = (HEADS, KV_HEADS, KV_HEADS)
        sources = [random_source(count * head_dim, HIDDEN, scale=HIDDEN**-0.5) for count in counts]
        self.parts = [part for part, _ in sources]
        self.rope = rope_table(rotary_dim, length)
        self.pool = poisoned_pool(
            num_blocks=NUM_BLOCKS,
            num_kv_heads=KV_HEADS,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
        )
        self.layer = self.pool.layers[0]
        heads = ops.QkvHeads(HEADS, KV_HEADS, head_dim, rotary_dim)
        weight = ops.qkv_weight([source for _, source in sources], EXACT, heads)
        recorder = ops.Recorder()
        self.given = recorder.value(Kind.RESIDUAL, HIDDEN)
        q = ops.qkv(ops.norm(self.given, norm_weight(self.norm, EPS)), weight, self.layer, self.rope)
        self.out = ops.attention(q, self.layer, ops.AttentionSpec(SCALE))
        self.program = OpenProgram(
            recorder,
            ops.StepLimits(max_tokens=length, max_sequences=1, max_rows=1, max_context=length),
            inputs=[self.given],
            outputs=[self.out],
        )
        self.blocks = torch.randperm(NUM_BLOCKS)[: -(-length // block_size)].tolist()

    def slots(self, start: int, stop: int) -> Tensor:
        return slots_of(self.blocks, self.block_size, start, stop)

    def run(self, start: int, stop: int) -> Tensor:
        """Compute tokens [start, stop) after the preceding ones; return the attention output."""
        self.program.write(self.given, self.x[start:stop].numpy())
        self.program.run(flat_rows([(start, stop)], [self.blocks], self.block_size), ())
        return torch.from_numpy(self.program.read(self.out, stop - start))

    def computed(self) -> list[Tensor]:
        """Return queries, keys and values [length, heads, head_dim] in double."""
        normed = rms_norm(self.x, self.norm, EPS)
        heads = [linear(normed, part).view(self.length, -1, self.head_dim) for part in self.parts]
        cos, sin = (torch.from_numpy(table[: self.length]) for table in (self.rope.cos, self.rope.sin))
        return [rotate(heads[0], cos, sin), rotate(heads[1], cos, sin), heads[2]]


def _tolerance(dtype: ops.KvDtype, values: Tensor) -> Tensor:
    """Return the largest allowed error of written values."""
    if dtype == "float32":
        return torch.full_like(values, 1e-5)
    if dtype == "bfloat16":
        return values.abs() / 256 + 1e-5
    # Half a code of its block's largest value, at most the head's; the scale has 11 bits.
    largest = values.abs().amax(-1, keepdim=True)
    return largest / 127 * 0.51 + values.abs() / 2048 + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim", "block_size"), SHAPES)
def test_keys_and_values_are_written_as_close_as_the_type_allows(
    dtype: ops.KvDtype, head_dim: int, rotary_dim: int, block_size: int, kernel_set: str
) -> None:
    world = World(dtype, head_dim, 37, rotary_dim, block_size)
    world.run(0, 5)
    world.run(5, 37)
    found = read_kv(world.layer, world.slots(0, 37), rotary_dim)
    for each, expected in zip(found, world.computed()[1:], strict=True):
        assert ((each.double() - expected).abs() <= _tolerance(dtype, expected)).all()
    written = world.pool.native.memory().copy()
    world.run(0, 37)
    np.testing.assert_array_equal(world.pool.native.memory(), written, "written again, the same bytes")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim", "block_size"), SHAPES)
def test_attention_to_what_the_cache_holds_equals_the_reference(
    dtype: ops.KvDtype, head_dim: int, rotary_dim: int, block_size: int, kernel_set: str
) -> None:
    world = World(dtype, head_dim, 300, rotary_dim, block_size)
    found = torch.cat([world.run(*span) for span in itertools.pairwise([0, 1, 18, 255, 299, 300])])
    key, value = read_kv(world.layer, world.slots(0, 300), rotary_dim)
    expected = reference(world.computed()[0], key, value, SCALE)
    # bfloat16 rounds queries and weights; those for int8 have 16 bits.
    tolerance = {"float32": 2e-5, "int8": 1e-4, "bfloat16": 1e-2}[dtype]
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_an_int8_cache_gives_the_same_bits_with_every_set_of_kernels() -> None:
    def computed() -> Tensor:
        world = World("int8", 64, 300, 64, 16)
        return torch.cat([world.run(0, 299), world.run(299, 300)])

    results = list(with_each_kernel_set(computed))
    for _, result in results[1:]:
        assert_same_bits(result, results[0][1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["key", "value"])
def test_what_is_not_finite_is_not_hidden_by_an_int8_cache(value: float, which: str, kernel_set: str) -> None:
    world = World("int8", 32, 20, 32, 16)
    world.run(0, 10)
    assert torch.isfinite(world.run(10, 12)).all()
    layer = world.pool.native.memory()[world.blocks[0]].reshape(2, KV_HEADS, -1)
    scales = layer[["key", "value"].index(which), 0, 16 * 32 :].view(np.float16)
    scales[3] = value  # token 3, head 0
    found = world.run(10, 12).view(2, HEADS, 32)
    broken = found[:, : HEADS // KV_HEADS]
    if which == "key" and value == float("inf"):  # a score of minus infinity is valid and has weight 0
        assert not torch.isfinite(broken).all()
    else:
        assert not torch.isfinite(broken).any()
    assert torch.isfinite(found[:, HEADS // KV_HEADS :]).all()
