"""How many members a team leaves out while other programs use its cores, in a simulation without threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.cpp_program import compiled


@pytest.fixture(scope="module")
def simulation() -> Path:
    return compiled("team_size", "tests/csrc/team_size.cpp", "csrc/cpu/team_size.cpp", flags=["-O1"])


def most_frequent(program: Path, members: int, *phases: tuple[int, float]) -> list[tuple[int, float]]:
    """Simulate phases of (busy cores, seconds).

    Returns:
        Per phase, the most frequent size of its last second, and that size's share of the runs.
    """
    arguments = [str(number) for phase in phases for number in phase]
    command: list[str | Path] = [program, str(members), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = []
    for line in printed.splitlines():
        runs = {int(size): int(count) for size, count in (pair.split(":") for pair in line.split())}
        size = max(runs, key=lambda each: runs[each])
        found.append((size, runs[size] / sum(runs.values())))
    return found


@pytest.mark.parametrize("members", [1, 2, 4, 16, 64])
def test_all_members_take_part_while_the_cores_are_free(simulation: Path, members: int) -> None:
    assert most_frequent(simulation, members, (0, 5)) == [(members, 1.0)]


@pytest.mark.parametrize(
    ("members", "busy", "kept"), [(2, 1, 1), (2, 2, 1), (4, 1, 3), (16, 1, 15), (16, 4, 12), (64, 8, 56)]
)
def test_as_many_members_are_left_out_as_cores_are_busy(
    simulation: Path, members: int, busy: int, kept: int
) -> None:
    [(size, share)] = most_frequent(simulation, members, (busy, 10))
    assert size == kept
    assert share > 0.6  # trials of another size are rare


@pytest.mark.parametrize(("members", "busy"), [(2, 1), (2, 2), (16, 4)])
def test_all_members_return_when_the_others_have_gone(simulation: Path, members: int, busy: int) -> None:
    phases = most_frequent(simulation, members, (busy, 30), (0, 6), (busy, 10))
    assert phases[1] == (members, 1.0)
    assert phases[0][0] == phases[2][0] < members
