"""LoRA adapter deltas of products against float64: any rank, batch rows, kernel set and thread count."""

from __future__ import annotations

import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, FAST, random_source, rounded
from tests.reference.compare import assert_close, assert_same_bits
from tests.support.quantised import ordered_source, random_codes
from tgi_asgi import _C, ops
from tgi_asgi.ops import AdapterLayout, Delta, Packing, Target, direct
from tgi_asgi.ops.adapters import NativeAdapter
from tgi_asgi.ops.tensors import from_tensor, plain_tensor

QUANTISED = Packing(is_exact=False, quantise="Q8_0")
LENGTHS = (1, 1, 9, 2, 30, 1)  # of a batch's rows
ADAPTERS = (None, 0, 1, 0, 1, None)  # adapter of each row


def batch_of(adapters: list[NativeAdapter | None], lengths: tuple[int, ...] = LENGTHS) -> ops.FlatRows:
    total = sum(lengths)
    return ops.FlatRows(
        ids=np.zeros(total, int), positions=np.zeros(total, int), slots=np.zeros(total, int),
        query_start=np.cumsum([0, *lengths]), context_len=np.array(lengths),
        block_table=np.zeros((len(lengths), 1), np.int32), adapters=adapters,
    )  # fmt: skip


def delta(rows: int, columns: int, rank: int, scale: float = 1.5) -> Delta:
    down, up = torch.randn(rank, columns) * columns**-0.5, torch.randn(rows, rank) * rank**-0.5
    return Delta(down.numpy(), up.numpy(), scale)


def added(x: Tensor, change: Delta) -> Tensor:
    """Return the float64 reference, with the matrices rounded to bfloat16."""
    down, up = (torch.from_numpy(each).bfloat16().double() for each in (change.down, change.up))
    found: Tensor = change.scale * (x @ down.T) @ up.T
    return found


def spans(lengths: tuple[int, ...] = LENGTHS) -> list[slice]:
    stops = np.cumsum([0, *lengths]).tolist()
    return [slice(start, stop) for start, stop in pairwise(stops)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 96, 16), (50, 72, 5), (7, 33, 1), (96, 160, 33)])
@pytest.mark.parametrize(
    ("packing", "is_bfloat16"), [(EXACT, False), (FAST, True), (QUANTISED, False)], ids=["f32", "bf16", "q8"]
)
def test_a_product_has_what_its_rows_adapters_add(
    kernel_set: str, packing: Packing, is_bfloat16: bool, rows: int, columns: int, rank: int, threads: int
) -> None:
    _C.set_num_threads(threads)
    tensor, _ = random_source(rows, columns, scale=columns**-0.5)
    weight = ops.linear_weight(from_tensor(tensor.bfloat16() if is_bfloat16 else tensor), packing)
    layout = AdapterLayout({"w": Target(weight, 0, rows)}, max_rank=64)
    changes = [delta(rows, columns, rank), delta(rows, columns, rank + 3, -0.7)]
    packed = [layout.pack({"w": change}) for change in changes]
    step = batch_of([None if which is None else packed[which] for which in ADAPTERS])
    x = torch.randn(sum(LENGTHS), columns)
    found, base = direct.linear(weight, x, False, step, layout), direct.linear(weight, x)
    means = torch.from_numpy(weight.made.matrix.unpack())[:rows, :columns].double()
    given = rounded(x, weight.made.precision).double()
    expected = given @ means.T
    for which, span in zip(ADAPTERS, spans(), strict=True):
        if which is None:
            assert_same_bits(found[span], base[span])
        else:
            expected[span] += added(given[span], changes[which])
    assert_close(found, expected, length=columns, dtype=torch.float32)
    for which, span in zip(ADAPTERS, spans(), strict=True):  # alone and token by token, the bits are the same
        own = [None if which is None else packed[which]]
        count = span.stop - span.start
        assert_same_bits(direct.linear(weight, x[span], False, batch_of(own, (count,)), layout), found[span])
        last = direct.linear(weight, x[span.stop - 1 : span.stop], False, batch_of(own, (1,)), layout)
        assert_same_bits(last, found[span.stop - 1 : span.stop])


