"""The ordered log of what enters and leaves the prefix cache, for routers that use it.

Written by the block pool; read by a cluster's replica. Pure Python.
"""

from __future__ import annotations

from collections import deque
from itertools import islice


class BlockJournal:
    """The newest changes to the contents that a block pool can find; the pool's n-th change has number n.

        pool.journal = journal = BlockJournal()
        ...
        changes = journal.since(seen)                 # {digest: whether it can be found}; None: too long ago
        seen = journal.end

    Args:
        max_changes: Maximum number of changes to keep, at about 100 bytes each.
    """

    def __init__(self, max_changes: int = 65536) -> None:
        self._changes: deque[tuple[bytes, bool]] = deque(maxlen=max_changes)
        self.end = 0

    def found(self, digest: bytes) -> None:
        """Record that contents can be found from now on."""
        self._changes.append((digest, True))
        self.end += 1

    def lost(self, digest: bytes) -> None:
        """Record that contents can no longer be found."""
        self._changes.append((digest, False))
        self.end += 1

    def since(self, number: int) -> dict[bytes, bool] | None:
        """Return the newest state of each digest changed since; None if some changes were dropped."""
        start = number - (self.end - len(self._changes))
        if start < 0 or number > self.end:
            return None
        return dict(islice(self._changes, start, None))
