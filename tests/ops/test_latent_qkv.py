"""The operator latent_qkv and attention over latents: one row per token serves as keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import angles, rope_table, with_each_kernel_set
from tests.reference.attention import attention as reference_attention
from tests.reference.compare import assert_same_bits, assert_within
from tests.reference.layers import norm, rotate
from tests.support.batches import flat_rows, random_blocks
from tests.support.kv import poison
from tests.support.open_program import OpenProgram
from tgi_asgi import _C, ops
from tgi_asgi.models.config import CacheShape
from tgi_asgi.ops.recorder import Kind

NUM_BLOCKS, POSITIONS = 64, 700
SCALE = 0.3


@dataclass
class Layer:
    """A pool of latents and the operators' other operands."""

    heads: int = 3
    rank: int = 64
    rotary_dim: int = 32
    dtype: ops.KvDtype = "float32"
    block_size: int = 16
    threads: int = 2
    first_column: int = 0
    norm: ops.NormWeight = field(init=False)

    def __post_init__(self) -> None:
        self.norm = ops.NormWeight.rms(self.rank, 1e-5, weight=(torch.rand(self.rank) + 0.5).numpy())
        self.rope = rope_table(self.rotary_dim, POSITIONS)
        shape = CacheShape(1, self.rank + self.rotary_dim, self.rank, is_latent=True)
        self.pool = ops.KvPool(
            [shape] * 2, num_blocks=NUM_BLOCKS, block_size=self.block_size, dtype=self.dtype
        )
        poison(self.pool)

    @property
    def columns(self) -> tuple[int, int, int]:
        """Columns of the three inputs."""
        return (
            self.heads * self.rank,
            self.first_column + self.heads * self.rotary_dim,
            self.rank + self.rotary_dim,
        )

    def inputs(self, num_tokens: int) -> list[Tensor]:
        return [torch.randn(num_tokens, columns) for columns in self.columns]

    def run(
        self, rows: list[Tensor], spans: list[tuple[int, int]], blocks: list[list[int]], scale: float = SCALE
    ) -> Tensor:
        """Compute a step into poisoned buffers; return the heads' results [n_tokens, heads * rank]."""
        _C.set_num_threads(self.threads)
        recorder = ops.Recorder()
        values = [recorder.value(Kind.ROWS, columns) for columns in self.columns]
        layer = self.pool.layers[1]
        q = ops.latent_qkv(
            values[0], values[1], values[2], self.norm, self.rope, layer, rotary_column=self.first_column
        )
        out = ops.attention(q, layer, ops.AttentionSpec(scale))
        program = OpenProgram(
            recorder,
            ops.StepLimits(
                max_tokens=len(rows[0]), max_sequences=len(spans), max_rows=1, max_context=POSITIONS
            ),
            inputs=values,
            outputs=[out],
        )
        program.buffers.rows_of(out).array()[:] = math.nan
        for value, given in zip(values, rows, strict=True):
            program.write(value, given.numpy())
        program.run(flat_rows(spans, blocks, self.block_size), ())
        return torch.from_numpy(program.read(out, len(rows[0])))

    def expected(self, rows: list[Tensor], num_queries: int) -> Tensor:
        """Return float64 results for a sequence's last tokens, from latents rounded to the cache's dtype."""
        absorbed, rotary, latents = rows
        positions = torch.arange(len(latents))
        cos, sin = angles(self.rope, positions)
        plain = norm(latents[:, : self.rank], self.norm)
        rotated = rotate(latents[:, self.rank :].double()[:, None], cos, sin)[:, 0]
        keys = torch.cat([plain, rotated], dim=1).to(getattr(torch, self.dtype)).double()[:, None]
        heads = rotary[:, self.first_column :].view(-1, self.heads, self.rotary_dim).double()
        queries = torch.cat(
            [absorbed.view(-1, self.heads, self.rank).double(), rotate(heads, cos, sin)], dim=2
        )
        return reference_attention(queries[-num_queries:], keys, keys[..., : self.rank], SCALE)


