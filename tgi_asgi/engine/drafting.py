"""Plan draft tokens: how many a step may guess, and the blocks that they may be written to.

A decode row with drafts samples between one token and one more than its number of drafts. The exact number is
not known when the next step is planned, so a sequence has a range: its next row begins at `num_computed` at
the earliest, and at most `num_ahead` later.

    known     a b c d            num_computed 3
    step 1    d, drafts x y      writes 3..5, samples one to three       then num_computed 4, num_ahead 2
    step 2    ?, drafts ? ?      begins at 4, 5 or 6, ends before 9
    result    d: e x'            two sampled: num_computed 5, and step 2 adds no more than 2 to that

Blocks cover the range. Rejected drafts leave keys and values after the sequence's end; its next row
overwrites them before it reads there. Called by the scheduler.
"""

from __future__ import annotations

from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.tables import BlockTables
from tgi_asgi.runner.plan import DraftLimits, StepRow


def plan_drafts(
    rows: list[StepRow], sequences: list[Sequence], tables: BlockTables, limits: DraftLimits, room: int
) -> None:
    """Give decode rows as many drafts as free blocks allow.

    Nothing is drafted in a step with too many rows (`DraftLimits.for_rows`). Blocks that running sequences
    need soon are not used.

    Args:
        room: Number of tokens that the step can still hold.
    """
    count = limits.for_rows(len(rows), room)
    if count == 0:
        return
    for row, sequence in zip(rows, sequences, strict=True):
        first_end = min(row.start + sequence.num_ahead + 1, sequence.last_end)
        end = min(first_end + count, sequence.last_end)
        spare = max(tables.pool.num_free // tables.num_groups - len(rows), 0)
        table = sequence.tables[0]  # while decoding, all tables have one length
        end = min(end, (len(table) + spare) * tables.block_size)
        if end <= first_end:
            continue
        while end > len(table) * tables.block_size:
            tables.grow(sequence)
        row.token_ids, row.stop, row.num_drafts = None, end, end - first_end
        sequence.num_ahead += row.num_drafts


def settle_row(row: StepRow, sequence: Sequence, num_sampled: int) -> None:
    """Account for the number of tokens that a row with a `stop` has sampled."""
    sequence.num_ahead -= row.num_drafts
    sequence.num_computed += num_sampled - 1
