"""Which LoRA adapters the running sequences use, and which sequences wait for a free place in that set.

Called only by the scheduler; knows neither torch nor asyncio.
"""

from __future__ import annotations

from collections.abc import Iterable

from tgi_asgi.engine.sequence import Sequence


class RunningAdapters:
    """The adapters of the running sequences: at most a fixed number of different ones at a time.

    A sequence whose adapter would exceed the limit is parked until one of the running adapters has no
    sequence left. Until then, all further sequences with an adapter are parked as well, even if their adapter
    is running: adapters in constant use would otherwise keep it waiting forever. Sequences without an adapter
    are never parked.
    """

    __slots__ = ("_counts", "_max_adapters", "_parked")

    def __init__(self, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        self._counts: dict[str, int] = {}  # by adapter key: number of running sequences; in order of entry
        self._parked: list[Sequence] = []

    @property
    def num_running(self) -> int:
        """Number of different adapters of the running sequences."""
        return len(self._counts)

    def may_run(self, sequence: Sequence) -> bool:
        """Return whether a sequence may start."""
        key = _key(sequence)
        if key is None:
            return True
        return not self._parked and (key in self._counts or len(self._counts) < self._max_adapters)

    def park(self, sequence: Sequence) -> None:
        """Set a sequence aside that may not run yet; `leave` or `remove` returns it."""
        self._parked.append(sequence)

    def enter(self, sequence: Sequence) -> None:
        """Count a sequence that starts."""
        key = _key(sequence)
        if key is not None:
            self._counts[key] = self._counts.get(key, 0) + 1

    def leave(self, sequence: Sequence) -> list[Sequence]:
        """Stop counting a running sequence; return the parked sequences that go back to the waiting queue."""
        key = _key(sequence)
        if key is None:
            return []
        self._counts[key] -= 1
        if self._counts[key]:
            return []
        del self._counts[key]
        return self._release()

    def remove(self, sequence: Sequence) -> list[Sequence]:
        """Drop a sequence that no longer waits; if it was parked, return the other parked ones."""
        if sequence not in self._parked:
            return []
        self._parked.remove(sequence)
        return self._release()

    def _release(self) -> list[Sequence]:
        parked, self._parked = self._parked, []
        return parked

    def grouped(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Return sequences in the order of a step: those without an adapter, then adapter by adapter."""
        ranks: dict[str | None, int] = {None: -1}
        ranks.update((key, rank) for rank, key in enumerate(self._counts))
        return sorted(running, key=lambda sequence: ranks[_key(sequence)])


def _key(sequence: Sequence) -> str | None:
    adapter = sequence.request.adapter
    return None if adapter is None else adapter.key
