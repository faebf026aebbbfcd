"""Admission permits: how many choices run and wait at a time, for whom, and when to retry after a refusal."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Protocol

from tgi_asgi.errors import InvalidRequest, Overloaded, TgiError
from tgi_asgi.types import Permit

_MAX_RETRY_AFTER_S = 60
_MEMORY = 64  # number of releases that the drain rate is estimated from
_WINDOW_S = 60.0  # older releases say nothing about the present


class WaitingRequest(Protocol):
    """A request that holds a permit and has not begun to run."""

    @property
    def permit(self) -> Permit: ...

    def refuse(self, error: TgiError) -> bool:
        """End the request with an error and release its permit."""


class AdmissionPermit:
    """A permit for `n` choices of a tenant, until it is released."""

    __slots__ = ("_admission", "n", "tenant")

    def __init__(self, admission: Admission, n: int, tenant: str | None) -> None:
        self._admission: Admission | None = admission
        self.n = n
        self.tenant = tenant
        admission.on_take()

    def split(self, n: int) -> AdmissionPermit:
        """Return a permit split off for n of the choices; it is released separately."""
        assert self._admission is not None and 0 < n <= self.n
        self.n -= n
        return AdmissionPermit(self._admission, n, self.tenant)

    def release(self, *, has_run: bool = False) -> None:
        """Return the permit, after a request that `has_run` or was refused before it ran. Idempotent."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.on_release(self, has_run)


class Admission:
    """A fixed number of permits, with a measure of how fast they are released.

    Attributes:
        num_taken: The number of choices that have a permit.
        is_idle: Set while nobody holds a permit, not even one without choices.
    """

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self.num_taken = 0
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self._num_permits = 0
        self._clock = clock
        self._taken_by: Counter[str | None] = Counter()
        self._releases: deque[tuple[float, int]] = deque(maxlen=_MEMORY)

    def make_room(self, n: int, tenant: str | None, waiting: Callable[[], Iterable[WaitingRequest]]) -> None:
        """Displace other tenants' requests if n choices of a tenant then fit; they fail with `Overloaded`.

        A request is displaced only if its tenant keeps at least as many choices as this tenant comes to have,
        so that shares only become more equal. None is displaced if that does not free enough.

        Args:
            waiting: Returns the requests that may be displaced, in this order; called only if it matters.
        """
        missing = self.num_taken + n - self.capacity
        if missing <= 0 or n > self.capacity:
            return
        taken = self._taken_by.copy()
        chosen: list[WaitingRequest] = []
        for other in waiting():
            permit = other.permit
            if missing > 0 and taken[permit.tenant] - permit.n >= taken[tenant] + n:
                taken[permit.tenant] -= permit.n
                missing -= permit.n
                chosen.append(other)
        if missing <= 0:
            for other in chosen:
                retry_after_s = self.retry_after_s(other.permit.n)
                other.refuse(Overloaded("Others were served first", retry_after_s=retry_after_s))

    def acquire(self, n: int, tenant: str | None = None) -> AdmissionPermit:
        """Take a permit for n choices.

        Raises:
            InvalidRequest: if n exceeds the capacity.
            Overloaded: if too few permits are free now.
        """
        if n > self.capacity:
            raise InvalidRequest(
                f"{n} choices were asked for, but at most {self.capacity} run at a time", param="n"
            )
        missing = self.num_taken + n - self.capacity
        if missing > 0:
            raise Overloaded(retry_after_s=self.retry_after_s(missing))
        self.num_taken += n
        self._taken_by[tenant] += n
        return AdmissionPermit(self, n, tenant)

    def retry_after_s(self, missing: int) -> int:
        """Estimate the seconds until `missing` more permits are free, from the last minute's releases.

        Releases of requests that never ran do not count: refusals are fast whatever the engine does.
        """
        now = self._clock()
        recent = [(at, n) for at, n in self._releases if at > now - _WINDOW_S]
        released = sum(n for _, n in recent)
        if not released:
            return _MAX_RETRY_AFTER_S if self._releases else 1
        seconds = missing * (now - recent[0][0]) / released
        return min(max(math.ceil(seconds), 1), _MAX_RETRY_AFTER_S)

    def on_take(self) -> None:
        """Count a new permit; called by permits only."""
        self._num_permits += 1
        self.is_idle.clear()

    def on_release(self, permit: AdmissionPermit, has_run: bool) -> None:
        """Take a permit back; called by permits only."""
        self._num_permits -= 1
        if not self._num_permits:
            self.is_idle.set()
        self.num_taken -= permit.n
        self._taken_by[permit.tenant] -= permit.n
        if not self._taken_by[permit.tenant]:
            del self._taken_by[permit.tenant]
        if has_run:
            self._releases.append((self._clock(), permit.n))
