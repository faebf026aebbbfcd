"""How much of a prompt the prefix cache has: as much as the groups of layers can all go on from.

A group that sees all positions wants every block from the prompt's start, one with a window only those that
it reaches into where the prompt is resumed.

    window 5, blocks of 4 tokens; which blocks are found
    all positions    0 1 2 3 4 5 -
    window           0 - - 3 4 - -     resumed behind 4 (positions 16 on see 12 and later); 3 and 4 are taken

Where a model has recurrent layers, a state must have been kept there, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.states import KeptStates
from tgi_asgi.runner.groups import BlockNeeds


@dataclass(frozen=True, slots=True)
class Hit:
    """What a prompt can begin with.

    Attributes:
        num_blocks: of tokens, from the prompt's start.
        blocks: of each group the last of them, as many as it still reads.
        num_found: blocks that were there, also where there was no state to go on with.
        state: the place of the one that there is.
    """

    num_blocks: int
    blocks: list[list[int]]
    num_found: int = 0
    state: int | None = None

    @classmethod
    def none(cls, num_groups: int) -> Hit:
        """Return the hit of a prompt that nothing is known of."""
        return cls(0, [[] for _ in range(num_groups)])


def group_key(digest: bytes, group: int) -> bytes:
    """Return what a group's block is found by: of the first group the digest of its tokens itself."""
    return digest + group.to_bytes(2, "little") if group else digest


def find_hit(
    pool: BlockPool, needs: BlockNeeds, sequence: Sequence, num_blocks: int, states: KeptStates | None = None
) -> Hit:
    """Return the longest hit of at most `num_blocks`; with `states` it needs one."""
    size, num_groups = needs.block_size, len(needs.windows)
    blocks: list[list[int]] = [[] for _ in range(num_groups)]
    end = num_blocks

    def find(group: int, index: int) -> int | None:
        return pool.find(_key(sequence, group, index))

    for group in range(num_groups):
        if needs.windows[group] is None:
            found = blocks[group]
            while len(found) < end and (block := find(group, len(found))) is not None:
                found.append(block)
            end = len(found)
    num_found = end = _resumable(needs, find, end)
    state: int | None = None
    while states is not None and end > 0:
        state = states.find(sequence.chain.digest(end - 1, sequence.token_ids))
        if state is not None:
            break
        end = _resumable(needs, find, end - 1)
    for group in range(num_groups):
        if needs.windows[group] is None:
            del blocks[group][end:]
        else:
            first = needs.first_read(group, end * size)
            blocks[group] = [
                block for index in range(first, end) if (block := find(group, index)) is not None
            ]
    for group in range(num_groups):  # the pool learns what it should have kept
        first = max(needs.first_read(group, num_blocks * size), end)
        for index in range(first, num_blocks):
            key = _key(sequence, group, index)
            if pool.find(key) is None and not pool.miss(key):
                break
    return Hit(end, blocks, num_found, state)


def _key(sequence: Sequence, group: int, index: int) -> bytes:
    return group_key(sequence.chain.digest(index, sequence.token_ids), group)


def _resumable(needs: BlockNeeds, find: Callable[[int, int], int | None], end: int) -> int:
    """Return how many blocks, up to `end`, can be followed by a token that finds all that windows show it."""
    known = [end] * len(needs.windows)  # from here on, up to `end`, all of a group's are found
    before = -1
    while end != before:
        before = end
        for group, window in enumerate(needs.windows):
            if window is None:
                continue
            low = min(known[group], end)
            while low > needs.first_read(group, end * needs.block_size):
                low -= 1
                if find(group, low) is None:
                    end = low
            known[group] = low
    return end
