"""Sampling allocates nothing inside a team's run; a program without Python counts the allocations."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.cpp_program import compiled

CPU = Path(__file__).parents[2] / "csrc" / "cpu"


def test_sampling_and_logprobs_allocate_nothing_whatever_is_asked_of_them() -> None:
    sampler = sorted(str(path) for path in CPU.glob("sample*.cpp"))
    flags = ["-O1", "-Wall", "-Wno-psabi", "-Werror"]
    program = compiled("sample_allocations", "tests/csrc/sample_allocations.cpp", *sampler, flags=flags)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout
