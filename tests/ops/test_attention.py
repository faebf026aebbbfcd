"""The operator attention: float64 reference, poisoned cache, and bits independent of everything else."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.attention import attention as reference
from tests.reference.compare import assert_close, assert_same_bits, assert_within
from tests.support import eager_ops
from tests.support.batches import flat_rows, random_blocks, slots_of
from tests.support.kv import poisoned_pool, read_kv, write_kv
from tgi_asgi import _C, ops
from tgi_asgi.ops import FlatRows
from tgi_asgi.ops.recorder import Kind

DTYPES = ["float32", "bfloat16", "int8"]
# bfloat16 rounds queries and weights; for an int8 cache, queries have 16 bits and weights 15.
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2, "int8": 2e-4}


@dataclass
class Sequences:
    """Sequences in a pool in which every unused place is NaN."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: ops.KvDtype
    rotary_dim: int | None = None
    window: int | None = None
    rules: dict[str, Any] = field(default_factory=dict)  # other arguments of `attention`
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, context: int) -> int:
        shape = (context, self.kv_heads, self.head_dim)
        blocks = context // 16 + 1
        pool = poisoned_pool(
            num_kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype, num_blocks=blocks
        )
        every = torch.arange(context)
        write_kv(pool.layers[0], every, torch.randn(shape), torch.randn(shape), self.rotary_dim)
        key, value = read_kv(pool.layers[0], every, self.rotary_dim)  # rounded to the dtype
        self.keys.append(key)
        self.values.append(value)
        return len(self.keys) - 1

    def run(self, parts: list[tuple[int, int, Tensor]], gate: Tensor | None = None) -> Tensor:
        """Attend parts (sequence, context, its last queries), each with only `context` tokens written."""
        contexts = [context for _, context, _ in parts]
        num_blocks = sum(-(-context // self.block_size) for context in contexts) + 2
        layer = poisoned_pool(
            num_layers=3, num_blocks=num_blocks, num_kv_heads=self.kv_heads, head_dim=self.head_dim,
            block_size=self.block_size, dtype=self.dtype,
        ).layers[1]  # fmt: skip
        blocks = random_blocks(contexts, num_blocks, self.block_size)
        for (sequence, context, _), mine in zip(parts, blocks, strict=True):
            slots = slots_of(mine, self.block_size, 0, context)
            keys, values = self.keys[sequence][:context], self.values[sequence][:context]
            write_kv(layer, slots, keys, values, self.rotary_dim)
        spans = [(context - len(q), context) for _, context, q in parts]
        q = torch.cat([q for _, _, q in parts]).flatten(1)
        return eager_ops.attention(
            q, layer, self.head_dim**-0.5, window=self.window, rotary_dim=self.rotary_dim,
            batch=flat_rows(spans, blocks, self.block_size), gate=gate, **self.rules,
        )  # fmt: skip

    def queries(self, count: int) -> Tensor:
        return torch.randn(count, self.heads, self.head_dim)

    def expected(self, sequence: int, context: int, q: Tensor) -> Tensor:
        keys, values = self.keys[sequence][:context], self.values[sequence][:context]
        return reference(q, keys, values, self.head_dim**-0.5, self.window, **self.rules)

    def check(self, cases: list[tuple[int, int]]) -> None:
        """Compare one step of cases (context, number of queries) with the reference."""
        parts = [(self.add(context), context, self.queries(count)) for context, count in cases]
        tolerance = TOLERANCES[self.dtype]
        expected = torch.cat([self.expected(*part) for part in parts])
        assert_within(self.run(parts), expected, whole=tolerance, worst=2 * tolerance)


# Heads, KV heads, head size, block size, rotary size.
SHAPES = [
    (9, 3, 64, 16, None),
    (4, 4, 80, 32, 32),
    (8, 1, 128, 64, None),
    (40, 2, 32, 16, 8),
    (2, 2, 256, 64, None),
    (4, 2, 96, 16, None),
    (2, 1, 112, 16, 56),
]
# An int8 cache refuses these: it would grow by more than a fifth (tests/ops/test_kv.py).
NARROW = [(1, 1, 16, 16, None), (3, 1, 6, 16, 2), (3, 3, 20, 32, None), (6, 2, 24, 64, 20)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "rotary_dim", "dtype"),
    [(*shape, dtype) for shape in SHAPES for dtype in DTYPES]
    + [(*shape, dtype) for shape in NARROW for dtype in DTYPES[:2]],
)
def test_all_lengths_and_shapes_equal_the_reference(
    kernel_set: str, heads: int, kv_heads: int, head_dim: int, block_size: int, rotary_dim: int | None,
    dtype: ops.KvDtype,
) -> None:  # fmt: skip
    world = Sequences(heads, kv_heads, head_dim, block_size, dtype, rotary_dim)
    world.check([(1, 1), (17, 17), (3, 1), (block_size + 1, 2), (256, 1), (257, 3), (300, 17)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 64, 257])
@pytest.mark.parametrize(("heads", "head_dim", "threads"), [(4, 32, 1), (2, 80, 3)])
def test_a_window_hides_what_lies_before_it(
    kernel_set: str, window: int, heads: int, head_dim: int, threads: int, dtype: ops.KvDtype
) -> None:
    _C.set_num_threads(threads)
    world = Sequences(heads, 2, head_dim, 16, dtype, window=window)
    world.check([(1, 1), (4, 4), (300, 1), (600, 30), (800, 2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rules",
    [
        {"chunk": 100},
        {"soft_cap": 1.5, "sinks": torch.tensor([1.0, -2.0, 0.0, 3.0])},
        {"slopes": torch.tensor([0.01, 0.5, 0.1, 1.0])},
    ],
    ids=lambda rules: " ".join(rules),
)
def test_chunks_caps_sinks_and_slopes_equal_the_reference(
    kernel_set: str, rules: dict[str, Any], dtype: ops.KvDtype
) -> None:
    _C.set_num_threads(3)
    for head_dim in (32, 80):  # results go to an activation, and to rows
        world = Sequences(4, 2, head_dim, 16, dtype, rules=rules)
        world.check([(1, 1), (101, 4), (600, 30), (800, 2)])


def test_a_window_that_reaches_the_whole_context_changes_no_bit(kernel_set: str) -> None:
    world = Sequences(4, 2, 32, 16, "float32")
    parts = [(world.add(300), 300, world.queries(20))]
    plain = world.run(parts)
    world.window = 300
    assert_same_bits(world.run(parts), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "window"), [(32, None), (80, 130)])
def test_a_row_has_the_same_bits_in_any_batch_chunking_block_table_and_team(
    kernel_set: str, head_dim: int, window: int | None, dtype: ops.KvDtype
) -> None:
    world = Sequences(6, 2, head_dim, 16, dtype, window=window)
    contexts = [530, 1, 40, 257, 129]
    queries = [world.queries(context) for context in contexts]
    for context in contexts:
        world.add(context)
    alone = [world.run([(s, context, queries[s])]) for s, context in enumerate(contexts)]
    for threads in (2, 7):
        _C.set_num_threads(threads)
        together = world.run([(s, contexts[s], queries[s]) for s in range(5)])
        assert_same_bits(together, torch.cat(alone))
    _C.set_num_threads(1)
    cuts = [0, 1, 17, 255, 256, 400, 529, 530]
    chunks = [
        world.run([(3, 129, queries[3][:129]), (0, stop, queries[0][start:stop])])[129:]
        for start, stop in itertools.pairwise(cuts)
    ]
    assert_same_bits(torch.cat(chunks), alone[0])


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_one_long_context_split_over_a_team_has_the_bits_of_one_thread(
    kernel_set: str, threads: int, window: int | None
) -> None:
    world = Sequences(3, 1, 16, 64, "float32", window=window)
    q = world.queries(1)
    world.add(3000)
    alone = world.run([(0, 3000, q)])
    _C.set_num_threads(threads)
    assert_same_bits(world.run([(0, 3000, q)]), alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_far_apart_neither_overflow_nor_vanish(kernel_set: str, dtype: ops.KvDtype) -> None:
    world = Sequences(1, 1, 16, 16, dtype)
    world.add(600)
    world.keys[0].mul_(32)  # exact in bfloat16
    q = (world.queries(5) * 40).bfloat16().float()
    expected = world.expected(0, 600, q)
    assert_close(world.run([(0, 600, q)]), expected, length=20000, dtype=getattr(torch, dtype))


def call(*, window: int | None = None, **changes: Any) -> Tensor:
    layer = poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32", num_blocks=4).layers[0]
    operands: dict[str, Any] = {
        "ids": np.zeros(2, np.int32), "positions": np.array([18, 19]), "slots": np.array([18, 19]),
        "query_start": np.array([0, 2]), "context_len": np.array([20]),
        "block_table": np.array([[3, 1]], np.int32),
    }  # fmt: skip
    batch = FlatRows(**operands | changes)
    return eager_ops.attention(torch.randn(2, 32), layer, 1.0, window=window, batch=batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": np.array([[3, 4]], np.int32)}, r"`block_table`\[1\].*\[0, 4\), got 4"),
        ({"block_table": np.array([[-1, 0]], np.int32)}, r"`block_table`\[0\]"),
        ({"context_len": np.array([33])}, r"`context_len`\[0\] must be at most 32, got 33"),
        ({"context_len": np.array([1])}, r"`context_len`\[0\] must be at least 2, got 1"),
        ({"query_start": np.array([0, 3])}, "must run from 0 to 2"),
        ({"query_start": np.array([0, 2, 2]), "context_len": np.array([20, 20]),
          "block_table": np.array([[3, 1], [3, 1]], np.int32)}, "`query_start` must ascend, got 2 before 2"),
        ({"block_table": np.array([[3, 1], [0, 0]], np.int32)}, "`block_table` must have shape"),
        ({"positions": np.array([1])}, "`positions` and `slots` have an entry a token"),
        ({"slots": np.array([0, 64])}, r"`slots`\[1\] must be in \[0, 64\), got 64"),
        ({"window": 0}, "`window` must be positive, got 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_block_ids_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError):
        call(block_table=np.array([[3, 1]]))


@pytest.mark.parametrize(
    ("heads", "dim", "is_of_heads"), [(3, 20, False), (2, 64, False), (3, 32, True), (2, 64, True)]
)
def test_gates_let_through_some_of_the_result(
    kernel_set: str, heads: int, dim: int, is_of_heads: bool
) -> None:
    """Use more tokens than a tile, with gates of both signs, for each dim or for each head."""
    sequences = Sequences(heads, 1, dim, 16, "float32")
    sequence, q = sequences.add(70), sequences.queries(37)
    gate = torch.randn(37, heads if is_of_heads else heads * dim) * 3
    found = sequences.run([(sequence, 70, q)], gate=gate)
    factors = torch.sigmoid(gate.double()).repeat_interleave(dim if is_of_heads else 1, 1)
    expected = sequences.expected(sequence, 70, q).flatten(1) * factors
    tolerance = TOLERANCES["float32"]
    assert_within(found, expected, whole=tolerance, worst=2 * tolerance)


def test_a_gate_of_other_columns_is_refused() -> None:
    recorder = ops.Recorder()
    layer = poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32").layers[0]
    q, gate = recorder.value(Kind.QUERY, 32), recorder.value(Kind.ROWS, 16)
    with pytest.raises(ValueError, match="takes 32 columns as `gate`, not 16"):
        ops.attention(q, layer, ops.AttentionSpec(1.0), gate=gate)
