"""Attention called from torch once for each layer: every rule and score modification, and stable bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_same_bits, assert_within
from tests.support.batches import flat_rows, random_blocks
from tests.support.kv import poison, poisoned_pool
from tests.support.paged_layers import DTYPES, NARROW, RULES, SHAPES, TOLERANCES, Layer
from tgi_asgi import _C
from tgi_asgi.models.config import CacheShape
from tgi_asgi.ops import AttentionSpec, KvDtype, KvPool
from tgi_asgi.ops.paged import PagedAttention
from tgi_asgi.runner.inputs import StepInputs
from tgi_asgi.runner.plan import StepRow


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim", "block_size", "dtype"),
    [(*shape, dtype) for shape in SHAPES for dtype in DTYPES]
    + [(*shape, dtype) for shape in NARROW for dtype in DTYPES[:2]],
)
def test_heads_of_every_size_equal_the_reference(
    kernel_set: str, heads: int, kv_heads: int, head_dim: int, value_dim: int, block_size: int,
    dtype: KvDtype,
) -> None:  # fmt: skip
    Layer(heads, kv_heads, head_dim, value_dim, dtype, block_size).check([2, 17, 33, 257, 300])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_what_a_layer_sees_and_does_with_scores_equals_the_reference(
    kernel_set: str, rules: dict[str, Any], dtype: KvDtype
) -> None:
    _C.set_num_threads(3)
    longest = 600 if rules.get("chunk") == 512 else 330  # more than a window, a chunk, or 256 positions
    Layer(4, 2, 64, 32, dtype, rules=rules).check([3, 49, 130, longest], last=2)


@pytest.mark.parametrize("rules", [RULES["all"], RULES["window"], RULES["everything"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_an_image_see_each_other(kernel_set: str, dtype: KvDtype, rules: dict[str, Any]) -> None:
    layer = Layer(4, 2, 32, 32, dtype, rules=rules)
    given = layer.heads_of([400, 20])
    ends = [torch.arange(1, 401), torch.arange(1, 21)]
    for first, stop in ((3, 9), (200, 290), (399, 400)):
        ends[0][first:stop] = stop
    ends[1][:20] = 20
    found = layer.run(given, [[(0, 400), (0, 20)]], torch.cat(ends).int())
    for each, end, out in zip(given, ends, found, strict=True):
        tolerance = TOLERANCES[dtype]
        assert_within(out, layer.expected(each, end), whole=tolerance, worst=2 * tolerance)


@pytest.mark.parametrize("rules", [RULES["all"], RULES["window"], RULES["everything"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_chunking_and_team(
    kernel_set: str, dtype: KvDtype, rules: dict[str, Any]
) -> None:
    layer = Layer(4, 2, 36 if dtype == "float32" else 96, 64, dtype, rules=rules)
    given = layer.heads_of([700, 40, 1])
    alone = [layer.run([each], [[(0, len(each[0]))]])[0] for each in given]
    steps = [[(0, 300), (0, 0), (0, 0)], [(300, 699), (0, 39), (0, 1)], [(699, 700), (39, 40), (0, 0)]]
    for threads in (2, 7):
        _C.set_num_threads(threads)
        for found, expected in zip(layer.run(given, steps), alone, strict=True):
            assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_another_layer_and_strided_heads_are_attended(dtype: KvDtype) -> None:
    layer = Layer(4, 2, 64, 64, dtype)
    pool = layer.pool([40])
    packed = torch.randn(40, 8 * 64)
    q, k, v = (part.unflatten(1, (-1, 64)) for part in packed.split([256, 128, 128], dim=1))
    attention, spec = PagedAttention(max_context=40), AttentionSpec(layer.scale)
    attention.begin(flat_rows([(0, 40)], [[2, 0, 1]], 16))
    first = attention.run(pool.layers[0], q, k, v, spec)
    across = torch.randn(4, 64, 40).permute(2, 0, 1)  # a head's dims are not adjacent
    second = attention.run(pool.layers[0], across, None, None, spec)
    for found, queries in ((first, q), (second, across)):
        expected = layer.expected((queries, k, v))
        assert_within(found.flatten(1), expected, whole=TOLERANCES[dtype], worst=2 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_keys_written_alone_are_those_written_with_queries(kernel_set: str, dtype: KvDtype) -> None:
    _C.set_num_threads(3)
    q, k, v = torch.randn(50, 4, 32), torch.randn(50, 2, 32), torch.randn(50, 2, 64)
    found = []
    for is_alone in (False, True):
        layer = poisoned_pool(
            num_kv_heads=2, head_dim=32, value_dim=64, dtype=dtype, num_blocks=4
        ).layers[0]  # fmt: skip
        attention = PagedAttention(max_context=64)
        attention.begin(flat_rows([(0, 50)], [[2, 0, 3, 1]], 16))
        if is_alone:
            attention.write(layer, k, v)
        keys, values = (None, None) if is_alone else (k, v)
        found.append(attention.run(layer, q, keys, values, AttentionSpec(0.2)))
    assert_same_bits(*found)
    attention.begin(flat_rows([(0, 49)], [[2, 0, 3, 1]], 16))
    with pytest.raises(ValueError, match="`begin` must have been given a batch of these 50 tokens"):
        attention.write(layer, k, v)
    with pytest.raises(ValueError, match="`k` and `v` must have 2 heads, got 2 and 1"):
        attention.write(layer, k[:49], v[:49, :1])


def call(visible_until: Any = None, spec: AttentionSpec | None = None, **changes: Any) -> Tensor:
    layer = poisoned_pool(num_kv_heads=2, head_dim=16, value_dim=8, dtype="float32", num_blocks=4).layers[0]
    arrays: dict[str, Any] = {
        "ids": np.zeros(2, np.int32), "positions": np.array([18, 19]), "slots": np.array([18, 19]),
        "query_start": np.array([0, 2]), "context_len": np.array([20]),
        "block_table": np.array([[3, 1]], np.int32),
    }  # fmt: skip
    heads = {"q": torch.randn(2, 4, 16), "k": torch.randn(2, 2, 16), "v": torch.randn(2, 2, 8)}
    batch = {name: value for name, value in changes.items() if name in arrays}
    heads |= {name: value for name, value in changes.items() if name in heads}
    attention = PagedAttention(max_context=changes.get("max_context", 64))
    attention.begin(_C.FlatRows(**arrays | batch), visible_until)
    return attention.run(layer, heads["q"], heads["k"], heads["v"], spec or AttentionSpec(1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": np.array([[3, 4]], np.int32)}, r"`block_table`\[1\].*\[0, 4\), got 4"),
        ({"block_table": np.array([[-1, 0]], np.int32)}, r"`block_table`\[0\]"),
        ({"block_table": np.array([[3]], np.int32)}, r"`context_len`\[0\] must be at most 16, got 20"),
        ({"context_len": np.array([1])}, r"`context_len`\[0\] must be at least 2, got 1"),
        ({"max_context": 19}, r"`context_len`\[0\] must be at most 19, got 20"),
        ({"query_start": np.array([0, 3])}, "must run from 0 to 2"),
        ({"slots": np.array([0, 64])}, r"`slots`\[1\] must be in \[0, 64\), got 64"),
        ({"slots": np.array([-1, 0])}, r"`slots`\[0\]"),
        ({"visible_until": torch.tensor([19, 21]).int()}, r"`visible_until`\[1\].* in \[20, 20\], got 21"),
        ({"visible_until": torch.tensor([18, 20]).int()}, r"`visible_until`\[0\].* in \[19, 20\], got 18"),
        ({"visible_until": torch.tensor([20]).int()}, "`visible_until` must have shape"),
        ({"q": torch.randn(3, 4, 16)}, "`k` must have the batch's 3 tokens"),
        ({"q": torch.randn(2, 3, 16)}, "`q` must have a multiple of 2 heads, got 3"),
        ({"q": torch.randn(2, 4, 14)}, "heads of `q` must have 16 dims, got 14"),
        ({"k": torch.randn(2, 1, 16)}, "`k` and `v` must have 2 heads"),
        ({"k": torch.randn(2, 2, 14)}, "heads of `k` must have 16 dims"),
        ({"v": torch.randn(2, 2, 16)}, "heads of `v` must have 8 dims, got 16"),
        ({"v": None}, "`k` and `v` come together"),
        ({"spec": AttentionSpec(1.0, sinks=np.zeros(2, np.float32))}, "`sinks` must have 4 elements"),
        ({"spec": AttentionSpec(1.0, slopes=np.zeros(8, np.float32))}, "`slopes` must have 4 elements"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": float("nan")}, "`scale` must be finite"),
        ({"window": 0}, "`window` must be positive, got 0"),
        ({"chunk": -1}, "`chunk` must be positive, got -1"),
        ({"soft_cap": 0.0}, "`soft_cap` must be positive, got 0"),
        ({"sinks": np.array([0, np.nan], np.float32)}, r"`sinks`\[1\] must be finite"),
        ({"slopes": np.array([np.inf], np.float32)}, r"`slopes`\[0\] must be finite"),
        ({"slopes": np.zeros((2, 2), np.float32)}, "`slopes` must have shape"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**{"scale": 1.0, **change})


def test_tensors_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError):
        call(q=torch.randn(2, 4, 16).double())
    wide: Any = np.zeros(4)
    with pytest.raises(TypeError):
        AttentionSpec(1.0, sinks=wide)


def test_a_run_without_a_batch_is_refused() -> None:
    layer = poisoned_pool(num_kv_heads=2, head_dim=16, dtype="float32").layers[0]
    with pytest.raises(ValueError, match="`begin` must have been given a batch"):
        PagedAttention(max_context=8).run(layer, torch.randn(1, 2, 16), None, None, AttentionSpec(1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [5, 16, 33, 300])
def test_what_a_window_hides_is_not_read(dtype: KvDtype, window: int) -> None:
    """Fill blocks before the window with NaN, as other sequences may already own them."""
    layer = Layer(4, 2, 32, 32, dtype, rules={"window": window})
    length = 600
    [(q, k, v)] = layer.heads_of([length])
    pool = layer.pool([length])
    [blocks] = random_blocks([length], pool.num_blocks, 16)
    attention = PagedAttention(max_context=length)
    spec = AttentionSpec(layer.scale, window=window)
    rows: dict[int, Tensor] = {}
    for is_lost in (False, True):
        attention.begin(flat_rows([(0, length)], [blocks], 16))
        attention.run(pool.layers[1], q, k, v, spec)
        for start in (40, 299, 599):
            tokens = slice(start, start + 1)
            if is_lost:
                for block in blocks[: (start - window + 1) // 16 if start >= window else 0]:
                    pool.native.memory()[block] = 0xFF
            attention.begin(flat_rows([(start, start + 1)], [blocks], 16))
            found = attention.run(pool.layers[1], q[tokens], k[tokens], v[tokens], spec)
            assert_same_bits(found, rows.setdefault(start, found))
    assert all(row.isfinite().all() for row in rows.values())


def test_layers_of_a_group_write_to_its_blocks_alone() -> None:
    shapes = [CacheShape(2, 32, 32), CacheShape(1, 64, 16), CacheShape(2, 32, 32)]
    pool = KvPool(shapes, groups=[0, 1, 1], num_blocks=6, block_size=16, dtype="float32")
    assert pool.native.block_bytes == 16 * 4 * (64 + 16 + 128)  # the size of the larger group, the second
    inputs = StepInputs(
        vocab_size=9,
        num_blocks=6,
        block_size=16,
        max_context=64,
        max_rows=2,
        max_tokens=64,
        windows=(None, 20),
    )
    attention = PagedAttention(max_context=64)
    q, k, v = (torch.randn(40, heads, 64) for heads in (2, 1, 1))
    spec = AttentionSpec(0.125)
    attention.begin(
        inputs.fill([StepRow(0, [1] * 40, 0, [[0, 1, 2], [3, 4, 5]], True)], np.zeros(2, np.int32))
    )
    for layer, blocks in ((pool.layers[0], [0, 1, 2]), (pool.layers[1], [3, 4, 5])):
        poison(pool)
        wide = layer.head_dim == 64
        given = (
            (q, k, v[..., :16])
            if wide
            else (q[..., :32], k[..., :32].repeat(1, 2, 1), v[..., :32].repeat(1, 2, 1))
        )
        out = attention.run(layer, *given, spec)
        assert out.isfinite().all()
        is_written = (pool.native.memory() != 0xFF).any(axis=1)
        assert is_written.nonzero()[0].tolist() == blocks


def test_a_batch_has_the_block_tables_of_a_pool_s_groups() -> None:
    pool = KvPool([CacheShape(1, 16, 16)] * 2, groups=[0, 1], num_blocks=2, block_size=16, dtype="float32")
    attention = PagedAttention(max_context=16)
    attention.begin(flat_rows([(0, 3)], [[1]], 16))
    row = torch.randn(3, 1, 16)
    with pytest.raises(ValueError, match="the block tables of 2 groups, got 1"):
        attention.run(pool.layers[1], row, row, row, AttentionSpec(1.0))


def test_a_call_that_finds_no_memory_leaves_nothing_half_made() -> None:
    """Limit the address space to less than the partial results of a long context take, and then no more."""
    script = """
import resource
import numpy as np
from tgi_asgi import _C

_C.configure_team(1)
pool = _C.KvPool(layers=[(1, 2, 2, 0)], num_blocks=1, block_size=16, precision="float32")
attention = _C.PagedAttention(max_context=2**30)
zero, heads, out = np.zeros(1, np.int32), np.ones((1, 1, 2), np.float32), np.zeros((1, 1, 2), np.float32)
attention.begin(
    _C.FlatRows(
        ids=zero, positions=zero, slots=zero, query_start=np.array([0, 1]), context_len=np.array([1]),
        block_table=zero[None],
    )
)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (64 << 20)
for limit in (size, size, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        attention.run(pool, 0, heads, heads, heads, out, _C.AttentionSpec(scale=1.0))
        print(out.tolist())
    except MemoryError:
        print("no memory")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["no memory", "no memory", "[[[1.0, 1.0]]]"]
