"""The pool of KV-cache blocks: reference counts, the LRU of what may be reused, the index of cached contents.

Called by the scheduler alone; knows neither torch nor asyncio, nor what a block's memory looks like.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from tgi_asgi.engine.journal import BlockJournal


class Dependents(Protocol):
    """What is of no use without blocks."""

    def lost(self, digest: bytes) -> None:
        """Learn that these contents can no longer be found."""


class BlockPool:
    """Count the references to each block and remember the contents of the freed ones.

    A block is used (it has references) or free. A free block may still be *registered*: known by the digest
    of its contents, so that `take` can bring it back until `allocate` hands it out for something else. The
    free list is the LRU order: blocks without a digest first, then registered ones, oldest first.

    On a CPU a block takes memory from when it is first written. So the pool walks through its blocks only as
    far as that pays: beyond the first `num_eager` a new one is taken where all others are used, or while
    cached contents that were given up have been asked for again (`miss`).

    `num_free + num_used == num_blocks` always.

    Attributes:
        journal: hears which contents can be found from now on, and which no longer, if there is one.
        dependents: hear the latter, if there are any.
    """

    __slots__ = (
        "_by_digest", "_digests", "_free", "_given_up", "_num_eager", "_references", "dependents",
        "journal", "num_blocks", "num_touched", "num_used",
    )  # fmt: skip

    def __init__(self, num_blocks: int, num_eager: int | None = None) -> None:
        assert num_blocks >= 1
        self.num_blocks = num_blocks
        self.journal: BlockJournal | None = None
        self.dependents: Dependents | None = None
        self.num_used = 0
        self.num_touched = 0  # blocks that were ever handed out: those from here on are free and not listed
        self._num_eager = num_blocks if num_eager is None else num_eager
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()
        self._given_up: OrderedDict[bytes, None] = (
            OrderedDict()
        )  # newest last; as many as the pool has blocks

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_blocks - self.num_touched

    def allocate(self) -> int:
        """Take a new block, or the one that is longest unused, which forgets what it held.

        Needs `num_free > 0`.
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
                    self._give_up(digest)
        self._references[block] = 1
        self.num_used += 1
        return block

    def _wants_new(self) -> bool:
        if self.num_touched == self.num_blocks:
            return False
        if not self._free:
            return True
        return self.num_touched < self._num_eager and self._digests[next(iter(self._free))] is not None

    def _give_up(self, digest: bytes) -> None:
        self._given_up[digest] = None
        if len(self._given_up) > self.num_blocks:
            self._given_up.popitem(last=False)

    def miss(self, digest: bytes) -> bool:
        """Learn that contents are wanted that `find` did not find; tell whether they were here once.

        If so a larger cache would have them still: from now on it keeps one block more.
        """
        if digest not in self._given_up:
            return False
        del self._given_up[digest]
        self._num_eager = min(max(self._num_eager, self.num_touched) + 1, self.num_blocks)
        return True

    def share(self, block: int) -> None:
        """Add a holder to a used block."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] += 1

    def find(self, digest: bytes) -> int | None:
        """Return the block that holds these contents, used or free."""
        return self._by_digest.get(digest)

    @property
    def num_known(self) -> int:
        """How many contents can be found."""
        return len(self._by_digest)

    @property
    def known(self) -> Iterable[bytes]:
        """The digests of all contents that can be found."""
        return self._by_digest.keys()

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def num_holders(self, block: int) -> int:
        return self._references[block]

    def take(self, block: int) -> None:
        """Add a holder to a block that `find` returned, reviving it if it is free."""
        if self._references[block] == 0:
            del self._free[block]
            self.num_used += 1
        self._references[block] += 1

    def register(self, block: int, digest: bytes) -> None:
        """Make a used block findable by its contents. A digest that is already known keeps its block."""
        assert self._references[block] > 0, f"block {block} is free"
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest
            self._given_up.pop(digest, None)
            if self.journal is not None:
                self.journal.found(digest)

    def forget(self, blocks: Iterable[int]) -> None:
        """Make blocks unfindable: what they hold is not to be trusted."""
        for block in blocks:
            digest = self._digests[block]
            if digest is not None:
                self._unlist(block, digest)

    def _unlist(self, block: int, digest: bytes) -> None:
        del self._by_digest[digest]
        self._digests[block] = None
        if self.journal is not None:
            self.journal.lost(digest)
        if self.dependents is not None:
            self.dependents.lost(digest)

    def reset(self) -> int:
        """Make all blocks unfindable, used and free; return how many could be found."""
        num_known = len(self._by_digest)
        self.forget(list(self._by_digest.values()))
        self._given_up.clear()
        return num_known

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each block of a table.

        From the last to the first: a chain of cached blocks is then evicted from its end, and what is left of
        it can still be found.
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

    def check(self) -> None:
        """Assert every invariant of the pool; for tests."""
        used = sum(count > 0 for count in self._references)
        assert used == self.num_used
        assert used + self.num_free == self.num_blocks
        assert all(self._references[block] == 0 for block in self._free)
        assert not any(self._references[self.num_touched :])
        assert all(block < self.num_touched for block in self._free)
        assert not self._given_up.keys() & self._by_digest.keys()
        registered = {block: digest for block, digest in enumerate(self._digests) if digest is not None}
        assert registered == {block: digest for digest, block in self._by_digest.items()}
