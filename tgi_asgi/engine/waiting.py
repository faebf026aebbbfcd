"""Who gets the next free slot: the most urgent sequence of the tenant that has the fewest running.

Called by the scheduler alone; knows neither torch nor asyncio. A tenant is whom a request is counted for (an
API key); without keys there is one, and the order is that of urgency.
"""

from __future__ import annotations

from collections import Counter
from heapq import heapify, heappop, heappush

from tgi_asgi.engine.sequence import Sequence, SequenceState

_Heap = list[tuple[tuple[float, int, int], Sequence]]
_MAX_STALE = 64  # entries that nobody waits for any more


class WaitingQueue:
    """Sequences that wait for a slot. One that stops waiting may stay here as a stale entry for a while.

    Between tenants the count of running sequences decides, so that none of them can starve another whatever
    it sends (max-min fairness). A preempted sequence's client is reading already: it counts as if its tenant
    ran nothing.
    """

    __slots__ = ("_heaps", "_num_entries")

    def __init__(self) -> None:
        self._heaps: dict[str | None, _Heap] = {}
        self._num_entries = 0

    def __len__(self) -> int:
        """Entries, stale ones among them."""
        return self._num_entries

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        heappush(self._heaps.setdefault(sequence.tenant, []), (sequence.urgency, sequence))
        self._num_entries += 1

    def first(self, num_running: Counter[str | None]) -> Sequence | None:
        """Return the sequence whose turn it is."""
        best: Sequence | None = None
        best_key: tuple[int, tuple[float, int, int]] | None = None
        for tenant, heap in list(self._heaps.items()):
            while heap and heap[0][1].state is not SequenceState.WAITING:
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
        """Take out what `first` has returned."""
        self._drop_head(self._heaps[sequence.tenant])

    def compact(self, num_waiting: int) -> None:
        """Throw stale entries away once they are the greater part."""
        if self._num_entries <= 2 * num_waiting + _MAX_STALE:
            return
        for tenant, heap in list(self._heaps.items()):
            live = [entry for entry in heap if entry[1].state is SequenceState.WAITING]
            heapify(live)
            self._heaps[tenant] = live
        self._num_entries = sum(map(len, self._heaps.values()))

    def _drop_head(self, heap: _Heap) -> None:
        heappop(heap)
        self._num_entries -= 1
