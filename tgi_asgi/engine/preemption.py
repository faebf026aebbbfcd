"""Which running sequence is preempted when blocks do not last for all. Knows neither torch nor asyncio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.tables import BlockTables


def num_missing_blocks(sequence: Sequence, tables: BlockTables) -> int:
    """Return how many blocks a running sequence needs for its next token."""
    if sequence.is_prefilling:
        return tables.num_missing(sequence)
    end = min(sequence.num_computed + sequence.num_ahead + 1, sequence.last_end)
    is_growing = (
        end > len(sequence.tables[0]) * tables.block_size
        and sequence.num_output + sequence.num_pending < sequence.max_tokens
    )
    return tables.num_groups if is_growing else 0


def choose_victim(running: SequenceOf[Sequence], tables: BlockTables) -> Sequence:
    """Return the least urgent sequence of the tenant with the most blocks.

    The most urgent sequence of all is exempt unless it is the only one.

    Args:
        running: The sequences that hold a slot, most urgent first.
    """
    num_held = Counter[str | None]()
    for sequence in running:
        num_held[sequence.tenant] += tables.num_held(sequence)
    others = running[1:] or running
    return max(others, key=lambda sequence: (num_held[sequence.tenant], sequence.urgency))
