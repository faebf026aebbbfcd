"""The waiting queue: the next free slot goes to the most urgent sequence of the tenant that runs the fewest.

Called only by the scheduler; knows neither torch nor asyncio. A tenant is the client that a request is
counted against (an API key). Without keys there is one tenant, and only urgency decides.
"""

from __future__ import annotations

from collections import Counter
from heapq import heapify, heappop, heappush

from tgi_asgi.engine.sequence import Sequence, Stage

_Heap = list[tuple[tuple[float, int, int], Sequence]]
_MAX_STALE = 64  # number of stale entries to tolerate


class WaitingQueue:
    """Sequences that wait for a slot. One that stops waiting may stay here as a stale entry for a while.

    Between tenants the number of running sequences decides, so that no tenant can starve another, whatever it
    sends (max-min fairness). A preempted sequence's client is already reading, so that sequence counts as if
    its tenant ran nothing.
    """

    __slots__ = ("_heaps", "_num_entries")

    def __init__(self) -> None:
        self._heaps: dict[str | None, _Heap] = {}
        self._num_entries = 0

    def __len__(self) -> int:
        """Return the number of entries, including stale ones."""
        return self._num_entries

    def push(self, sequence: Sequence) -> None:
        """Add a waiting sequence."""
        heappush(self._heaps.setdefault(sequence.tenant, []), (sequence.urgency, sequence))
        self._num_entries += 1

    def first(self, num_running: Counter[str | None]) -> Sequence | None:
        """Return the sequence whose turn it is, if any."""
        best: Sequence | None = None
        best_key: tuple[int, tuple[float, int, int]] | None = None
        for tenant, heap in list(self._heaps.items()):
            while heap and heap[0][1].stage is not Stage.WAITING:
                self._drop_head(heap)
            if not heap:
                del self._heaps[tenant]
                continue
            urgency, sequence = heap[0]
            key = (0 if sequence.was_preempted else num_running[tenant], urgency)
            if best_key is None or key < best_key:
                best, best_key = sequence, key
        return best

    def pop(self, sequence: Sequence) -> None:
        """Remove the sequence that `first` returned."""
        self._drop_head(self._heaps[sequence.tenant])

    def compact(self, num_waiting: int) -> None:
        """Drop stale entries once they are in the majority."""
        if self._num_entries <= 2 * num_waiting + _MAX_STALE:
            return
        for tenant, heap in list(self._heaps.items()):
            live = [entry for entry in heap if entry[1].stage is Stage.WAITING]
            heapify(live)
            self._heaps[tenant] = live
        self._num_entries = sum(map(len, self._heaps.values()))

    def _drop_head(self, heap: _Heap) -> None:
        heappop(heap)
        self._num_entries -= 1
