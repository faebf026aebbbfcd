from __future__ import annotations

import pytest

from tgi_asgi.engine.admission import Admission
from tgi_asgi.errors import InvalidRequest, Overloaded


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


def test_a_tenant_displaces_no_more_than_its_share_and_nobody_for_nothing() -> None:
    admission = Admission(8, Clock())
    greedy = [admission.acquire(n, "greedy") for n in (1, 2, 1, 1)]
    third = [admission.acquire(1, "third") for _ in range(3)]
    assert admission.permits_to_displace(1, "modest", greedy) == greedy[:1]
    assert admission.permits_to_displace(2, "modest", greedy) == greedy[:2]
    # Three would leave "greedy" with less than "modest", and displacing one or two would not be enough.
    assert admission.permits_to_displace(3, "modest", [*greedy, *third]) == []
    assert admission.permits_to_displace(1, "greedy", third) == []
    assert admission.permits_to_displace(1, "third", greedy) == greedy[:1]
    assert admission.permits_to_displace(1, "modest", []) == []
    assert not admission.is_full(0)
    assert admission.is_full(1)
    assert not admission.is_full(9), "waiting cannot help a request that exceeds the capacity"
