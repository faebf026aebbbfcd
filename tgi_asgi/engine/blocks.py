"""The pool of KV-cache blocks: reference counts, the LRU list of free blocks, the index of cached contents.

Called only by the scheduler; knows neither torch nor asyncio, nor the memory layout of a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from tgi_asgi.engine.journal import BlockJournal


class Dependents(Protocol):
    """Data that is useless without certain blocks."""

    def lost(self, digest: bytes) -> None:
        """Handle that these contents can no longer be found."""


class BlockPool:
    """Reference counts of all blocks, and the contents of free ones.

    A block is used (it has references) or free. A free block may still be *registered*: known by the digest
    of its contents, so that `take` can bring it back until `allocate` hands it out for something else. The
    free list is in LRU order: blocks without a digest first, then registered ones, oldest first.

    On a CPU a block uses memory only once it is written. The pool therefore touches new blocks only as far as
    that pays: beyond the first `num_eager`, it takes a new block only if all others are used, or if evicted
    contents have been asked for again (`miss`).

    `num_free + num_used == num_blocks` always.

    Attributes:
        journal: Records which contents become findable and which no longer are, if set.
        dependents: Notified of contents that can no longer be found, if set.
        version: Grows whenever contents become findable or no longer are.
    """

    __slots__ = (
        "_by_digest", "_digests", "_evicted", "_free", "_num_eager", "_references", "dependents", "journal",
        "num_blocks", "num_touched", "num_used", "version",
    )  # fmt: skip

    def __init__(self, num_blocks: int, num_eager: int | None = None) -> None:
        assert num_blocks >= 1
        self.num_blocks = num_blocks
        self.journal: BlockJournal | None = None
        self.dependents: Dependents | None = None
        self.version = 0
        self.num_used = 0
        self.num_touched = 0  # blocks ever handed out; those with higher numbers are free but not listed
        self._num_eager = num_blocks if num_eager is None else min(num_eager, num_blocks)
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()
        # Digests of evicted contents, newest last; at most one per block of the pool.
        self._evicted: OrderedDict[bytes, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_blocks - self.num_touched

    def allocate(self) -> int:
        """Return a new block, or the least recently used free one, whose contents are then evicted.

        Requires `num_free > 0`.
        """
        if self._wants_new():
            block = self.num_touched
            self.num_touched += 1
        else:
            block, _ = self._free.popitem(last=False)
            digest = self._digests[block]
            if digest is not None:
                self._unlist(block, digest)
                if self._num_eager < self.num_blocks:
                    self._record_eviction(digest)
        self._references[block] = 1
        self.num_used += 1
        return block

    def _wants_new(self) -> bool:
        if not self._free:
            return True
        return self.num_touched < self._num_eager and self._digests[next(iter(self._free))] is not None

    def _record_eviction(self, digest: bytes) -> None:
        self._evicted[digest] = None
        if len(self._evicted) > self.num_blocks:
            self._evicted.popitem(last=False)

    def miss(self, digest: bytes) -> bool:
        """Record that `find` did not find wanted contents; return whether they were cached once.

        If so, a larger cache would still have them, so the pool may use one more block from now on.
        """
        if digest not in self._evicted:
            return False
        del self._evicted[digest]
        self._num_eager = min(max(self._num_eager, self.num_touched) + 1, self.num_blocks)
        return True

    def share(self, block: int) -> None:
        """Add a holder to a used block."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] += 1

    def find(self, digest: bytes) -> int | None:
        """Return the block that holds these contents, used or free."""
        return self._by_digest.get(digest)

    def find_each(self, digests: Sequence[bytes]) -> list[int | None]:
        """Return what `find` does for each of these; 8,000 calls would take most of a step's planning."""
        find = self._by_digest.get
        return [find(digest) for digest in digests]

    def find_leading(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks that hold these contents, up to the first contents that are not found."""
        found = self.find_each(digests)
        if None in found:
            del found[found.index(None) :]
        return found  # type: ignore[return-value]  # None has just been removed

    @property
    def num_known(self) -> int:
        """Number of contents that can be found."""
        return len(self._by_digest)

    @property
    def known(self) -> Iterable[bytes]:
        """The digests of all contents that can be found."""
        return self._by_digest.keys()

    def count_free(self, blocks: Iterable[int]) -> int:
        """Return how many of these blocks are free."""
        references = self._references
        return [references[block] for block in blocks].count(0)

    def num_holders(self, block: int) -> int:
        return self._references[block]

    def take(self, block: int) -> None:
        """Add a holder to a block that `find` returned, reviving it if it is free."""
        if self._references[block] == 0:
            del self._free[block]
            self.num_used += 1
        self._references[block] += 1

    def register(self, block: int, digest: bytes) -> None:
        """Make a used block findable by its contents; a digest that is already known keeps its block."""
        assert self._references[block] > 0, f"block {block} is free"
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest
            self.version += 1
            self._evicted.pop(digest, None)
            if self.journal is not None:
                self.journal.found(digest)

    def forget(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable because their contents cannot be trusted."""
        for block in blocks:
            digest = self._digests[block]
            if digest is not None:
                self._unlist(block, digest)

    def _unlist(self, block: int, digest: bytes) -> None:
        del self._by_digest[digest]
        self._digests[block] = None
        self.version += 1
        if self.journal is not None:
            self.journal.lost(digest)
        if self.dependents is not None:
            self.dependents.lost(digest)

    def reset(self) -> int:
        """Make all blocks unfindable, used and free; return how many could be found."""
        num_known = len(self._by_digest)
        self.forget(list(self._by_digest.values()))
        self._evicted.clear()
        return num_known

    def release(self, blocks: list[int]) -> None:
        """Drop one reference to each block of a table.

        Goes from the last block to the first, so that a chain of cached blocks is evicted from its end and
        the rest of it can still be found.
        """
        for block in reversed(blocks):
            count = self._references[block] - 1
            assert count >= 0, f"block {block} is freed twice"
            self._references[block] = count
            if count == 0:
                self.num_used -= 1
                self._free[block] = None
                if self._digests[block] is None:
                    self._free.move_to_end(block, last=False)
