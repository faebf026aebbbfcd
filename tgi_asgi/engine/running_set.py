"""The sequences that run: their slots, and what is counted over them by tenant and by adapter.

Called only by the scheduler; knows neither torch nor asyncio.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from operator import attrgetter

from tgi_asgi.engine.running_adapters import RunningAdapters
from tgi_asgi.engine.sequence import Sequence, Stage

_urgency = attrgetter("urgency")


class RunningSet:
    """The running sequences in order of urgency, each in a slot of its own.

    Attributes:
        sequences: The running sequences, most urgent first; read-only.
        num_of_tenant: Number of running sequences of each tenant; read-only.
        free_slots: The lowest is last.
        adapters: The adapters of the running sequences, and the sequences that wait for one.
    """

    __slots__ = ("adapters", "free_slots", "num_of_tenant", "sequences")

    def __init__(self, max_batch_size: int, max_adapters: int) -> None:
        self.sequences: list[Sequence] = []
        self.num_of_tenant: Counter[str | None] = Counter()
        self.free_slots = list(reversed(range(max_batch_size)))
        self.adapters = RunningAdapters(max_adapters)

    def __len__(self) -> int:
        return len(self.sequences)

    def enter(self, sequence: Sequence) -> None:
        """Let a waiting sequence run, in a free slot."""
        sequence.stage = Stage.RUNNING
        sequence.slot = self.free_slots.pop()
        insort(self.sequences, sequence, key=_urgency)
        self.num_of_tenant[sequence.tenant] += 1
        self.adapters.enter(sequence)

    def leave(self, sequence: Sequence) -> list[Sequence]:
        """Free a running sequence's slot; return the parked sequences that go back to the waiting queue.

        The caller resets the sequence to another stage.
        """
        self.sequences.remove(sequence)
        self.free_slots.append(sequence.slot)
        self.num_of_tenant[sequence.tenant] -= 1
        return self.adapters.leave(sequence)

    def in_row_order(self) -> list[Sequence]:
        """Return the sequences in the order of their rows in a step: grouped by adapter, if there are any."""
        return self.adapters.grouped(self.sequences) if self.adapters.num_running else self.sequences