def test_an_adapter_has_the_columns_of_the_input_whatever_order_the_weight_has(kernel_set: str) -> None:
    matrix = random_codes(96, 160, 32, order_seed=1)
    weight = ops.linear_weight(ordered_source(matrix), EXACT)
    layout, change = AdapterLayout({"w": Target(weight, 0, 96)}, max_rank=8), delta(96, 160, 8)
    x = torch.randn(sum(LENGTHS), 160)
    step = batch_of([layout.pack({"w": change})] * len(LENGTHS))
    expected = x.double() @ matrix.weights().double().T + added(x.double(), change)
    assert_close(direct.linear(weight, x, False, step, layout), expected, length=160)


def test_all_kernels_and_numbers_of_threads_give_the_same_bits() -> None:
    _, source = random_source(96, 160, scale=0.1)
    weight = ops.linear_weight(source, QUANTISED)
    layout = AdapterLayout({"w": Target(weight, 0, 96)}, max_rank=64)
    packed = [layout.pack({"w": delta(96, 160, rank)}) for rank in (16, 7)]
    step = batch_of([None if which is None else packed[which] for which in ADAPTERS])
    x, before, found = torch.randn(sum(LENGTHS), 160), _C.kernel_set(), []
    try:
        for name in _C.kernel_sets():
            _C.use_kernel_set(name)
            for threads in (1, 2, 5):
                _C.set_num_threads(threads)
                found.append(direct.linear(weight, x, False, step, layout).clone())
    finally:
        _C.use_kernel_set(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_gate_and_up_are_changed_each_by_its_own(kernel_set: str) -> None:
    _, gate_source = random_source(50, 72, scale=0.1)
    _, up_source = random_source(50, 72, scale=0.1)
    weight = ops.gate_up_weight(gate_source, up_source, EXACT)
    layout = AdapterLayout(
        {"gate": Target(weight, 0, 50), "up": Target(weight, 50, 100), "both": Target(weight, 0, 100)}, 8
    )
    gate, up, both = delta(50, 72, 3), delta(50, 72, 8, 2.0), delta(100, 72, 5)
    cases = [{"gate": gate}, {"up": up}, {"gate": gate, "up": up}, {"both": both}]
    x = torch.randn(4 * 3, 72)
    step = batch_of([layout.pack(case) for case in cases], (3,) * 4)
    found = direct.gate_up(weight, x, "silu", False, step, layout)
    sources = [plain_tensor(each).double() for each in (gate_source, up_source)]
    for case, span in zip(cases, spans((3,) * 4), strict=True):
        given = x[span].double()
        halves = [given @ each.T for each in sources]
        for name, change in case.items():
            part = added(given, change)
            if name != "up":
                halves[0] = halves[0] + part[:, :50]
            if name != "gate":
                halves[1] = halves[1] + part[:, -50:]
        expected = torch.nn.functional.silu(halves[0]) * halves[1]
        assert_close(found[span], expected, length=72, dtype=torch.float32)


def test_what_is_not_of_the_layout_is_refused() -> None:
    _, source = random_source(64, 96)
    weight, other = ops.linear_weight(source, EXACT), ops.linear_weight(random_source(64, 64)[1], EXACT)
    layout = AdapterLayout({"w": Target(weight, 0, 64)}, max_rank=4)
    for name, change, message in [
        ("v", delta(64, 96, 4), "v is not a product"),
        ("w", delta(64, 64, 4), r"w is \[64, 96\]"),
        ("w", delta(64, 96, 5), "w has the rank 5, allowed are 1 to 4"),
        ("w", Delta(np.full((1, 96), np.nan, np.float32), np.ones((64, 1), np.float32), 1.0), "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            layout.pack({name: change})
    packed = layout.pack({"w": delta(64, 96, 4)})
    assert packed.num_bytes >= 2 * 4 * (64 + 96)
    with pytest.raises(ValueError, match="has 5 rows, the step 3 tokens"):
        direct.linear(weight, torch.randn(5, 96), False, batch_of([packed], (3,)), layout)
    elsewhere = AdapterLayout({"w": Target(other, 0, 64)}, max_rank=4)
    with pytest.raises(ValueError, match="of another weight"):
        direct.linear(other, torch.randn(3, 64), False, batch_of([packed], (3,)), elsewhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product": 1}, r"must be in \[0, 1\)"),
        ({"panels": [[3, 2]]}, "must lie in 4 inner values"),
        ({"panels": [[0, 5]]}, "must lie in 4 inner values"),
        ({"panels": [[-1, 4]]}, "must lie in"),
        ({"panels": [[0, -1]]}, "must lie in"),
        ({"rows": 15}, r"`panels`\[3\] must lie in 4 inner values and 15 rows"),
        ({"rows": 17}, "have 16 of the 17 rows"),
        ({"num_inner": 13}, "at most 12 inner values"),
    ],
)
def test_the_extension_checks_what_it_is_given(change: dict[str, object], message: str) -> None:
    layout = _C.AdapterLayout([(32, 64, 12)])
    count = int(str(change.get("num_inner", 4)))
    panels = np.tile(np.array(change.get("panels", [[0, 4]]), np.int64), (4, 1))
    part = (
        int(str(change.get("product", 0))), np.zeros((count, 32), np.uint16), np.ones(count, np.float32),
        panels, np.zeros((int(str(change.get("rows", 16))), 16), np.uint16),
    )  # fmt: skip
    with pytest.raises((ValueError, IndexError), match=message):
        _C.Adapter(layout, [part])


@pytest.mark.parametrize(
    ("query_start", "message"),
    [
        ((0, 2, 1000), "`query_start` must run from 0 to 3"),
        ((0, 3), "have one more entry than `context_len`"),
        ((0, 3, 3), "`query_start` must ascend, got 3 before 3"),
        ((0, -1, 3), "`query_start` must ascend, got 0 before -1"),
        ((0, 4, 3), "`query_start` must ascend, got 4 before 3"),
        ((0, 2, 1, 3), "`query_start` must ascend, got 2 before 1"),
    ],
)
def test_sequences_share_out_a_step_s_tokens(query_start: tuple[int, ...], message: str) -> None:
    """A program without a cache reads no sequences, except for adapters."""
    weight = ops.linear_weight(from_tensor(torch.randn(64, 96)), EXACT)
    adapter = AdapterLayout({"w": Target(weight, 0, 64)}, max_rank=8).pack({"w": delta(64, 96, 4)})
    count = max(len(query_start) - 1, 2)
    with pytest.raises(ValueError, match=message):
        ops.FlatRows(
            ids=np.zeros(3, int), positions=np.zeros(3, int), slots=np.zeros(3, int), query_start=query_start,
            context_len=[5] * count, block_table=np.zeros((count, 1), np.int32),
            adapters=[adapter, None, adapter][:count],
        )  # fmt: skip


@pytest.mark.parametrize("num_generated", [-1, 1, 4])
def test_generated_tokens_end_where_a_sequence_does(num_generated: int) -> None:
    with pytest.raises(ValueError, match="`num_generated` must be"):
        ops.FlatRows(
            ids=np.zeros(3, int), positions=np.zeros(3, int), slots=np.zeros(3, int), query_start=[0, 2, 3],
            context_len=[2, 1], block_table=np.zeros((2, 1), np.int32), num_generated=num_generated,
        )  # fmt: skip


def test_other_threads_run_while_an_adapter_is_copied() -> None:
    """Loading an adapter must not delay the streams of a server: this one has 64 MB."""
    columns, num_inner = 16384, 2048
    layout = _C.AdapterLayout([(columns, 64, num_inner)])
    part = (
        0, np.zeros((num_inner, columns), np.uint16), np.ones(num_inner, np.float32),
        np.array([[0, num_inner]] + [[0, 0]] * 3), np.zeros((num_inner, 16), np.uint16),
    )  # fmt: skip
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # only a call that releases the GIL lets the other thread run
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(20):  # if both cores are busy, the other thread may miss its turn
            before = ticks
            _C.Adapter(layout, [part])
            if ticks > before:
                return
        pytest.fail("no other thread ran")
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
