"""How shards split a model: every head, column and word once, whole blocks, and refusals by name."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gguf_blocks import random_matrix
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.experts import shared_down_names
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.registry import all_families
from tgi_asgi.models.shard import CUT_COLUMNS, Columns, cut_model
from tgi_asgi.ops.sources import decode

SMOLLM2: dict[str, Any] = {
    "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "inner": Columns(1536), "vocab_size": 49152
}  # fmt: skip


def test_heads_that_do_not_divide_are_split_unevenly() -> None:
    first, second = cut_model(2, **{**SMOLLM2, "inner": Columns(1536, 32)}, output_block=32)
    assert (first.heads, first.kv_heads) == (range(6), range(2))
    assert (second.heads, second.kv_heads) == (range(6, 9), range(2, 3))
    assert (first.inner, second.inner) == (range(768), range(768, 1536))
    assert (first.vocab_ids, second.vocab_ids) == (range(24576), range(24576, 49152))


def test_more_shards_than_kv_heads_have_some_of_them_several_times() -> None:
    cuts = cut_model(4, **SMOLLM2)
    assert [(cut.heads, cut.kv_heads) for cut in cuts] == [
        (range(2), range(1)), (range(2, 3), range(1)), (range(3, 6), range(1, 2)), (range(6, 9), range(2, 3))
    ]  # fmt: skip


def test_no_block_is_cut() -> None:
    """Use blocks of 256 columns, as in K-quants: four heads of 64."""
    sizes = {**SMOLLM2, "num_heads": 24, "num_kv_heads": 24, "inner": Columns(1792, 256)}
    cuts = cut_model(4, **sizes, output_block=256)
    assert [len(cut.heads) for cut in cuts] == [8, 8, 4, 4]
    assert [len(cut.inner) for cut in cuts] == [512, 512, 512, 256]


@given(
    count=st.integers(2, 9), num_kv_heads=st.integers(1, 12), group=st.integers(1, 6),
    head_dim=st.sampled_from([16, 48, 64, 128]), inner=st.integers(1, 3000), vocab=st.integers(2, 3000),
    output_block=st.sampled_from([1, 32, 256]), down_block=st.sampled_from([1, 32, 256]),
)  # fmt: skip
def test_every_part_is_had_once_and_every_shard_has_some(
    count: int, num_kv_heads: int, group: int, head_dim: int, inner: int, vocab: int, output_block: int,
    down_block: int,
) -> None:  # fmt: skip
    num_heads = num_kv_heads * group
    try:
        cuts = cut_model(
            count, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, vocab_size=vocab,
            inner=Columns(inner, down_block), of_expert=Columns(inner // 2, down_block),
            of_shared=Columns(2 * inner), output_block=output_block,
        )  # fmt: skip
    except ModelLoadError as error:
        assert "shard" in str(error)
        return
    for size, parts in (
        (num_heads, [cut.heads for cut in cuts]),
        (inner, [cut.inner for cut in cuts]),
        (inner // 2, [cut.of_expert for cut in cuts]),
        (2 * inner, [cut.of_shared for cut in cuts]),
        (vocab, [cut.vocab_ids for cut in cuts]),
    ):
        assert list(itertools.chain(*parts)) == list(range(size))
        assert all(parts) or size == 0
    for cut in cuts:
        assert {head // group for head in cut.heads} == set(cut.kv_heads)
        assert len(cut.heads) % len(cut.kv_heads) == 0
        assert cut.heads.start * head_dim % output_block == 0
        assert cut.inner.start % down_block == 0


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (12, {}, "3 query heads of each KV head are too few for"),
        (4, {"vocab_size": 3}, "3 vocabulary ids are too few for 4 shards"),
        (
            4,
            {"inner": Columns(512, 256)},
            r"512 columns of the MLP, in 2 parts that cannot be",
        ),
        (4, {"of_expert": Columns(384, 128)}, "384 columns of each expert, in 3 parts that cannot be cut"),
        (4, {"of_shared": Columns(3)}, "3 columns of the shared expert are too few for 4 shards"),
        (2, {"output_block": 256}, "3 KV heads, in 1 parts that cannot be cut"),
        (65, {}, r"--num-shard must be in 1\.\.64, got 65"),
    ],
)
def test_a_model_with_too_few_parts_is_refused(count: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        cut_model(count, **{**SMOLLM2, **changes})


def test_all_products_that_are_cut_by_columns_are_counted_as_such() -> None:
    """Act-order's codes are decoded where columns are cut, which the check of memory knows by these names."""
    families = [each for each in all_families() if each.architecture != "NemotronHForCausalLM"]  # never cut
    readers = {getattr(family.model, "weights_class", LayerWeights) for family in families}
    names = {
        name.removesuffix(".weight")
        for reader in readers for experts in reader.expert_names for name in shared_down_names(experts)
    }  # fmt: skip
    assert names and names <= set(CUT_COLUMNS)


@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_columns_of_a_matrix_are_those_of_its_values(format: str) -> None:
    made = random_matrix(format, 5, 768, 1.0, np.random.default_rng(1))
    source = ops.WeightSource(made.data.reshape(-1), format, (5, 768))
    found = decode(source.columns(256, 512))
    np.testing.assert_array_equal(found, decode(source)[:, 256:512])


def test_columns_within_a_block_are_refused() -> None:
    made = random_matrix("Q8_0", 2, 64, 1.0, np.random.default_rng(1))
    with pytest.raises(ValueError, match="not whole blocks of Q8_0"):
        ops.WeightSource(made.data.reshape(-1), "Q8_0", (2, 64)).columns(0, 48)


def test_columns_of_a_matrix_whose_groups_lie_apart_are_in_its_own_order() -> None:
    values = np.arange(128, dtype=np.float32).reshape(2, 64)
    order = np.random.default_rng(1).permutation(64)
    source = ops.WeightSource(values[:, order].copy().view(np.uint8).reshape(-1), "F32", (2, 64), order)
    np.testing.assert_array_equal(decode(source.columns(10, 20)), values[:, 10:20])
