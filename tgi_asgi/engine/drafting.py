"""Room for drafts: how many tokens a step may guess, and the blocks that they may be written to.

A decode row with drafts draws from one token up to one more than it has drafts. How many is not known when
the next step is planned, so a sequence has a range: `num_computed` is where its next row begins at the least,
`num_ahead` how much later it may.

    known     a b c d            num_computed 3
    step 1    d, drafts x y      writes 3..5, draws one to three         then num_computed 4, num_ahead 2
    step 2    ?, drafts ? ?      begins at 4, 5 or 6, ends before 9
    result    d: e x'            two drawn: num_computed 5, and step 2 adds no more than 2 to that

Blocks cover the range; what is refused leaves keys and values behind the sequence's end, where its next row
writes before it reads. Called by the scheduler.
"""

from __future__ import annotations

from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.tables import BlockTables
from tgi_asgi.runner.plan import DraftLimits, StepRow


def plan_drafts(
    rows: list[StepRow], sequences: list[Sequence], tables: BlockTables, limits: DraftLimits, room: int
) -> None:
    """Let decode rows have drafts, as far as blocks are free; `room`: tokens that the step can still take.

    A step of so many rows that there are not two for each has none: there a row costs what it brings, and to
    plan drafts would be all that comes of it. Nor are blocks taken that those that run need soon.
    """
    count = min(limits.per_row, min(limits.per_step, room) // len(rows))
    if count < min(limits.per_row, 2):
        return
    for row, sequence in zip(rows, sequences, strict=True):
        first_end = min(row.start + sequence.num_ahead + 1, sequence.last_end)
        end = min(first_end + count, sequence.last_end)
        spare = max(tables.pool.num_free // tables.num_groups - len(rows), 0)
        table = sequence.tables[0]  # that decodes: all are of one length
        end = min(end, (len(table) + spare) * tables.block_size)
        if end <= first_end:
            continue
        while end > len(table) * tables.block_size:
            tables.grow(sequence)
        row.token_ids, row.stop, row.num_drafts = None, end, end - first_end
        sequence.num_ahead += row.num_drafts


def settle_row(row: StepRow, sequence: Sequence, num_drawn: int) -> None:
    """Learn how many tokens a row with a `stop` has drawn."""
    sequence.num_ahead -= row.num_drafts
    sequence.num_computed += num_drawn - 1
