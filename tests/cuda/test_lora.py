"""The CUDA kernels of LoRA adapters in emulation: tiles of tokens with one adapter, several or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close, assert_equal

DTYPES = [torch.bfloat16, torch.float16]
RANKS = (8, 24, 16)  # of the slots; 24 is all that a slot holds
RANK = max(RANKS)
PIECES = [(40,), (24, 56), (48, 64, 80)]  # last rows plus one: a product, gate and up, or q, k and v


def adapters_of(tokens: int) -> Tensor:
    """Return the adapter of each token: long runs, short ones, none, and slots that do not exist."""
    pattern = [0] * 11 + [1] * 5 + [-1] * 3 + [2, 0, 1, 2, 3, -7, 1, 1] + [-1] * 9
    return torch.tensor((pattern * (tokens // len(pattern) + 1))[:tokens], dtype=torch.int32)


def has_adapter(adapters: Tensor) -> Tensor:
    return (adapters >= 0) & (adapters < len(RANKS))


def make_pool(device: Device, rows: int, columns: int, dtype: torch.dtype, *, has_rank_rows: bool) -> Tensor:
    """Return matrices [slots, rows, columns]; what no kernel may read, beyond a slot's rank, is NaN.

    With `has_rank_rows` the rows are the inner values of each piece, otherwise the columns are.
    """
    pool = device.empty((len(RANKS), rows, columns), dtype)
    for slot, rank in enumerate(RANKS):
        inner = torch.arange(rows if has_rank_rows else columns) % RANK < rank
        values = torch.randn(rows, columns).to(dtype)
        if has_rank_rows:
            pool[slot, inner] = values[inner]
        else:
            pool[slot][:, inner] = values[:, inner]
    return pool


def check_down(device: Device, tokens: int, columns: int, num_pieces: int, dtype: torch.dtype) -> None:
    num_inner = num_pieces * RANK
    pool = make_pool(device, num_inner, columns, dtype, has_rank_rows=True)
    x, adapters = device.tensor(torch.randn(tokens, columns).to(dtype)), device.tensor(adapters_of(tokens))
    inner = device.tensor(torch.full((tokens, num_inner), 7.0))
    device.run(
        "lora_down", [inner], x=x, adapters=adapters, ranks=device.tensor(torch.tensor(RANKS).int()),
        pool=pool.flatten(), inner=inner, num_tokens=tokens, num_slots=len(RANKS),
        slot_stride=pool[0].numel(), rank=RANK, num_columns=columns, num_inner=num_inner, type=TYPES[dtype],
    )  # fmt: skip
    for token, slot in enumerate(adapters.tolist()):
        if not has_adapter(adapters)[token]:
            assert (inner[token] == 7.0).all(), "a token without an adapter has inner values"
            continue
        known = torch.arange(num_inner) % RANK < RANKS[slot]
        expected = pool[slot, known].double() @ x[token].double()
        assert_close(inner[token, known], expected, length=columns)
        assert (inner[token, ~known] == 7.0).all(), "inner values beyond the rank were written"


def check_up(
    device: Device, tokens: int, ends: tuple[int, ...], dtype: torch.dtype, *, is_wide: bool,
    factor: float = 1.0,
) -> None:  # fmt: skip
    rows, num_inner = ends[-1], len(ends) * RANK
    pool = make_pool(device, rows, RANK, dtype, has_rank_rows=False)
    adapters = device.tensor(adapters_of(tokens))
    values = torch.randn(tokens, num_inner)
    inner = device.empty((tokens, num_inner), torch.float32)
    rank_of = torch.where(has_adapter(adapters), torch.tensor(RANKS)[adapters.clamp(0, 2).long()], 0)
    known = torch.arange(num_inner) % RANK < rank_of[:, None]
    inner[known] = values[known]
    before = torch.randn(tokens, rows).to(torch.float32 if is_wide else dtype)
    out = device.tensor(before)
    first_end, second_end, *_ = (*ends, rows)
    device.run(
        "lora_up", [out], inner=inner, adapters=adapters, ranks=device.tensor(torch.tensor(RANKS).int()),
        pool=pool.flatten(), out=out, num_tokens=tokens, num_slots=len(RANKS), slot_stride=pool[0].numel(),
        rank=RANK, num_rows=rows, num_inner=num_inner, first_end=first_end, second_end=second_end,
        factor=factor, is_wide=is_wide, type=TYPES[dtype],
    )  # fmt: skip
    for token, slot in enumerate(adapters.tolist()):
        if not has_adapter(adapters)[token]:
            assert_equal(out[token], before[token])
            continue
        for piece, (start, stop) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            mine = inner[token, piece * RANK : piece * RANK + RANKS[slot]].double()
            added = pool[slot, start:stop, : RANKS[slot]].double() @ mine
            expected = before[token, start:stop].double() + factor * added
            got = out[token, start:stop].float()
            assert_close(got, expected, length=RANK, dtype=torch.float32 if is_wide else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(0, 8), (1, 8), (9, 264), (70, 520)])
def test_down_equals_the_reference(device: Device, tokens: int, columns: int, dtype: torch.dtype) -> None:
    for pieces in PIECES:
        check_down(device, tokens, columns, len(pieces), dtype)


@pytest.mark.parametrize("is_wide", [True, False], ids=["float32", "narrow"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
def test_up_equals_the_reference(device: Device, tokens: int, dtype: torch.dtype, is_wide: bool) -> None:
    for ends in (*PIECES, (1026,)):
        check_up(device, tokens, ends, dtype, is_wide=is_wide, factor=0.25)


def test_other_tokens_change_no_bit(device: Device) -> None:
    """A tile of one adapter and a tile of several add in the same order."""
    dtype, columns = torch.bfloat16, 264
    pool = make_pool(device, RANK, columns, dtype, has_rank_rows=True)
    x = device.tensor(torch.randn(24, columns).to(dtype))
    ranks = device.tensor(torch.tensor(RANKS).int())

    def inner_of(first: int, adapters: list[int]) -> Tensor:
        inner = device.empty((len(adapters), RANK), torch.float32)
        device.run(
            "lora_down", [inner], x=x[first:], adapters=device.tensor(torch.tensor(adapters).int()),
            ranks=ranks, pool=pool.flatten(), inner=inner, num_tokens=len(adapters), num_slots=len(RANKS),
            slot_stride=pool[0].numel(), rank=RANK, num_columns=columns, num_inner=RANK, type=TYPES[dtype],
        )  # fmt: skip
        return inner

    together = inner_of(0, [1] * 24)
    mixed = inner_of(0, [1, 0, -1, 2] * 6)
    for token in range(0, 24, 4):
        assert_equal(mixed[token], together[token])
        assert_equal(inner_of(token, [1])[0], together[token])


FAULTS = [
    Fault("a tile keeps its first token's adapter", "lora.cu", "if (slots[i] != loaded) load8(down",
          "if (loaded < 0) load8(down", "result"),
    Fault("up keeps the first token's adapter", "lora.cu", "if (slots[i] != loaded) {",
          "if (loaded < 0) {", "result"),
    Fault("slots that do not exist are read", "lora.cu", "slot >= 0 && slot < p.num_slots ? slot : -1",
          "slot", "bounds|result"),
    Fault("tokens past the end are read", "lora.cu",
          "token < p.num_tokens ? p.adapters[token] : -1", "p.adapters[token]", "bounds"),
    Fault("down reads beyond the rank", "lora.cu", "slot >= 0 && index < p.tokens.ranks[slot]",
          "slot >= 0 && index >= 0",
          "result"),
    Fault("up reads beyond the rank", "lora.cu", "if (index >= ranks[i]) continue;",
          "if (slots[i] < 0) continue;", "result"),
    Fault("all rows use the first piece", "lora.cu", "p.inner + first * p.num_inner + piece * p.tokens.rank",
          "p.inner + first * p.num_inner + 0 * piece", "result"),
    Fault("the third piece is the second", "lora.cu", "(row >= p.first_end) + (row >= p.second_end)",
          "(row >= p.first_end)", "result"),
    Fault("the second row has the first one's weights", "lora.cu", "load8(weights + p.tokens.rank, lower)",
          "load8(weights, lower)", "result"),
    Fault("slots are as far apart as a product is long", "lora.cu",
          "up + slots[i] * p.tokens.slot_stride + index", "up + slots[i] * p.num_rows + index",
          "result|bounds|alignment"),
    Fault("rows past the end are added to", "lora.cu", "if (row >= p.num_rows) return;", "",
          "bounds|blocks|race|result"),
    Fault("the factor is left out of the second row", "lora.cu", "p.factor * sums[i].y", "sums[i].y",
          "result"),
    Fault("all inner values go to one place", "lora.cu",
          "p.inner[(first + i) * p.num_inner + inner] = sum;", "p.inner[(first + i) * p.num_inner] = sum;",
          "race|blocks|result|order"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def check(device: Device) -> None:
        check_down(device, 37, 264, 3, torch.bfloat16)
        for ends in PIECES:
            check_up(device, 37, ends, torch.bfloat16, is_wide=False, factor=0.5)

    assert_caught(fault, check)
