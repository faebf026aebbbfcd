from __future__ import annotations

import pytest

from tgi_asgi.engine.admission import Admission
from tgi_asgi.errors import InvalidRequest, Overloaded, TgiError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_choices_are_counted_not_requests() -> None:
    admission = Admission(4, Clock())
    permit = admission.acquire(3)
    with pytest.raises(Overloaded):
        admission.acquire(2)
    admission.acquire(1)
    permit.release()
    assert admission.num_taken == 1


def test_releasing_twice_gives_back_once() -> None:
    admission = Admission(2, Clock())
    permit = admission.acquire(2)
    permit.release()
    permit.release()
    assert admission.num_taken == 0


def test_a_permit_that_is_split_is_given_back_in_parts() -> None:
    admission = Admission(4, Clock())
    permit = admission.acquire(4, "tenant")
    part = permit.split(1)
    assert (part.n, part.tenant, permit.n, admission.num_taken) == (1, "tenant", 3, 4)
    rest = permit.split(3)
    permit.release()
    assert admission.num_taken == 4
    rest.release()
    part.release()
    part.release()
    assert admission.num_taken == 0


def test_more_than_there_could_ever_be_is_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match="at most 4"):
        Admission(4, Clock()).acquire(5)


def test_retry_after_follows_the_drain_rate() -> None:
    clock = Clock()
    admission = Admission(10, clock)
    for _ in range(5):
        permit = admission.acquire(1)
        clock.now += 2.0
        permit.release(has_run=True)
    held = [admission.acquire(1) for _ in range(10)]
    with pytest.raises(Overloaded) as caught:
        admission.acquire(4)
    # Five permits returned in the 8 s since the first; four more take 6.4 s.
    assert caught.value.retry_after_s == 7
    for permit in held:
        permit.release(has_run=True)
    held = [admission.acquire(1) for _ in range(10)]
    with pytest.raises(Overloaded) as caught:
        admission.acquire(1)
    assert caught.value.retry_after_s == 1


def test_refusals_after_admission_do_not_make_retry_after_shorter() -> None:
    clock = Clock()
    admission = Admission(10, clock)
    for _ in range(2):
        permit = admission.acquire(1)
        clock.now += 4.0
        permit.release(has_run=True)
        for _ in range(100):
            admission.acquire(1).release()
    # Two ended in 4 s, and two hundred never ran; three more take 6 s.
    assert admission.retry_after_s(3) == 6


def test_nothing_released_for_a_minute_is_a_long_wait() -> None:
    clock = Clock()
    admission = Admission(1, clock)
    admission.acquire(1).release(has_run=True)
    admission.acquire(1)
    clock.now += 61
    with pytest.raises(Overloaded) as caught:
        admission.acquire(1)
    assert caught.value.retry_after_s == 60


class Waiting:
    """A request that has not begun to run."""

    def __init__(self, admission: Admission, n: int, tenant: str) -> None:
        self.permit = admission.acquire(n, tenant)
        self.error: TgiError | None = None

    def refuse(self, error: TgiError) -> bool:
        self.error = error
        self.permit.release()
        return True


def displaced(n: int, tenant: str, others: slice = slice(None)) -> list[int]:
    """Return which requests go for n choices of a tenant, where two other tenants fill eight places."""
    admission = Admission(8, Clock())
    waiting = [Waiting(admission, n, "greedy") for n in (1, 2, 1, 1)]
    waiting += [Waiting(admission, 1, "third") for _ in range(3)]
    admission.make_room(n, tenant, lambda: waiting[others])
    gone = [each.error for each in waiting if each.error is not None]
    assert all(isinstance(error, Overloaded) and error.retry_after_s >= 1 for error in gone)
    if gone:
        admission.acquire(n, tenant)
    return [index for index, each in enumerate(waiting) if each.error is not None]


def test_a_tenant_displaces_no_more_than_its_share_and_nobody_for_nothing() -> None:
    greedy, third = slice(4), slice(4, None)
    assert displaced(1, "modest") == displaced(1, "modest", greedy) == [0]
    assert displaced(2, "modest") == [0, 1], "the first leaves one place, and the next has two"
    # Three would leave "greedy" with less than "modest", and displacing one or two would not be enough.
    assert displaced(3, "modest") == []
    assert displaced(1, "greedy", third) == []
    assert displaced(1, "third", greedy) == [0]
    assert displaced(1, "modest", slice(0)) == []
    assert displaced(9, "modest") == [], "no room would be enough for it"


def test_nobody_is_displaced_where_there_is_room() -> None:
    admission = Admission(4, Clock())
    waiting = [Waiting(admission, 1, "greedy") for _ in range(3)]
    admission.make_room(1, "modest", lambda: waiting)
    assert [each.error for each in waiting] == [None] * 3
    admission.acquire(1, "modest")
