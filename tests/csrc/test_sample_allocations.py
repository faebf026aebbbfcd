"""Sampling allocates nothing inside a team's run; a program without Python counts the allocations."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_sampling_and_logprobs_allocate_nothing_whatever_is_asked_of_them(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    program = tmp_path / "sample_allocations"
    sampler = sorted(map(str, (ROOT / "csrc" / "cpu").glob("sample*.cpp")))
    sources = ["tests/csrc/sample_allocations.cpp", *sampler]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-psabi", "-Werror", "-Icsrc", "-o", str(program)]
    subprocess.run([compiler, *sources, *flags], cwd=ROOT, check=True, timeout=120)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout
