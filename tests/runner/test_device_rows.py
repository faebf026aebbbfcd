"""A plan's rows in the inputs of a CUDA runner's step: where values are written, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tgi_asgi.ops import DeviceRows, PlanError, RowLimits
from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.cuda_layout import graph_layout, plain_layout
from tgi_asgi.runner.plan import StateMoves, StepRow
from tgi_asgi.types import Pooling, PoolingKind

BLOCK = 4
LIMITS = RowLimits(
    vocab_size=100,
    num_blocks=50,
    block_size=BLOCK,
    max_context=40,
    max_rows=8,
    max_tokens=60,
    windows=(None,),
)
Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture
def rows() -> DeviceRows:
    return DeviceRows(StepRow, LIMITS, is_batch_invariant=False)


def written(
    rows: DeviceRows,
    shape: StepShape,
    needing: Sequence[int] | None = None,
    masked: Sequence[int] = (),
    adapters: Sequence[int] = (),
) -> Arrays:
    """Write the rows over memory full of ones; return the inputs."""
    memory = np.full(shape.num_bytes, 0xFF, np.uint8)
    rows.write(memory, shape.sections.firsts, shape.sizes, needing, masked, adapters)
    return shape.sections.arrays(memory) | {"entries": memory[shape.sections.num_bytes :].view(np.int32)}


def lists(arrays: Arrays) -> dict[str, Any]:
    return {name: array.tolist() for name, array in arrays.items()}


def test_rows_lie_in_a_larger_graph_with_padding_after_the_decodes_and_at_the_end(rows: DeviceRows) -> None:
    plan = [
        StepRow(2, None, 5, [[7, 9]], samples=True),
        StepRow(0, [50], 4, [[1, 3]], samples=False),
        StepRow(6, [60, 61, 62], 3, [[8, 2, 4]], samples=True),
    ]
    rows.read(plan)
    assert (rows.num_tokens, rows.num_decodes, rows.num_entries) == (5, 2, 6)
    assert (rows.sampling, rows.sampling_slots, rows.prompt_lens) == ([0, 2], [2, 6], [(3, 6)])
    assert [rows.end(index) for index in range(3)] == [1, 2, 5]
    found = written(rows, StepShape(8, 5, 5, 3, 4, num_entries=7), masked=[6, 2], adapters=[-1, 4, 3])
    assert lists(found) == {
        "slots": [9 * 4 + 1, 3 * 4, -1, 8 * 4 + 3, 2 * 4, 2 * 4 + 1, -1, -1],
        "ids": [0, 50, 0, 60, 61, 62, 0, 0],
        "positions": [5, 4, 0, 3, 4, 5, 0, 0],
        "adapters": [-1, 4, -1, 3, 3, 3, -1, -1],
        "query_start": [0, 0, 0, 3, 6, 6],
        "context_len": [6, 5, 0, 6, 0],
        "table_slots": [2, 0, -1, 6, -1],
        "table_firsts": [0] * 5,
        "table_starts": [0, 2, 0, 4, 0],
        "from_slot": [2, -1, -1],
        "rows": [0, 1, 0, 5, 0],
        "row_slots": [2, -1, -1, 6, -1],
        "mask_rows": [1, -1, -1, 0, -1],
        "entries": [7, 9, 1, 3, 8, 2, -1],
    }


def test_without_a_graph_only_rows_that_need_logits_have_some(rows: DeviceRows) -> None:
    rows.read([StepRow(1, None, 3, [[5]], samples=True), StepRow(0, [1, 2], 0, [[6]], samples=False)])
    found = lists(written(rows, StepShape(3, 2, 1, 1, 2, num_entries=2), needing=[1]))
    assert (found["rows"], found["row_slots"], found["query_start"]) == ([2], [-1], [0, 1, 3])
    assert found["slots"] == [5 * 4 + 3, 6 * 4, 6 * 4 + 1]
    assert lists(written(rows, StepShape(3, 2, 0, 1, 2, num_entries=2), needing=[]))["rows"] == []


def test_samples_and_vectors_are_found_behind_the_padding_of_a_graph(rows: DeviceRows) -> None:
    rows.read(
        [
            StepRow(2, None, 5, [[7, 9]], samples=True),
            StepRow(0, [50], 4, [[1, 3]], samples=False),
            StepRow(6, [60, 61, 62], 3, [[8, 2, 4]], samples=True),
        ]
    )
    padded = graph_layout(StepShape(11, 6, 6, 4, 4), rows)
    assert padded.shape == StepShape(11, 6, 6, 4, 4, num_entries=6)
    assert ([padded.end(index) for index in range(3)], padded.logits_rows([0, 2])) == ([1, 2, 7], [0, 4])
    exact = graph_layout(StepShape(5, 3, 3, 2, 3), rows)
    assert ([exact.end(index) for index in range(3)], exact.logits_rows([0, 2])) == ([1, 2, 5], [0, 2])
    plain = plain_layout(rows, [0, 2])
    assert plain.shape == StepShape(5, 3, 2, 2, 3, num_entries=6, prompt_lens=((3, 6),))
    assert ([plain.end(index) for index in range(3)], plain.logits_rows([0, 2])) == ([1, 2, 5], [0, 1])
    assert plain.logits_rows([2]) == [1]


def random_rows(random_: random.Random, tables: dict[int, list[int]], start: dict[int, int]) -> list[StepRow]:
    """Return rows of some slots; a slot's table grows, and now and then is another."""
    plan = []
    for slot in random_.sample(range(8), random_.randint(1, 8)):
        if random_.random() < 0.2:
            tables[slot], start[slot] = [], random_.randint(0, 9)
        ids = None if random_.random() < 0.7 else [random_.randrange(100)] * random_.randint(1, 4)
        stop = start[slot] + (1 if ids is None else len(ids))
        if stop > 40:
            continue
        while len(tables[slot]) * BLOCK < stop:
            tables[slot].append(random_.randrange(50))
        if random_.random() < 0.2:  # its first entries may be the same, as in a prefix cache
            count = random_.randint(0, len(tables[slot]))
            tables[slot] = [*tables[slot][:count], *(random_.randrange(50) for _ in tables[slot][count:])]
        plan.append(StepRow(slot, ids, start[slot], [tables[slot]], samples=random_.random() < 0.5))
        start[slot] = stop
    return sorted(plan, key=lambda row: row.num_tokens) if plan else random_rows(random_, tables, start)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_slot_had_before_its_table_and_tokens_are_those_of_the_row(seed: int) -> None:
    random_, rows = random.Random(seed), DeviceRows(StepRow, LIMITS, False)
    tables: dict[int, list[int]] = {slot: [] for slot in range(8)}
    start = dict.fromkeys(tables, 0)
    kept = {slot: dict[int, int]() for slot in tables}  # as a device keeps them
    for _ in range(200):
        for slot in random_.sample(range(6), 2):  # the last two never do, as those of drafts
            rows.start(slot, 5)
        plan = random_rows(random_, tables, start)
        plan.sort(key=lambda row: row.token_ids is not None)
        rows.read(plan)
        gap = random_.randint(0, 2)
        shape = StepShape(
            rows.num_tokens + gap,
            len(plan) + gap,
            len(plan) + gap,
            rows.num_decodes + gap,
            4,
            num_entries=rows.num_entries,
        )
        found = written(rows, shape)
        for index, row in enumerate(plan):
            at = index if index < rows.num_decodes else index + gap
            end = rows.end(index) + (at - index)
            stop = row.start + row.num_tokens
            table = row.block_tables[0][: -(-stop // BLOCK)]
            assert found["context_len"][at] == stop
            assert found["table_slots"][at] == row.slot
            first, place = (int(found[name][at]) for name in ("table_firsts", "table_starts"))
            assert first <= row.start // BLOCK, "blocks that the row writes to"
            kept[row.slot].update(enumerate(found["entries"][place : place + len(table) - first], first))
            assert [kept[row.slot][column] for column in range(len(table))] == table
            tokens = slice(end - row.num_tokens, end)
            assert found["positions"][tokens].tolist() == list(range(row.start, stop))
            assert found["slots"][tokens].tolist() == [
                table[position // BLOCK] * BLOCK + position % BLOCK for position in range(row.start, stop)
            ]
            assert found["ids"][tokens].tolist() == list(row.token_ids or [0])
            assert found["rows"][at] == end - 1
            assert found["row_slots"][at] == (row.slot if row.samples else -1)


@pytest.mark.parametrize(
    ("is_batch_invariant", "num_decodes"), [(False, 1), (True, 0)], ids=("varying", "invariant")
)
def test_a_prompt_s_last_token_alone_decodes_unless_its_bits_must_not_vary(
    is_batch_invariant: bool, num_decodes: int
) -> None:
    rows = DeviceRows(StepRow, LIMITS, is_batch_invariant)
    rows.start(3, 9)
    rows.read([StepRow(3, [5], 8, [[1, 2, 3]], samples=True)])
    assert rows.num_decodes == num_decodes
    rows.read([StepRow(3, [5], 9, [[1, 2, 3]], samples=True)])
    assert rows.num_decodes == 1, "a sampled token"


def test_a_row_with_a_stop_is_known_and_read_as_if_it_began_at_its_start(rows: DeviceRows) -> None:
    rows.read([StepRow(0, None, 4, [[1, 2, 3]], samples=True, stop=9, num_drafts=2)])
    assert (rows.has_stops, rows.num_tokens, rows.num_entries) == (True, 1, 2)
    rows.read([StepRow(0, None, 4, [[1, 2]], samples=True)])
    assert not rows.has_stops


def test_what_rows_ask_for_is_known(rows: DeviceRows) -> None:
    def asked(row: StepRow) -> tuple[bool, bool, bool, list[int]]:
        rows.read([row])
        return rows.has_vectors, rows.is_scored, rows.has_adapters, rows.sampling

    assert asked(StepRow(0, [1], 0, [[1]], samples=True)) == (False, False, False, [0])
    assert asked(StepRow(0, [1], 0, [[1]], samples=True, pooling=Pooling(PoolingKind.LAST))) == (
        True,
        False,
        False,
        [],
    )
    assert asked(StepRow(0, [1], 0, [[1]], samples=True, prompt_logprobs=0)) == (False, True, False, [0])
    assert asked(StepRow(0, [1], 0, [[1]], samples=False, adapter=object())) == (False, False, True, [])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(StepRow(0, [100], 0, [[1]], samples=True), id="token-too-large"),
        pytest.param(StepRow(0, [-1], 0, [[1]], samples=True), id="token-negative"),
        pytest.param(StepRow(0, [1 << 70], 0, [[1]], samples=True), id="token-huge"),
        pytest.param(StepRow(0, [], 0, [[1]], samples=True), id="no-token"),
        pytest.param(StepRow(0, [1], -1, [[1]], samples=True), id="start-negative"),
        pytest.param(StepRow(0, [1], 40, [[1] * 11], samples=True), id="past-the-context"),
        pytest.param(StepRow(0, [1], 4, [[1]], samples=True), id="table-too-short"),
        pytest.param(StepRow(0, [1], 0, [[50]], samples=True), id="block-too-large"),
        pytest.param(StepRow(0, None, 4, [[1, -1]], samples=True), id="block-negative"),
        pytest.param(StepRow(0, None, 4, [[1, 1 << 70]], samples=True), id="block-huge"),
        pytest.param(StepRow(0, None, 4, [[1, 2], [1, 2]], samples=True), id="two-tables"),
        pytest.param(StepRow(8, [1], 0, [[1]], samples=True), id="slot-too-large"),
        pytest.param(StepRow(-1, [1], 0, [[1]], samples=True), id="slot-negative"),
        pytest.param(StepRow(0, [1] * 61, 0, [[1] * 16], samples=True), id="too-many-tokens"),
        pytest.param(StepRow(0, [1], 0, [[1]], samples=True, states=StateMoves()), id="states"),
    ],
)
def test_rows_out_of_bounds_are_refused_and_leave_no_trace(rows: DeviceRows, row: StepRow) -> None:
    good = StepRow(0, None, 7, [[11, 12]], samples=True)
    rows.read([good])
    before = lists(written(rows, StepShape(1, 1, 1, 1, 0, num_entries=2)))
    with pytest.raises(PlanError):
        rows.read([row])
    rows.forget()
    rows.read([good])
    assert lists(written(rows, StepShape(1, 1, 1, 1, 0, num_entries=2))) == before


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(StepRow("0", [1], 0, [[1]], samples=True), id="slot"),  # type: ignore[arg-type]
        pytest.param(StepRow(0, [1.0], 0, [[1]], samples=True), id="token"),  # type: ignore[list-item]
        pytest.param(StepRow(0, 1, 0, [[1]], samples=True), id="tokens"),  # type: ignore[arg-type]
        pytest.param(StepRow(0, [1], 0, [None], samples=True), id="blocks"),  # type: ignore[list-item]
        pytest.param("a row", id="row"),
    ],
)
def test_what_is_no_integer_or_row_is_a_type_error(rows: DeviceRows, row: Any) -> None:
    with pytest.raises(TypeError):
        rows.read([row])


def test_rows_come_in_order_and_one_per_slot(rows: DeviceRows) -> None:
    chunk, decode = StepRow(1, [1, 2], 0, [[1]], samples=True), StepRow(2, None, 1, [[2]], samples=True)
    with pytest.raises(PlanError, match="one slot"):
        rows.read([chunk, chunk])
    with pytest.raises(PlanError, match="comes after a chunk"):
        rows.read([chunk, decode])


def test_any_sequence_serves_as_ids_and_blocks(rows: DeviceRows) -> None:
    rows.read((StepRow(0, range(5, 8), 3, (range(3, 9),), samples=True),))
    found = lists(written(rows, StepShape(3, 1, 1, 0, 3, num_entries=2)))
    assert (found["ids"], found["entries"]) == ([5, 6, 7], [3, 4])


def entries(rows: DeviceRows, row: StepRow) -> tuple[int, list[int]]:
    """Return the first column that a step of one row brings, and what it brings."""
    rows.read([row])
    shape = plain_layout(rows, [0]).shape
    found = lists(written(rows, shape, [0]))
    assert found["table_starts"] == [0]
    return found["table_firsts"][0], found["entries"]


def test_of_a_table_only_the_blocks_that_a_row_writes_to_go_up(rows: DeviceRows) -> None:
    table = [11, 12, 13]
    rows.start(2, 9)
    assert entries(rows, StepRow(2, [1, 2], 8, [table], samples=True)) == (0, [11, 12, 13])
    assert entries(rows, StepRow(2, None, 10, [table], samples=True)) == (2, [13])
    table.append(14)
    assert entries(rows, StepRow(2, None, 11, [table], samples=True)) == (2, [13]), (
        "none that it does not need"
    )
    assert entries(rows, StepRow(2, None, 12, [table], samples=True)) == (3, [14])
    assert entries(rows, StepRow(2, [1] * 6, 7, [table], samples=True)) == (1, [12, 13, 14]), "computed again"
    table += [15, 16, 17]
    assert entries(rows, StepRow(2, None, 24, [table], samples=True)) == (4, [15, 16, 17]), "a gap"
    assert entries(rows, StepRow(2, None, 25, [list(table)], samples=True))[0] == 0, "another sequence's"
    rows.start(2, 9)
    assert entries(rows, StepRow(2, None, 26, [table], samples=True))[0] == 0, "again, as after a failed step"


def test_what_a_failed_step_had_written_goes_up_again(rows: DeviceRows) -> None:
    row = StepRow(3, [1], 6, [[21, 22]], samples=True)
    assert entries(rows, row) == (0, [21, 22])
    assert entries(rows, row) == (1, [22])
    rows.forget()
    assert entries(rows, row) == (0, [21, 22])


def test_a_step_that_was_not_written_brought_nothing(rows: DeviceRows) -> None:
    row = StepRow(2, None, 8, [[11, 12, 13]], samples=True)
    rows.start(2, 9)
    rows.read([row])
    assert entries(rows, row) == (0, [11, 12, 13])


@pytest.mark.parametrize(
    "shape",
    [
        StepShape(3, 2, 2, 1, 2, num_entries=2),
        StepShape(4, 2, 2, 2, 2, num_entries=2),
        StepShape(4, 2, 2, 1, 2, num_entries=1),
        StepShape(4, 2, 1, 1, 2, num_entries=2),
    ],
)
def test_nothing_is_written_past_the_end(rows: DeviceRows, shape: StepShape) -> None:
    rows.read([StepRow(1, None, 3, [[5]], samples=True), StepRow(0, [1, 2, 3], 0, [[6]], samples=False)])
    with pytest.raises(ValueError, match="do not fit"):
        written(rows, shape)
    enough = StepShape(4, 2, 2, 1, 3, num_entries=2)
    written(rows, enough)
    with pytest.raises(ValueError, match="bytes, the memory"):
        rows.write(
            np.zeros(enough.num_bytes - 1, np.uint8), enough.sections.firsts, enough.sizes, None, [], []
        )
    with pytest.raises(ValueError, match="an entry per row"):
        written(rows, enough, adapters=[1])
    with pytest.raises(IndexError):
        written(rows, enough, needing=[2])


