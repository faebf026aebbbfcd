"""Permits: how many choices run and wait together, and what a client that finds no room is told."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from tgi_asgi.errors import InvalidRequest, Overloaded

_MAX_RETRY_AFTER_S = 60
_MEMORY = 64  # releases that the drain rate is taken from
_WINDOW_S = 60.0  # older ones say nothing of now


class AdmissionPermit:
    """Room for `n` choices, until it is released."""

    __slots__ = ("_admission", "n")

    def __init__(self, admission: Admission, n: int) -> None:
        self._admission: Admission | None = admission
        self.n = n

    def release(self) -> None:
        """Give the room back. Idempotent."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._on_release(self.n)


class Admission:
    """Count permits out of a fixed number, and measure how fast they come back."""

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self.num_taken = 0
        self._clock = clock
        self._releases: deque[tuple[float, int]] = deque(maxlen=_MEMORY)

    def acquire(self, n: int) -> AdmissionPermit:
        """Take room for n choices.

        Raises:
            InvalidRequest: there could never be room for so many.
            Overloaded: there is none now.
        """
        if n > self.capacity:
            raise InvalidRequest(
                f"{n} choices were asked for, but at most {self.capacity} run at a time", param="n"
            )
        missing = self.num_taken + n - self.capacity
        if missing > 0:
            raise Overloaded(retry_after_s=self.retry_after_s(missing))
        self.num_taken += n
        return AdmissionPermit(self, n)

    def retry_after_s(self, missing: int) -> int:
        """Estimate the seconds until `missing` more permits are free, from the last minute's releases."""
        now = self._clock()
        recent = [(at, n) for at, n in self._releases if at > now - _WINDOW_S]
        released = sum(n for _, n in recent)
        if not released:
            return _MAX_RETRY_AFTER_S if self._releases else 1
        seconds = missing * (now - recent[0][0]) / released
        return min(max(math.ceil(seconds), 1), _MAX_RETRY_AFTER_S)

    def _on_release(self, n: int) -> None:
        self.num_taken -= n
        self._releases.append((self._clock(), n))
