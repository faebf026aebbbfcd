"""The thread team under the thread sanitizer: a separate stress program without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_team_has_no_data_race(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    program = tmp_path / "team_stress"
    names = ["tests/csrc/team_stress", "csrc/cpu/team", "csrc/cpu/team_size", "csrc/cpu/platform"]
    sources = [f"{name}.cpp" for name in names]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Icsrc", "-o", str(program)]
    built = subprocess.run(
        [compiler, *sources, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    if "tsan" in built.stderr:
        pytest.skip("the compiler has no thread sanitizer library")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("the sanitizer cannot run under this kernel's address layout")
    assert run.returncode == 0, run.stdout + run.stderr
