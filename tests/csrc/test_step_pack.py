"""Packing: panels hold what the file said, to the bit, in the order asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.blocks import FORMATS, meaning, random_weight
from tgi_asgi.ops.packed import (
    Packing,
    head_order,
    interleaved_order,
    ordered_bias,
    pack,
    row_order,
    unpack,
)

EXACT = Packing(is_exact=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [32, 1, 49])
def test_a_packed_weight_means_what_the_file_says(format: str, rows: int) -> None:
    source = random_weight(format, rows, 512, seed=rows)
    packed = pack([(torch.from_numpy(source.data), format)], 512, row_order(rows), EXACT)
    found = unpack(packed)
    assert packed.shape == (rows, 512)
    assert torch.equal(found[:rows], meaning(source))
    assert not found[rows:].any(), "padding is zero"


def test_rows_of_heads_put_rotary_pairs_into_the_two_panels_of_a_strip() -> None:
    order = head_order(2, 1, 64)
    assert sorted(order.tolist()) == list(range(192))
    for head in range(2):
        for strip in range(2):
            rows = order[head * 64 + strip * 32 :][:32] - head * 64
            assert rows[:16].tolist() == list(range(16 * strip, 16 * strip + 16))
            assert (rows[16:] - rows[:16] == 32).all()
    assert order[128:].tolist() == list(range(128, 192)), "values stay in order"


def test_gate_and_up_alternate_by_panels() -> None:
    order = interleaved_order(64)
    assert sorted(order.tolist()) == list(range(128))
    assert order[:16].tolist() == list(range(16))
    assert order[16:32].tolist() == list(range(64, 80))
    assert order[32:48].tolist() == list(range(16, 32))


def test_rows_of_different_formats_are_parts_of_one_weight() -> None:
    sources = [random_weight(format, 64, 256, seed=i) for i, format in enumerate(("Q4_K", "Q4_K", "Q6_K"))]
    order = head_order(2, 1, 64)
    raw = [(torch.from_numpy(source.data), source.format) for source in sources]
    packed = pack(raw, 256, order, Packing(is_exact=False))
    assert packed.formats == ("Q4_K", "Q4_K", "Q6_K")
    assert packed.precision == "int8"
    assert torch.equal(unpack(packed), torch.cat([meaning(source) for source in sources])[order])


def test_a_bias_follows_its_rows_and_is_zero_where_they_are_padding() -> None:
    order = row_order(3)
    found = ordered_bias(torch.tensor([1.0, 2.0, 3.0]), order)
    assert found is not None
    assert found.tolist() == [1.0, 2.0, 3.0] + [0.0] * 29
    assert ordered_bias(None, order) is None


@pytest.mark.parametrize(("format", "levels"), [("Q8_0", 127), ("Q4_0", 8)])
def test_quantised_rows_are_within_half_a_level_of_what_they_were(format: str, levels: int) -> None:
    values = torch.randn(5, 96)
    values[3, 32:64] = 0  # a block of zeros has scale zero
    size = {"Q8_0": 34, "Q4_0": 18}[format]
    out = torch.full((5 * 3 * size,), 0xA5, dtype=torch.uint8)
    torch.ops.tgi.quantise_rows(values, format, out)
    found = unpack(pack([(out, format)], 96, row_order(5), EXACT))[:5]
    blocks = values.reshape(5, 3, 32)
    level = blocks.abs().amax(-1, keepdim=True) / levels
    # One code of sixteen is missing on the side opposite to the largest value: up to a whole level there.
    room = 0.51 if format == "Q8_0" else 1.01
    assert ((found.reshape(5, 3, 32) - blocks).abs() <= room * level + 1e-6).all()
    assert not found[3, 32:64].any()


@pytest.mark.parametrize(
    ("columns", "order", "size", "message"),
    [
        (48, np.arange(32), 32 * 34, "multiple of 32, got 48"),
        (32, np.arange(31), 32 * 34, "multiple of 32, got 31"),
        (32, np.arange(1, 33), 32 * 34, r"must be in \[-1, 32\), got 32"),
        (32, np.arange(32), 32 * 34 + 1, "whole rows of 34 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(columns: int, order: np.ndarray, size: int, message: str) -> None:
    data = torch.zeros(size, dtype=torch.uint8)
    out = torch.zeros(2 * 544, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tgi.pack_weight([data], "Q8_0", columns, torch.from_numpy(order), out)
