"""The thread team under the thread sanitizer: a separate stress program without Python."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.cpp_program import CompileError, compiled


@pytest.mark.thorough
def test_the_team_has_no_data_race() -> None:
    names = ["tests/csrc/team_stress", "csrc/cpu/team", "csrc/cpu/team_size", "csrc/cpu/platform"]
    flags = ["-O1", "-g", "-fsanitize=thread", "-pthread"]
    try:
        program = compiled("team_stress", *(f"{name}.cpp" for name in names), flags=flags)
    except CompileError as error:
        if "tsan" not in str(error):
            raise
        pytest.skip("the compiler has no thread sanitizer library")
    run = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("the sanitizer cannot run under this kernel's address layout")
    assert run.returncode == 0, run.stdout + run.stderr