SHAPES = {
    "one head": {"heads": 1},
    "a few": {"heads": 5, "rank": 96, "rotary_dim": 64, "first_column": 24},
    "DeepSeek's": {"heads": 16, "rank": 512, "rotary_dim": 64},
    "more than a tile": {"heads": 21, "rank": 32, "rotary_dim": 32},
    "MiniCPM's, of fewer heads": {"heads": 20, "rank": 256, "rotary_dim": 32, "block_size": 32},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_and_sampled_tokens_are_those_of_the_reference(
    kernel_set: str, shape: str, dtype: ops.KvDtype
) -> None:
    """Use sequences of one token, of odd sizes, and one beyond a chunk of context; then one token each."""
    layer = Layer(**SHAPES[shape], dtype=dtype, threads=3)
    contexts = [1, 2, 17, 33, 262]
    blocks = random_blocks([size + 1 for size in contexts], NUM_BLOCKS, layer.block_size)
    texts = [layer.inputs(size + 1) for size in contexts]
    prompt = [torch.cat([text[part][:-1] for text in texts]) for part in range(3)]
    found = layer.run(prompt, [(0, size) for size in contexts], blocks).split(contexts)
    sampled = [torch.cat([text[part][-1:] for text in texts]) for part in range(3)]
    last = layer.run(sampled, [(size, size + 1) for size in contexts], blocks)
    # The kernels round weights like values, and a latent may round in the other direction than the
    # reference's.
    unit = 1e-5 if dtype == "float32" else 4e-3
    for index, (text, size) in enumerate(zip(texts, contexts, strict=True)):
        expected = layer.expected([part[:-1] for part in text], size)
        assert_within(found[index], expected, whole=unit, worst=8 * unit)
        assert_within(last[index : index + 1], layer.expected(text, 1), whole=unit, worst=8 * unit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_on_neither_chunks_nor_company_nor_team(kernel_set: str, dtype: ops.KvDtype) -> None:
    layer = Layer(heads=7, rank=96, dtype=dtype, threads=1)
    text = layer.inputs(300)
    (mine, other) = random_blocks([300, 40], NUM_BLOCKS, 16)
    whole = layer.run(text, [(0, 300)], [mine])
    for threads, cuts in ((1, [1, 2, 9, 18, 270]), (2, [150, 1, 1, 148]), (4, [299, 1])):
        layer.threads = threads
        poison(layer.pool)
        found, start = [], 0
        for size in cuts:
            beside = layer.inputs(40)
            rows = [torch.cat([a, b[start : start + size]]) for a, b in zip(beside, text, strict=True)]
            found.append(layer.run(rows, [(0, 40), (start, start + size)], [other, mine])[40:])
            start += size
        assert_same_bits(torch.cat(found), whole)


def test_sets_of_one_arithmetic_agree_to_the_bit() -> None:
    layer = Layer(heads=5)
    text, blocks = layer.inputs(290), random_blocks([290], NUM_BLOCKS, 16)
    found = dict(with_each_kernel_set(lambda: layer.run(text, [(0, 290)], blocks)))
    for each in found.values():
        assert_same_bits(each, next(iter(found.values())))


def test_a_token_keeps_one_row() -> None:
    shape = CacheShape(1, 576, 512, is_latent=True)
    assert ops.kv_bytes_per_token(shape, "bfloat16") == 576 * 2
    pool = ops.KvPool([shape] * 3, num_blocks=4, block_size=16, dtype="bfloat16")
    assert pool.native.block_bytes == 3 * 16 * 576 * 2


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (CacheShape(1, 576, 512, is_latent=True), "int8", "kept as float32 or bfloat16, not as"),
        (CacheShape(1, 100, 64, is_latent=True), "float32", "a multiple of 32 up to 640 wide, got 100"),
        (CacheShape(1, 672, 512, is_latent=True), "float32", "up to 640 wide, got 672"),
        (CacheShape(1, 608, 544, is_latent=True), "float32", "up to 512 wide, got 544"),
        (CacheShape(2, 96, 64, is_latent=True), "float32", "latents are of one head, got 2"),
        (CacheShape(1, 64, 96, is_latent=True), "float32", "`value_dim` of latents"),
    ],
)
def test_latents_that_cannot_be_are_refused(shape: CacheShape, dtype: ops.KvDtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.KvPool([shape], num_blocks=1, block_size=16, dtype=dtype)


def test_a_pool_is_of_latents_in_all_layers_or_in_none() -> None:
    shapes = [CacheShape(1, 96, 64, is_latent=True), CacheShape(1, 64, 64)]
    with pytest.raises(ValueError, match="must hold latents in all layers or in none"):
        ops.KvPool(shapes, num_blocks=1, block_size=16, dtype="float32")


def test_operands_that_do_not_fit_are_refused() -> None:
    layer, recorder = Layer(), ops.Recorder()
    cache = layer.pool.layers[0]
    values = [recorder.value(Kind.ROWS, columns) for columns in layer.columns]
    plain = ops.KvPool([CacheShape(1, 96, 96)], num_blocks=1, block_size=16, dtype="float32").layers[0]

    def call(**changes: object) -> None:
        given = {
            "absorbed": values[0], "rotary": values[1], "rows": values[2], "norm": layer.norm,
            "rope": layer.rope, "cache": cache, **changes,
        }  # fmt: skip
        ops.latent_qkv(**given)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="`latent_qkv` takes latents as `cache`, not KvLayer"):
        call(cache=plain)
    with pytest.raises(ValueError, match="takes 96 columns as `rows`, not 192"):
        call(rows=values[0])
    with pytest.raises(ValueError, match="`absorbed` must have 64 columns a head, got 97"):
        call(absorbed=recorder.value(Kind.ROWS, 97))
    with pytest.raises(ValueError, match="takes columns 8 to 104 of `rotary`, which has 96"):
        call(rotary_column=8)
    with pytest.raises(ValueError, match="must rotate 32 dims, it rotates 64"):
        call(rope=rope_table(64, 9))
    with pytest.raises(ValueError, match="RMSNorm of 64 columns, got 32"):
        call(norm=ops.NormWeight.rms(32, 1e-5, weight=None))
