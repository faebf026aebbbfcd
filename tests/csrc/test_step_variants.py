"""Every instruction set's kernels of the recorded step against the portable ones, to the bit.

In a small program, which for Arm is cross-compiled, and run under an emulator where there is one. Compiling
all kernels anew takes a minute, so this is for `make soak`.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
STEP = ROOT / "csrc" / "cpu" / "step"
SOURCES = (
    ROOT / "tests" / "csrc" / "step_variants.cpp",
    *(path for path in sorted(STEP.glob("*.cpp")) if path.stem != "program"),
    *(ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("isa", "team", "platform")),
)
FLAGS = ["-O1", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Werror", "-pthread"]


@pytest.mark.parametrize(
    ("machine", "compiler", "emulator"),
    [("x86_64", "c++", []), ("aarch64", "aarch64-linux-gnu-g++", ["qemu-aarch64", "-cpu", "max"])],
)
def test_variants_compile_without_a_warning_and_have_the_portable_ones_bits(
    machine: str, compiler: str, emulator: list[str], tmp_path: Path
) -> None:
    if platform.machine() == machine:
        compiler, emulator = "c++", []
    elif not emulator:
        pytest.skip(f"this machine is no {machine}")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = tmp_path / "step_variants"
    static = ["-static"] if emulator else []
    subprocess.run(
        [compiler, *FLAGS, *static, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(program)], check=True
    )
    if emulator and shutil.which(emulator[0]) is None:
        pytest.skip(f"it compiles; to run it, {emulator[0]} is not installed")
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert ", 0 failures" in done.stdout