def test_the_class_of_rows_must_have_slots() -> None:
    class Loose:
        slot = 0

    with pytest.raises(ValueError, match="must be a slot"):
        DeviceRows(Loose, LIMITS, is_batch_invariant=False)


@pytest.mark.parametrize(
    ("place", "first"),
    [(0, -8), (1, 8), (2, 1 << 40), (4, 0), (12, 204), (13, 8)],
    ids=["before", "overlapping", "past-the-end", "out-of-order", "unaligned", "the-last"],
)
def test_inputs_lie_one_behind_the_other(rows: DeviceRows, place: int, first: int) -> None:
    rows.read([StepRow(1, None, 3, [[5]], samples=True), StepRow(0, [1, 2, 3], 0, [[6]], samples=False)])
    shape = StepShape(4, 2, 2, 1, 3, num_entries=2)
    firsts, memory = shape.sections.firsts.copy(), np.zeros(shape.num_bytes, np.uint8)
    firsts[place] = first
    with pytest.raises(ValueError, match=rf"`firsts`\[{place}\] must be a multiple of 8 in"):
        rows.write(memory, firsts, shape.sizes, None, [], [])
    assert not memory.any()


def test_a_step_has_no_size_beyond_all_memory(rows: DeviceRows) -> None:
    rows.read([StepRow(1, None, 3, [[5]], samples=True)])
    memory, firsts = np.zeros(1024, np.uint8), StepShape(1, 1, 1, 1, 1, num_entries=1).sections.firsts
    with pytest.raises(ValueError, match="a step's sizes must be in"):
        rows.write(memory, firsts, (1, 1, 1, 1, 1 << 31), [0], [], [])
    with pytest.raises(ValueError, match="bytes, the memory 1024"):
        rows.write(memory, firsts, (1, 1, 1, 1, (1 << 31) - 2), [0], [], [])
