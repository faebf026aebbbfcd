"""The CUDA kernels of LoRA adapters in emulation: tiles of tokens with one adapter, several or none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close, assert_equal

DTYPES = [torch.bfloat16, torch.float16]
RANKS = (8, 24, 16, 0)  # of the slots; 24 is the maximum, 0 means that the adapter lacks the product
RANK = max(RANKS)
PIECES = [(40,), (24, 56), (48, 64, 80)]  # last rows plus one: a product, gate and up, or q, k and v


def adapters_of(tokens: int) -> Tensor:
    """Return the adapter of each token: long runs, short ones, none, and slots that do not exist."""
    pattern = [0] * 11 + [1] * 5 + [-1] * 3 + [2, 0, 1, 2, 4, -7, 1, 3, 1] + [-1] * 9 + [3, 2]
    return torch.tensor((pattern * (tokens // len(pattern) + 1))[:tokens], dtype=torch.int32)


def rank_of(adapters: Tensor) -> Tensor:
    """Return the rank of each token's adapter, 0 for none."""
    exists = (adapters >= 0) & (adapters < len(RANKS))
    return torch.where(exists, torch.tensor(RANKS)[adapters.clamp(0, len(RANKS) - 1).long()], 0)


class Slots:
    """A pool on the device whose slots have matrices of the second of two products; all else is NaN."""

    def __init__(self, device: Device, rows: int, columns: int, num_pieces: int, dtype: torch.dtype) -> None:
        self.downs: list[Tensor] = []  # of each slot: [pieces, rank, columns]
        self.ups: list[Tensor] = []  # [rows, rank]
        stride = 8 * len(RANKS) + RANK * (num_pieces * columns + rows)
        self.pool = device.empty((len(RANKS), stride), dtype)
        places = torch.ones(len(RANKS), 2, 2, dtype=torch.int32) * 8
        for slot, rank in enumerate(RANKS):
            down, up = torch.randn(num_pieces, rank, columns).to(dtype), torch.randn(rows, rank).to(dtype)
            begin, middle = 8 * slot, 8 * slot + down.numel()
            self.pool[slot, begin:middle] = down.flatten()
            self.pool[slot, middle : middle + up.numel()] = up.flatten()
            places[slot, 1] = torch.tensor([rank, slot])
            self.downs.append(down)
            self.ups.append(up)
        self.params = {
            "places": device.tensor(places), "pool": self.pool, "num_slots": len(RANKS), "num_products": 2,
            "product": 1, "slot_stride": stride, "num_columns": columns, "rank": RANK, "type": TYPES[dtype],
            "num_inner": num_pieces * RANK,
        }  # fmt: skip


def check_down(device: Device, tokens: int, columns: int, num_pieces: int, dtype: torch.dtype) -> None:
    slots = Slots(device, 8, columns, num_pieces, dtype)
    x, adapters = device.tensor(torch.randn(tokens, columns).to(dtype)), device.tensor(adapters_of(tokens))
    inner = device.tensor(torch.full((tokens, num_pieces * RANK), 7.0))
    device.run("lora_down", [inner], x=x, adapters=adapters, inner=inner, num_tokens=tokens, **slots.params)
    for token, (slot, rank) in enumerate(zip(adapters.tolist(), rank_of(adapters).tolist(), strict=True)):
        found = inner[token].view(num_pieces, RANK)
        assert (found[:, rank:] == 7.0).all(), "inner values were written that no adapter has"
        if rank:
            expected = slots.downs[slot].double() @ x[token].double()
            assert_close(found[:, :rank], expected, length=columns)


