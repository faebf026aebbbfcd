"""Packing: the order of rows in panels, biases next to them, and quantisation while packing.

tests/csrc/test_formats.py checks that a packed row equals the file's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.helpers import FAST
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.layout import STRIP, head_order, interleaved_order, ordered, padded, row_order

HEADS = [(64, 64), (80, 32), (20, 12), (6, 2), (256, 128), (112, 112)]


@pytest.mark.parametrize(("head_dim", "rotary_dim"), HEADS)
def test_rows_of_heads_put_rotary_pairs_into_the_two_panels_of_a_strip(
    head_dim: int, rotary_dim: int
) -> None:
    order = head_order(2, head_dim, rotary_dim)
    stored = -(-head_dim // STRIP) * STRIP
    assert len(order) == 2 * stored
    assert sorted(order[order >= 0].tolist()) == list(range(2 * head_dim))
    one, two = order.reshape(2, stored)
    np.testing.assert_array_equal(two, np.where(one < 0, -1, one + head_dim))
    first, second = order[:stored].reshape(-1, 2, 16).swapaxes(0, 1).reshape(2, -1)
    rotated = (first >= 0) & (first < rotary_dim // 2)
    assert rotated.sum() == rotary_dim // 2
    assert (second[rotated] - first[rotated] == rotary_dim // 2).all()
    assert ((first >= 0) == (second >= 0)).all()


def test_values_stay_in_order_and_padding_is_behind_each_head() -> None:
    order = head_order(2, 40, None)
    assert order[:40].tolist() == list(range(40))
    assert (order[40:64] == -1).all()
    assert order[64:104].tolist() == list(range(40, 80))


@pytest.mark.parametrize("rows", [64, 40])
def test_gate_and_up_alternate_by_panels(rows: int) -> None:
    order = interleaved_order(rows)
    assert sorted(order[order >= 0].tolist()) == list(range(2 * rows))
    assert order[:16].tolist() == list(range(16))
    assert order[16:32].tolist() == list(range(rows, rows + 16))
    assert order[32:48].tolist() == list(range(16, 32))


def test_rows_of_several_sources_are_one_weight_in_any_order() -> None:
    sources = [random_weight("Q4_K", rows, 256, seed=rows) for rows in (64, 33, 31)]
    order = np.random.default_rng(0).permutation(np.append(np.arange(128), np.full(32, -1)))
    matrix = _C.pack(
        sources=[source.data for source in sources], format="Q4_K", columns=256, order=order, arena=_C.Arena()
    )
    every = torch.cat([decoded_values(source) for source in sources])[order.clip(0)]
    expected = torch.where(torch.from_numpy(order >= 0)[:, None], every, torch.zeros(()))
    assert (matrix.num_rows, matrix.num_stored_rows) == (128, 160)
    torch.testing.assert_close(torch.from_numpy(matrix.unpack()), expected, rtol=1e-6, atol=1e-7)


def test_a_matrix_of_one_format_is_packed_once_and_others_apart() -> None:
    heads = ops.QkvHeads(2, 1, 32, rotary_dim=32)
    formats = (("Q4_K", 64), ("Q4_K", 32), ("Q6_K", 32))
    sources = [random_weight(format, rows, 256, seed=0) for format, rows in formats]
    parts = ops.qkv_weight(sources, FAST, heads).made.parts
    assert [part.matrix.format for part in parts] == [
        "Q4_K", "Q4_K", "Q6_K",
    ]  # fmt: skip
    assert len(ops.qkv_weight([*sources[:2], sources[1]], FAST, heads).made.parts) == 1


def test_vectors_follow_their_rows_and_are_zero_where_these_are_padding() -> None:
    vector = np.array([1.0, 2.0, 3.0], np.float32)
    assert ordered(vector, row_order(3)).tolist() == [1.0, 2.0, 3.0] + [0.0] * 29
    assert padded(vector).tolist() == [1.0, 2.0, 3.0] + [0.0] * 29


@pytest.mark.parametrize(("format", "levels"), [("Q8_0", 127), ("Q4_0", 8)])
@pytest.mark.parametrize("columns", [96, 72])
def test_quantised_rows_are_within_half_a_level_of_what_they_were(
    format: str, levels: int, columns: int
) -> None:
    values = torch.randn(5, columns)
    values[3, 32:64] = 0  # a block of zeros has scale zero
    packing = ops.Packing(is_exact=True, quantise=format)
    matrix = ops.linear_weight(ops.from_floats(values.numpy()), packing).made.matrix
    assert matrix.format == format
    found = torch.from_numpy(matrix.unpack())[:5]
    blocks = torch.nn.functional.pad(values, (0, found.shape[1] - columns)).view(5, -1, 32)
    level = blocks.abs().amax(-1, keepdim=True) / levels
    # Opposite to the largest value, one of sixteen codes is missing, so the error reaches a whole level
    # there.
    tolerance = 0.51 if format == "Q8_0" else 1.01
    assert ((found.view_as(blocks) - blocks).abs() <= tolerance * level + 1e-6).all()
    assert not found[3, 32:64].any()


def test_a_vocabulary_is_never_quantised_below_eight_bits() -> None:
    source = ops.from_floats(np.random.default_rng(0).standard_normal((40, 64), np.float32))
    packing = ops.Packing(is_exact=False, quantise="Q4_0")
    assert ops.linear_weight(source, packing, is_vocabulary=True).made.matrix.format == "Q8_0"
    assert ops.linear_weight(source, packing).made.matrix.format == "Q4_0"


@pytest.mark.parametrize(
    ("columns", "message"), [(0, "positive"), (1 << 62, "at most"), (3, "whole rows of 12")]
)
def test_rows_without_a_possible_size_are_not_decoded(columns: int, message: str) -> None:
    """2^62 columns have 2^64 bytes, which an integer of 64 bits holds as 0."""
    with pytest.raises(ValueError, match=message):
        _C.decode_rows(np.zeros(16, np.uint8), "F32", columns)


@pytest.mark.parametrize(
    ("columns", "order", "size", "message"),
    [
        (48, np.arange(32), 32 * 34, "48"),
        (32, np.arange(31), 32 * 34, "multiple of 32, got 31"),
        (32, np.arange(1, 33), 32 * 34, r"must be in \[-1, 32\), got 32"),
        (32, np.arange(32), 32 * 34 + 1, "whole rows of 34 bytes"),
        (0, np.arange(32), 32 * 34, "`columns` must be positive, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(columns: int, order: np.ndarray, size: int, message: str) -> None:
    data = np.zeros(size, np.uint8)
    with pytest.raises(ValueError, match=message):
        _C.pack(sources=[data], format="Q8_0", columns=columns, order=order, arena=_C.Arena())
    with pytest.raises(ValueError, match="`format` must be"):
        _C.pack(sources=[data], format="Q9_9", columns=32, order=np.arange(32), arena=_C.Arena())
    with pytest.raises(TypeError):
        _C.pack(
            sources=[data], format="Q8_0", columns=32, order=np.arange(32, dtype=np.int32), arena=_C.Arena()
        )
    with pytest.raises(TypeError):  # non-contiguous bytes are not converted, which would copy a matrix
        _C.pack(
            sources=[np.zeros(2 * 32 * 34, np.uint8)[::2]],
            format="Q8_0", columns=32, order=np.arange(32), arena=_C.Arena(),
        )  # fmt: skip


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e8, -1e8])
def test_a_value_that_no_block_can_hold_is_refused(format: str, value: float) -> None:
    """Check the refusal: the value would silently become an ordinary number and change the model's text."""
    values = np.ones((3, 64), np.float32)
    packing = ops.Packing(is_exact=False, quantise=format)
    values[1, 40] = 5e5
    ops.linear_weight(ops.from_floats(values), packing)
    values[1, 40] = value
    with pytest.raises(ValueError, match="NaN, infinite or too large"):
        ops.linear_weight(ops.from_floats(values), packing)
