"""Which adapters the running sequences have, and who waits until there is room for another one.

Called by the scheduler alone; knows neither torch nor asyncio.
"""

from __future__ import annotations

from collections.abc import Iterable

from tgi_asgi.engine.sequence import Sequence


class RunningAdapters:
    """At most so many different adapters run at a time.

    A sequence whose adapter would be one too many is held until one of them has no sequence left. From then
    on all that come with an adapter are held behind it, also where theirs runs: adapters that are always in
    use would keep it waiting for ever. Sequences without an adapter pass.
    """

    __slots__ = ("_counts", "_held", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: dict[str, int] = {}  # running sequences, by their adapters' keys; in order of entry
        self._held: list[Sequence] = []

    @property
    def num_running(self) -> int:
        """Different adapters of the running sequences."""
        return len(self._counts)

    def may_run(self, sequence: Sequence) -> bool:
        """Tell whether a sequence can start."""
        key = _key(sequence)
        if key is None:
            return True
        return not self._held and (key in self._counts or len(self._counts) < self._most)

    def hold(self, sequence: Sequence) -> None:
        """Let a sequence wait that may not run; `leave` or `give_up` returns it."""
        self._held.append(sequence)

    def enter(self, sequence: Sequence) -> None:
        """Count a sequence that starts."""
        key = _key(sequence)
        if key is not None:
            self._counts[key] = self._counts.get(key, 0) + 1

    def leave(self, sequence: Sequence) -> list[Sequence]:
        """Count a running sequence no more; return those that are to wait with all others again."""
        key = _key(sequence)
        if key is None:
            return []
        self._counts[key] -= 1
        if self._counts[key]:
            return []
        del self._counts[key]
        return self._release()

    def give_up(self, sequence: Sequence) -> list[Sequence]:
        """Forget a sequence that waits no more; if it was held, return those that were held beside it."""
        if sequence not in self._held:
            return []
        self._held.remove(sequence)
        return self._release()

    def _release(self) -> list[Sequence]:
        held, self._held = self._held, []
        return held

    def grouped(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Return sequences in the order of a step: those without an adapter, then adapter by adapter."""
        ranks: dict[str | None, int] = {None: -1}
        ranks.update((key, rank) for rank, key in enumerate(self._counts))
        return sorted(running, key=lambda sequence: ranks[_key(sequence)])


def _key(sequence: Sequence) -> str | None:
    adapter = sequence.request.adapter
    return None if adapter is None else adapter.key