def check_up(
    device: Device, tokens: int, ends: tuple[int, ...], dtype: torch.dtype, *, is_wide: bool,
    factor: float = 1.0,
) -> None:  # fmt: skip
    rows, num_inner = ends[-1], len(ends) * RANK
    slots = Slots(device, rows, 16, len(ends), dtype)
    adapters = device.tensor(adapters_of(tokens))
    inner = device.empty((tokens, num_inner), torch.float32)
    known = torch.arange(num_inner) % RANK < rank_of(adapters)[:, None]
    inner[known] = torch.randn(tokens, num_inner)[known]  # NaN beyond the ranks
    before = torch.randn(tokens, rows).to(torch.float32 if is_wide else dtype)
    out = device.tensor(before)
    first_end, second_end, *_ = (*ends, rows)
    device.run(
        "lora_up", [out], inner=inner, adapters=adapters, out=out, num_tokens=tokens, num_rows=rows,
        first_end=first_end, second_end=second_end, factor=factor, is_wide=is_wide, **slots.params,
    )  # fmt: skip
    for token, (slot, rank) in enumerate(zip(adapters.tolist(), rank_of(adapters).tolist(), strict=True)):
        if rank == 0:
            assert_equal(out[token], before[token])
            continue
        for piece, (start, stop) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            mine = inner[token, piece * RANK : piece * RANK + rank].double()
            expected = before[token, start:stop].double() + factor * (
                slots.ups[slot][start:stop].double() @ mine
            )
            got = out[token, start:stop].float()
            assert_close(got, expected, length=RANK, dtype=torch.float32 if is_wide else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(0, 8), (1, 8), (9, 264), (70, 2568), (530, 72)])
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
    dtype, columns = torch.bfloat16, 2056
    slots = Slots(device, 8, columns, 1, dtype)
    x = device.tensor(torch.randn(512, columns).to(dtype))

    def inner_of(first: int, adapters: list[int]) -> Tensor:
        inner = device.tensor(torch.zeros(len(adapters), RANK))
        device.run(
            "lora_down", [inner], x=x[first:], adapters=device.tensor(torch.tensor(adapters).int()),
            inner=inner, num_tokens=len(adapters), **slots.params,
        )  # fmt: skip
        return inner

    together = inner_of(0, [1] * 24)
    mixed = inner_of(0, [1, 0, -1, 2] * 6)
    for token in range(0, 24, 4):
        assert together[token].all()
        assert_equal(mixed[token], together[token])
        assert_equal(inner_of(token, [1])[0], together[token])
    many = inner_of(0, [1] * 512)  # blocks of two tiles
    assert_equal(many[:24], together)


FAULTS = [
    Fault(what, "lora.cu", old, new, kind)
    for what, old, new, kind in [
        (
            "a tile has one adapter",
            "members_ = __ballot_sync(kAllLanes, slot_ == slot);",
            "members_ = __ballot_sync(kAllLanes, slot_ >= 0);",
            "result",
        ),
        (
            "slots that do not exist are read",
            "slot < p.num_slots ? slot : -1",
            "slot",
            "bounds|result",
        ),
        (
            "tokens past the end are read",
            "lane < Tokens && first + lane < p.num_tokens",
            "lane < Tokens",
            "bounds",
        ),
        (
            "the others of a tile read their own rows",
            "return has(token) ? token : leader_;",
            "return token;",
            "bounds|result",
        ),
        (
            "all of a tile are written",
            "if (is_used && passes.has(token)) p.inner",
            "if (is_used) p.inner",
            "bounds|result|race",
        ),
        (
            "down goes beyond the rank",
            "has_tile[tile] = index < part.rank",
            "has_tile[tile] = index <= part.rank",
            "result",
        ),
        (
            "matrices begin with the slot",
            "int64_t{place[1]} * 8",
            "int64_t{0}",
            "result",
        ),
        (
            "the place is the first product's",
            "(slot * p.num_products + p.product) * 2",
            "(slot * p.num_products) * 2",
            "result",
        ),
        (
            "up lies behind down of the largest rank",
            "int(p.num_inner) / int(product.rank) * rank",
            "p.num_inner",
            "bounds|result",
        ),
        (
            "all rows use the first piece",
            "first * p.num_inner + piece * product.rank",
            "first * p.num_inner + 0 * piece",
            "result",
        ),
        (
            "the third piece is the second",
            "(row >= p.first_end) + (row >= p.second_end)",
            "(row >= p.first_end)",
            "result",
        ),
        (
            "the second row has the first one's weights",
            "load8(up + rank + index, lower)",
            "load8(up + index, lower)",
            "result",
        ),
        (
            "rows past the end are added to",
            "if (rank == 0 || own_row >= p.num_rows) continue;",
            "",
            "bounds|blocks|race|result",
        ),
        (
            "the factor is left out of the second row",
            "p.factor * sums[i].y",
            "sums[i].y",
            "result",
        ),
        (
            "both tiles are the first",
            "* part.rank + index + lane / 4) * columns",
            "* part.rank + index - tile * kInner + lane / 4) * columns",
            "result|bounds",
        ),
        (
            "a second tile goes beyond the rank",
            "is_used || (i == tile && has_tile[i])",
            "is_used || has_tile[i]",
            "result|blocks|race",
        ),
        (
            "the second mma has the first one's columns",
            "{a.z, b.z, a.w, b.w}, weights.z, weights.w",
            "{a.x, b.x, a.y, b.y}, weights.x, weights.y",
            "result",
        ),
        (
            "a warp's sum is missing",
            "other = 1; other < kDownWarps",
            "other = 2; other < kDownWarps",
            "result",
        ),
        (
            "the next pass begins before the sums are read",
            "place] = sum;\n    }\n    __syncthreads();",
            "place] = sum;\n    }",
            "race|order|result",
        ),
    ]
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def check(device: Device) -> None:
        check_down(device, 45, 2056, 3, torch.bfloat16)
        check_down(device, 513, 40, 3, torch.bfloat16)
        for ends in PIECES:
            check_up(device, 45, ends, torch.bfloat16, is_wide=False, factor=0.5)

    assert_caught(fault, check)
