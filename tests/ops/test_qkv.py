"""The operator qkv: three projections, norms, rotation by position, keys and values in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, FAST, angles, random_source, rope_table
from tests.reference.compare import assert_close, assert_same_bits, assert_within
from tests.reference.layers import linear, norm, rotate
from tests.support import eager_ops
from tests.support.batches import flat_rows
from tests.support.eager_ops import norm_weight
from tests.support.kv import poisoned_pool, read_kv
from tests.support.open_program import OpenProgram
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.recorder import Kind
from tgi_asgi.ops.tensors import from_tensor

NUM_BLOCKS, POSITIONS = 12, 120


@dataclass
class Case:
    """A weight of qkv and its expected results."""

    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 16
    hidden: int = 37
    rotary_dim: int | None = None
    has_rope: bool = True
    has_bias: bool = False
    norms: ops.HeadNorms | None = None
    is_interleaved: bool = False
    clip: float | None = None
    query_scales: Tensor | None = None
    formats: tuple[str, str, str] = ("F32", "F32", "F32")
    packing: ops.Packing = EXACT
    parts: list[Tensor] = field(init=False)
    biases: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        counts = (self.heads, self.kv_heads, self.kv_heads)
        sources = [
            random_weight(format, heads * self.head_dim, self.hidden, seed=index)
            for index, (format, heads) in enumerate(zip(self.formats, counts, strict=True))
        ]
        self.parts = [decoded_values(source) for source in sources]
        self.biases = [torch.randn(len(part)) * self.has_bias for part in self.parts]
        self.rope = rope_table(self.rotary_dim or self.head_dim, POSITIONS) if self.has_rope else None
        heads = ops.QkvHeads(
            self.heads, self.kv_heads, self.head_dim, self.rotary_dim or self.head_dim, self.is_interleaved
        )
        biases = [from_tensor(bias) for bias in self.biases] if self.has_bias else None
        self.weight = ops.qkv_weight(sources, self.packing, heads, biases=biases, norms=self.norms)

    def expected(self, a: Tensor, positions: Tensor) -> list[Tensor]:
        """Return queries, keys and values [n_tokens, heads, head_dim] in float64."""
        found = []
        for part, bias in zip(self.parts, self.biases, strict=True):
            rows = linear(a, part, bias)
            if self.clip is not None:
                rows = rows.clamp(-self.clip, self.clip)
            found.append(rows.view(len(a), -1, self.head_dim))
        norms = self.norms
        if norms is not None and not norms.is_last:
            found[:2] = self._normed(norms, found)
        if self.rope is not None:
            cos, sin = angles(self.rope, positions)
            found[:2] = [rotate(h, cos, sin, is_interleaved=self.is_interleaved) for h in found[:2]]
        if norms is not None and norms.is_last:
            found[:2] = self._normed(norms, found)
        if self.query_scales is not None:
            found[0] = found[0] * self.query_scales[positions, None, None]
        return found

    def _normed(self, norms: ops.HeadNorms, heads: list[Tensor]) -> list[Tensor]:
        return [
            norm(part.flatten(1) if norms.is_whole else part, each).view_as(part)
            for part, each in zip(heads, (norms.query, norms.key), strict=False)
        ]

    def run(
        self, a: Tensor, spans: list[tuple[int, int]], dtype: ops.KvDtype, block_size: int = 16
    ) -> tuple[Tensor, KvLayer, Tensor]:
        """Return queries [n_tokens, heads, head_dim], the layer written to, and the slots."""
        layer = poisoned_pool(
            num_layers=2, num_blocks=NUM_BLOCKS, num_kv_heads=self.kv_heads, head_dim=self.head_dim,
            block_size=block_size, dtype=dtype,
        ).layers[1]  # fmt: skip
        free = torch.randperm(NUM_BLOCKS).tolist()
        blocks = [[free.pop() for _ in range(-(-stop // block_size))] for _, stop in spans]
        batch = flat_rows(spans, blocks, block_size)
        q = eager_ops.qkv(a, self.weight, layer, self.rope, batch, self.clip, self.query_scales)
        return q.view(len(a), self.heads, self.head_dim), layer, torch.from_numpy(batch.slots)


def positions_of(spans: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in spans])


def head_norms(
    query: int, key: int, *, is_whole: bool = False, is_last: bool = False, has_bias: bool = False
) -> ops.HeadNorms:
    weights = [
        norm_weight(torch.rand(size) + 0.5, 1e-3, torch.randn(size) if has_bias else None)
        for size in (query, key)
    ]
    return ops.HeadNorms(weights[0], weights[1], is_whole=is_whole, is_last=is_last)


GROWING = 1 + torch.arange(POSITIONS) / 7
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"has_bias": True},
    "several strips": {"heads": 6, "kv_heads": 2, "head_dim": 96, "hidden": 72},
    "odd heads": {"heads": 4, "kv_heads": 2, "head_dim": 20, "hidden": 100, "has_bias": True},
    "heads of 6": {"heads": 5, "kv_heads": 5, "head_dim": 6, "hidden": 33},
    "heads of 112": {"heads": 2, "kv_heads": 1, "head_dim": 112, "hidden": 64},
    "heads of 256": {"heads": 2, "kv_heads": 2, "head_dim": 256, "hidden": 40},
    "heads of 512": {"heads": 2, "kv_heads": 1, "head_dim": 512, "hidden": 40},
    "norms of heads of 512": {"heads": 2, "kv_heads": 1, "head_dim": 512, "hidden": 33, "norms": (512, 512)},
    "partly rotated": {"heads": 4, "kv_heads": 2, "head_dim": 80, "rotary_dim": 32},
    "two dims turn": {"head_dim": 24, "rotary_dim": 2},
    "no rotation": {"head_dim": 64, "has_rope": False, "has_bias": True},
    "three formats": {"hidden": 96, "head_dim": 20, "formats": ("BF16", "F16", "Q8_0"), "has_bias": True},
    "norms": {"heads": 4, "kv_heads": 2, "head_dim": 80, "norms": (80, 80), "rotary_dim": 32},
    "norms of odd heads": {"head_dim": 20, "norms": (20, 20), "has_bias": True},
    "norms, three formats": {
        "hidden": 96, "head_dim": 64, "formats": ("Q4_0", "Q8_0", "Q5_1"), "norms": (64, 64),
    },
    "layer norms": {"heads": 4, "kv_heads": 2, "head_dim": 80, "norms": (80, 80), "rotary_dim": 32},
    "layer norms of each head": {"heads": 4, "kv_heads": 2, "head_dim": 20, "norms": (80, 40)},
    "norms of each head": {"heads": 3, "kv_heads": 3, "head_dim": 64, "norms": (192, 192)},
    "last norms": {"heads": 4, "kv_heads": 2, "head_dim": 40, "norms": (40, 40), "has_bias": True},
    "last norms, part rotated": {"heads": 2, "head_dim": 96, "norms": (96, 96), "rotary_dim": 64},
    "neighbours turn": {"heads": 4, "kv_heads": 2, "head_dim": 48, "is_interleaved": True, "has_bias": True},
    "some neighbours turn": {
        "heads": 2, "head_dim": 80, "rotary_dim": 36, "is_interleaved": True, "norms": (80, 80),
    },
    "growing queries": {"heads": 3, "head_dim": 40, "query_scales": GROWING},
    "growing queries, no rotation": {"head_dim": 24, "has_rope": False, "query_scales": GROWING},
    "whole norms, growing queries": {"heads": 3, "head_dim": 24, "norms": (72, 24), "query_scales": GROWING},
    "cut": {"heads": 3, "kv_heads": 1, "head_dim": 24, "clip": 1.25, "has_bias": True},
    "cut, three formats": {"hidden": 96, "head_dim": 32, "formats": ("Q4_0", "F16", "Q8_0"), "clip": 2.0},
    "whole norms": {"heads": 6, "kv_heads": 2, "head_dim": 20, "norms": (120, 40), "has_bias": True},
    "whole norms, heads of 64": {"heads": 3, "kv_heads": 3, "head_dim": 64, "norms": (192, 192)},
    "whole norms, two formats": {
        "hidden": 64, "heads": 3, "kv_heads": 1, "head_dim": 48, "formats": ("Q8_0", "Q8_0", "BF16"),
        "norms": (144, 48), "has_bias": True,
    },
}  # fmt: skip


def case_of(name: str) -> Case:
    options = dict(CASES[name])
    if "norms" in options:
        options["norms"] = head_norms(
            *options["norms"],
            is_whole=name.startswith("whole"),
            is_last=name.startswith("last"),
            has_bias=name.startswith("layer"),
        )
    return Case(**options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spans", [[(7, 8)], [(0, 5), (30, 31), (9, 23)]], ids=["decode", "mixed"])
def test_queries_keys_and_values_equal_the_reference(
    kernel_set: str, name: str, spans: list[tuple[int, int]]
) -> None:
    _C.set_num_threads(2)
    case, positions = case_of(name), positions_of(spans)
    a = torch.randn(len(positions), case.hidden)
    q, layer, slots = case.run(a, spans, "float32")
    query, key, value = case.expected(a, positions)
    found_key, found_value = read_kv(layer, slots, case.rotary_dim, is_interleaved=case.is_interleaved)
    assert_close(q, query, length=4 * case.hidden)
    assert_close(found_key, key, length=4 * case.hidden)
    assert_close(found_value, value, length=4 * case.hidden)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [96, 80, 30])
def test_only_the_slots_asked_for_are_written(
    kernel_set: str, head_dim: int, block_size: int, dtype: ops.KvDtype
) -> None:
    case = Case(head_dim=head_dim, kv_heads=3)
    spans = [(0, 21), (40, 47)]
    a = torch.randn(28, case.hidden)
    layer, slots = run_without_queries(case, a, spans, dtype, block_size)
    others = torch.ones(NUM_BLOCKS * block_size, dtype=torch.bool).index_fill(0, slots, False).nonzero()[:, 0]
    assert all(torch.isfinite(part).all() for part in read_kv(layer, slots))
    assert all(torch.isnan(part).all() for part in read_kv(layer, others)), "an unrequested slot was written"
    beside = layer.pool.native.memory().reshape(NUM_BLOCKS, 2, -1)[:, 0]
    assert (beside == 0xFF).all(), "another layer was written"
    key, value = case.expected(a, positions_of(spans))[1:]
    tolerance = {"float32": 1e-5, "bfloat16": 5e-3, "int8": 1e-2}[dtype]
    for found, expected in zip(read_kv(layer, slots), (key, value), strict=True):
        assert_within(found, expected, whole=tolerance, worst=tolerance)


def run_without_queries(
    case: Case, a: Tensor, spans: list[tuple[int, int]], dtype: ops.KvDtype, block_size: int
) -> tuple[KvLayer, Tensor]:
    """Run qkv without returning queries, because those for an int8 cache cannot be read."""
    layer = poisoned_pool(
        num_layers=2, num_blocks=NUM_BLOCKS, num_kv_heads=case.kv_heads, head_dim=case.head_dim,
        block_size=block_size, dtype=dtype,
    ).layers[1]  # fmt: skip
    recorder = ops.Recorder()
    given = recorder.value(Kind.ACTIVATION, case.hidden)
    ops.qkv(given, case.weight, layer, case.rope)
    limits = ops.StepLimits(max_tokens=len(a), max_sequences=len(spans), max_rows=1, max_context=POSITIONS)
    program = OpenProgram(recorder, limits, inputs=[given])
    program.write(given, a.numpy())
    free = torch.randperm(NUM_BLOCKS).tolist()
    blocks = [[free.pop() for _ in range(-(-stop // block_size))] for _, stop in spans]
    batch = flat_rows(spans, blocks, block_size)
    program.run(batch, ())
    return layer, torch.from_numpy(batch.slots)


@pytest.mark.parametrize(
    "name",
    ["odd heads", "norms", "whole norms", "three formats", "layer norms", "last norms", "neighbours turn"],
)
def test_a_row_has_the_same_bits_in_any_batch_and_team(kernel_set: str, name: str) -> None:
    case = case_of(name)
    a = torch.randn(20, case.hidden)

    def computed(spans: list[tuple[int, int]]) -> Tensor:
        rows = positions_of(spans)
        q, layer, slots = case.run(a[rows], spans, "float32")
        keys_and_values = read_kv(layer, slots, case.rotary_dim, is_interleaved=case.is_interleaved)
        return torch.cat([q, *keys_and_values], dim=1)

    alone = torch.cat([computed([(row, row + 1)]) for row in range(20)])
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        assert_same_bits(computed([(0, 20)]), alone)
        assert_same_bits(computed([(13, 20), (0, 7)]), torch.cat([alone[13:], alone[:7]]))


def test_bfloat16_rounds_to_the_nearest_even_and_keeps_nan(kernel_set: str) -> None:
    value = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, torch.inf, torch.nan, 0.0, 0.1] * 2)
    case = Case(heads=1, kv_heads=1, hidden=1, has_bias=True, has_rope=False)
    sources = [from_tensor(torch.zeros(16, 1)) for _ in range(3)]
    biases = [from_tensor(bias) for bias in (torch.zeros(16), value, value)]
    case.weight = ops.qkv_weight(sources, EXACT, ops.QkvHeads(1, 1, 16, rotary_dim=16), biases=biases)
    layer, slots = run_without_queries(case, torch.zeros(1, 1), [(5, 6)], "bfloat16", 16)
    for found in read_kv(layer, slots):
        torch.testing.assert_close(found[0, 0], value.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_no_tokens_write_nothing() -> None:
    case = Case()
    layer = poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32").layers[0]
    assert eager_ops.qkv(torch.empty(0, 37), case.weight, layer, case.rope).shape == (0, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": [POSITIONS]}, rf"`positions`\[0\] must be in \[0, {POSITIONS}\), got {POSITIONS}"),
        ({"positions": [-1]}, r"`positions`\[0\]"),
        ({"slots": [128]}, r"`slots`\[0\] must be in \[0, 128\), got 128"),
        ({"slots": [-1]}, r"`slots`\[0\]"),
    ],
)
def test_places_out_of_range_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str
) -> None:
    case, pool = Case(), poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32")
    good = flat_rows([(0, 1)], [[2]], 16)
    names = ("ids", "positions", "slots", "query_start", "context_len")
    given = {name: getattr(good, name) for name in names}
    batch = ops.FlatRows(**{**given, "block_table": good.block_tables[0], **change})
    with pytest.raises(ValueError, match=message):
        eager_ops.qkv(torch.randn(1, 37), case.weight, pool.layers[0], case.rope, batch)
    assert (pool.native.memory() == 0xFF).all()


def test_weights_norms_and_tables_that_do_not_fit_are_refused() -> None:
    query, key = random_source(48, 37)[1], random_source(16, 37)[1]
    sources, heads = (query, key, key), ops.QkvHeads(3, 1, 16, rotary_dim=16)
    with pytest.raises(ValueError, match="a norm must have 16 elements"):
        ops.qkv_weight(sources, EXACT, heads, norms=head_norms(16, 15))
    with pytest.raises(ValueError, match="a norm must have 48 elements"):
        ops.qkv_weight(sources, EXACT, heads, norms=head_norms(16, 16, is_whole=True))
    with pytest.raises(ValueError, match=r"`key` must be \[1 x 16, 37\], got \(48, 37\)"):
        ops.qkv_weight((query, query, key), EXACT, heads)
    for rotary_dim in (0, 3, 18):
        with pytest.raises(ValueError, match="`rotary_dim` must be even and at most 16"):
            ops.QkvHeads(3, 1, 16, rotary_dim)
    weight = ops.qkv_weight(sources, EXACT, heads)
    with pytest.raises(ValueError, match="the norms of queries and of keys must be of one kind"):
        one, other = head_norms(16, 16), head_norms(16, 16, has_bias=True)
        ops.qkv_weight(sources, EXACT, heads, norms=ops.HeadNorms(one.query, other.key))
    with pytest.raises(ValueError, match="a norm over all heads must be an RMSNorm before the rotation"):
        ops.qkv_weight(sources, EXACT, heads, norms=head_norms(48, 16, is_whole=True, is_last=True))
    layer = poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32").layers[0]
    with pytest.raises(ValueError, match="the rotary table turns 8 dims, the weight 16"):
        eager_ops.qkv(torch.randn(1, 37), weight, layer, rope_table(8, 4), flat_rows([(0, 1)], [[0]], 16))


def test_a_rope_table_has_the_angles_of_transformers() -> None:
    rope = ops.RopeTable.create([1.0, 0.1234567], 2000)
    angle = torch.tensor(1999.0) * torch.tensor(0.1234567)  # rounded to float32, as in transformers
    assert rope.cos[1999, 1] == angle.double().cos().float()
    assert rope.sin[1999, 1] == angle.double().sin().float()


@pytest.mark.parametrize("formats", [("Q8_0", "Q8_0", "BF16"), ("BF16", "Q4_1", "Q8_0")], ids=str)
def test_parts_of_several_precisions_do_not_meet_in_memory(
    kernel_set: str, formats: tuple[str, str, str]
) -> None:
    # Threads work on different parts at once. With tiles, a thread's scratch for 100 tokens in bfloat16 is
    # six times that for a strip of codes.
    case = Case(heads=12, kv_heads=12, head_dim=64, hidden=64, formats=formats, packing=FAST)
    a, found = torch.randn(100, 64), []
    for threads in (1, 2, 2, 2, 3, 5):
        _C.set_num_threads(threads)
        torch.manual_seed(1)
        q, layer, slots = case.run(a, [(0, 100)], "float32")
        found.append((q, *read_kv(layer, slots, 64)))
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert_same_bits(theirs, mine)
