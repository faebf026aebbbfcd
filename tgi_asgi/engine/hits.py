"""How much of a prompt the prefix cache holds: the longest prefix from which all groups of layers can resume.

A group that sees all positions needs every block from the prompt's start. A group with a window needs only
the blocks that the window covers where the prompt resumes.

    window 5, blocks of 4 tokens; which blocks are found
    all positions    0 1 2 3 4 5 -
    window           0 - - 3 4 - -     resumes after 4 (positions from 16 on see 12 and later) with 3 and 4

A model with recurrent layers also needs a state that was kept there.
"""

from __future__ import annotations

from collections.abc import Callable

from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.sequence import Hit, Sequence
from tgi_asgi.engine.states import KeptStates
from tgi_asgi.runner.groups import BlockNeeds

Find = Callable[[int, int], int | None]  # from a group and the index of a block to the block, if it is cached

_BLOCKS_AT_ONCE = 64  # looked up together; at most this many are hashed before they are filled (60 us)


def cache_version(pool: BlockPool, states: KeptStates | None) -> int:
    """Return a number that changes whenever a prompt may have another hit than before."""
    return pool.version + (0 if states is None else states.pool.version)


def group_key(digest: bytes, group: int) -> bytes:
    """Return the key of a group's block; for the first group, this is the digest of the tokens itself."""
    return digest + group.to_bytes(2, "little") if group else digest


def find_hit(
    pool: BlockPool,
    needs: BlockNeeds,
    sequence: Sequence,
    num_blocks: int,
    states: KeptStates | None = None,
) -> Hit:
    """Return the longest hit of at most `num_blocks` blocks; with `states`, it must end at a kept state."""
    num_groups = len(needs.windows)
    blocks: list[list[int]] = [[] for _ in range(num_groups)]
    end = num_blocks

    def find(group: int, index: int) -> int | None:
        return pool.find(_key(sequence, group, index))

    for group in range(num_groups):
        if needs.windows[group] is None:
            blocks[group] = _found_from_start(pool, sequence, group, end)
            end = len(blocks[group])
    num_found = end = _resumable(needs, find, end)
    state: int | None = None
    if states is not None:
        end, state = _last_state(states, needs, sequence, find, end)
    for group in range(num_groups):
        if needs.windows[group] is None:
            del blocks[group][end:]
        else:
            first = needs.first_read(group, end * needs.block_size)
            blocks[group] = [
                block for index in range(first, end) if (block := find(group, index)) is not None
            ]
    return Hit(end, blocks, num_found, state, cache_version(pool, states))


def note_misses(pool: BlockPool, needs: BlockNeeds, sequence: Sequence, num_blocks: int, hit: Hit) -> None:
    """Tell the pool which evicted contents would have made this a hit of `num_blocks` blocks."""
    for group, window in enumerate(needs.windows):
        start = hit.num_found if window is None else hit.num_blocks  # what is before it was found
        first = max(needs.first_read(group, num_blocks * needs.block_size), start)
        for index in range(first, num_blocks):
            key = _key(sequence, group, index)
            if pool.find(key) is None and not pool.miss(key):
                break


def _found_from_start(pool: BlockPool, sequence: Sequence, group: int, end: int) -> list[int]:
    """Return the group's blocks that are found from the prompt's start on, up to block `end`."""
    blocks: list[int] = []
    while len(blocks) < end:
        stop = min(len(blocks) + _BLOCKS_AT_ONCE, end)
        digests = sequence.chain.digests(len(blocks), stop, sequence.token_ids)
        blocks += pool.find_leading([group_key(digest, group) for digest in digests] if group else digests)
        if len(blocks) < stop:
            break
    return blocks


def _key(sequence: Sequence, group: int, index: int) -> bytes:
    return group_key(sequence.chain.digest(index, sequence.token_ids), group)


def _last_state(
    states: KeptStates, needs: BlockNeeds, sequence: Sequence, find: Find, end: int
) -> tuple[int, int | None]:
    """Return the most blocks, up to `end`, that are found and followed by a kept state, and its place."""
    places = states.find_each(sequence.chain.digests(0, end, sequence.token_ids))
    while end:
        while end and places[end - 1] is None:
            end -= 1
        found = _resumable(needs, find, end)
        if found == end:
            return end, places[end - 1] if end else None
        end = found
    return 0, None


def _resumable(needs: BlockNeeds, find: Find, end: int) -> int:
    """Return the most blocks, up to `end`, after which the next token finds all blocks that it reads."""
    known = [end] * len(needs.windows)  # all of a group's blocks in [known, end) are found
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
