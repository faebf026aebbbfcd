"""The operator attention: float64 reference, poisoned cache, and bits that depend on nothing else."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.reference.attention import attention as reference
from tests.reference.compare import assert_close, assert_same_bits
from tgi_asgi import _C
from tgi_asgi.ops import AttentionTables, KvLayer, allocate_kv, attention
from tgi_asgi.ops.kv import kv_write

DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Sequences:
    """Sequences in a pool whose every other place is NaN."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, context: int) -> int:
        shape = (context, self.kv_heads, self.head_dim)
        self.keys.append(torch.randn(shape).to(self.dtype).float())
        self.values.append(torch.randn(shape).to(self.dtype).float())
        return len(self.keys) - 1

    def run(self, parts: list[tuple[int, int, Tensor]]) -> Tensor:
        """Attend parts (sequence, context, its last queries), each with only `context` tokens written."""
        blocks = [-(-context // self.block_size) for _, context, _ in parts]
        num_blocks = sum(blocks) + 2
        layer = allocate_kv(1, num_blocks, self.kv_heads, self.head_dim, self.block_size, self.dtype)[0]
        layer.pool.fill_(torch.nan)
        ids = torch.randperm(num_blocks).tolist()
        table = torch.full((len(parts), max(blocks, default=1)), 1 << 30, dtype=torch.int32)
        for row, (sequence, context, _) in enumerate(parts):
            mine = [ids.pop() for _ in range(blocks[row])]
            table[row, : blocks[row]] = torch.tensor(mine, dtype=torch.int32)
            self.write(layer, sequence, context, mine)
        lengths = torch.tensor([0] + [len(q) for _, _, q in parts])
        tables = AttentionTables(
            query_start=lengths.cumsum(0).int(),
            context_len=torch.tensor([context for _, context, _ in parts], dtype=torch.int32),
            block_table=table,
        )
        q = torch.cat([q for _, _, q in parts]) if parts else self.queries(0)
        return attention(q, layer, tables, self.head_dim**-0.5)

    def write(self, layer: KvLayer, sequence: int, context: int, blocks: list[int]) -> None:
        slots = [blocks[i // self.block_size] * self.block_size + i % self.block_size for i in range(context)]
        keys, values = self.keys[sequence][:context], self.values[sequence][:context]
        kv_write(layer, torch.tensor(slots, dtype=torch.int64), keys, values)

    def queries(self, count: int) -> Tensor:
        return torch.randn(count, self.heads, self.head_dim)

    def expected(self, sequence: int, context: int, q: Tensor) -> Tensor:
        keys, values = self.keys[sequence][:context], self.values[sequence][:context]
        return reference(q, keys, values, self.head_dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 16), (4, 4, 80, 32), (8, 1, 128, 64), (1, 1, 16, 16), (40, 2, 32, 16), (2, 2, 256, 64)],
)
def test_all_lengths_and_shapes_equal_the_reference(
    isa: str, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    world = Sequences(heads, kv_heads, head_dim, block_size, dtype)
    cases = [(1, 1), (17, 17), (3, 1), (block_size + 1, 2), (256, 1), (257, 3), (300, 17)]
    parts = [(world.add(context), context, world.queries(count)) for context, count in cases]
    out = world.run(parts)
    assert_close(out, torch.cat([world.expected(*part) for part in parts]), length=head_dim + 300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_row_has_the_same_bits_in_any_batch_chunking_block_table_and_team(
    isa: str, threads: int, dtype: torch.dtype
) -> None:
    world = Sequences(6, 2, 32, 16, dtype)
    contexts = [530, 1, 40, 257, 129]
    queries = [world.queries(context) for context in contexts]
    for context in contexts:
        world.add(context)
    _C.set_num_threads(threads)
    together = world.run([(s, contexts[s], queries[s]) for s in range(5)]).split(contexts)
    _C.set_num_threads(1)
    for s, context in enumerate(contexts):
        assert_same_bits(world.run([(s, context, queries[s])]), together[s])
    cuts = [0, 1, 17, 255, 256, 400, 529, 530]
    chunks = [
        world.run([(3, 129, queries[3][:129]), (0, stop, queries[0][start:stop])])[129:]
        for start, stop in itertools.pairwise(cuts)
    ]
    assert_same_bits(torch.cat(chunks), together[0])


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_one_long_context_split_over_a_team_has_the_bits_of_one_thread(isa: str, threads: int) -> None:
    world = Sequences(3, 1, 16, 64, torch.float32)
    q = world.queries(1)
    world.add(3000)
    alone = world.run([(0, 3000, q)])
    _C.set_num_threads(threads)
    assert_same_bits(world.run([(0, 3000, q)]), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart_neither_overflow_nor_vanish(isa: str, dtype: torch.dtype) -> None:
    world = Sequences(1, 1, 16, 16, dtype)
    world.add(600)
    world.keys[0].mul_(40)
    q = world.queries(5) * 40
    assert_close(world.run([(0, 600, q)]), world.expected(0, 600, q), length=20000)


def test_no_sequences_and_sequences_without_queries_are_served() -> None:
    world = Sequences(2, 1, 16, 16, torch.float32)
    assert world.run([]).shape == (0, 32)
    world.add(20)
    q = world.queries(2)
    out = world.run([(0, 20, world.queries(0)), (0, 20, q), (0, 0, world.queries(0))])
    assert_close(out, world.expected(0, 20, q), length=40)


def call(**changes: object) -> Tensor:
    layer = allocate_kv(1, 4, 1, 16, 16, torch.float32)[0]
    layer.pool.zero_()
    operands = {
        "query_start": torch.tensor([0, 2], dtype=torch.int32),
        "context_len": torch.tensor([20], dtype=torch.int32),
        "block_table": torch.tensor([[3, 1]], dtype=torch.int32),
    } | changes
    return attention(torch.randn(2, 2, 16), layer, AttentionTables(**operands), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": torch.tensor([[3, 4]], dtype=torch.int32)}, r"`block_table`\[1\].*\[0, 4\), got 4"),
        ({"block_table": torch.tensor([[-1, 0]], dtype=torch.int32)}, r"`block_table`\[0\]"),
        ({"context_len": torch.tensor([33], dtype=torch.int32)}, r"`context_len`\[0\] must be in \[2, 32\]"),
        ({"context_len": torch.tensor([1], dtype=torch.int32)}, r"`context_len`\[0\] must be in \[2, 32\]"),
        ({"query_start": torch.tensor([0, 3], dtype=torch.int32)}, "must run from 0 to 2"),
        ({"query_start": torch.tensor([0, 2])}, "`query_start` must be Int, got Long"),
        ({"block_table": torch.tensor([[3, 1], [0, 0]], dtype=torch.int32)}, "`block_table` must have shape"),
        ({"block_table": torch.zeros(1, 4, dtype=torch.int32)[:, ::2]}, "`block_table` must be contiguous"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    call()
    with pytest.raises(RuntimeError, match=message):
        call(**change)


def test_contexts_beyond_a_window_are_refused_and_within_it_nothing_changes() -> None:
    layer = allocate_kv(1, 2, 1, 16, 16, torch.float32)[0]
    layer.pool.normal_()
    tables = AttentionTables(
        *(torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [20], [[0, 1]]))
    )
    q = torch.randn(1, 1, 16)
    assert_same_bits(attention(q, layer, tables, 0.25, 20), attention(q, layer, tables, 0.25))
    with pytest.raises(ValueError, match="contexts of 20 tokens are beyond the window of 19"):
        attention(q, layer, tables, 0.25, 19)
