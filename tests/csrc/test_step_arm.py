"""The recorded step's kernels for Arm: cross-compiled, and run under an emulator where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = (
    "tests/csrc/step_variants.cpp",
    *(f"csrc/cpu/step/{name}.cpp" for name in ("step", "step_neon", "step_i8mm", "step_portable", "pack")),
    *(f"csrc/cpu/{name}.cpp" for name in ("isa", "team", "platform")),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed")
    out = tmp_path_factory.mktemp("arm") / "step_variants"
    flags = [
        "-O1",
        "-std=c++17",
        "-ffp-contract=off",
        "-Wall",
        "-Wno-psabi",
        "-Werror",
        "-static",
        "-pthread",
    ]
    subprocess.run([COMPILER, *flags, f"-I{ROOT / 'csrc'}", *SOURCES, "-o", str(out)], cwd=ROOT, check=True)
    return out


def test_kernels_for_arm_compile_without_a_warning(program: Path) -> None:
    assert program.stat().st_size > 0


def test_kernels_for_arm_have_the_portable_ones_bits(program: Path) -> None:
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"{EMULATOR} is not installed")
    done = subprocess.run([EMULATOR, "-cpu", "max", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 variants, 0 failures" in done.stdout
