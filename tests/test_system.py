"""What the system says that the process may use, and memory that goes back to it."""

from __future__ import annotations

import os

import pytest

from tests.support.memory import resident_bytes
from tgi_asgi.system import num_processors, return_freed_memory


def test_processors_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 7})
    assert num_processors() == 3


def test_a_sandbox_that_does_not_answer_allows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int) -> set[int]:
        raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    assert num_processors() == os.cpu_count()


def test_freed_memory_is_returned_although_some_above_it_is_in_use() -> None:
    pieces = [bytearray(2000) for _ in range(50_000)]
    last = pieces[-1]
    del pieces
    before = resident_bytes()
    return_freed_memory()
    assert before - resident_bytes() > 50_000_000
    assert len(last) == 2000
