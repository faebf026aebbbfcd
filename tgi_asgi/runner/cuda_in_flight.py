"""The steps between a CUDA runner's two threads: launched by one, awaited and delivered by the other."""

from __future__ import annotations

import queue
import threading
from typing import Generic, TypeVar

_Step = TypeVar("_Step")


class InFlight(Generic[_Step]):
    """A queue of launched steps, each of which counts as in flight until it is `done`.

    in_flight.put(step)                              # the launcher's thread
    in_flight.wait_until_idle()
    while (step := in_flight.take()) is not None:    # the waiter's thread
        in_flight.done()
    """

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._num_open = 0
        self._changed = threading.Condition()

    @property
    def is_idle(self) -> bool:
        """Whether all steps are done."""
        with self._changed:
            return self._num_open == 0

    def put(self, step: _Step) -> None:
        """Add a step."""
        with self._changed:
            self._num_open += 1
        self._steps.put(step)

    def close(self) -> None:
        """Make `take` return None after the steps added so far."""
        self._steps.put(None)

    def take(self) -> _Step | None:
        """Wait for the next step; None once closed."""
        return self._steps.get()

    def done(self) -> None:
        """Record that the oldest step has ended and what it has sampled is known."""
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Wait until all steps are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_open == 0)
