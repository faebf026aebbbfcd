"""The recorded step's kernels of every instruction set, bitwise equal to the portable ones.

A small program compares them. It is linked with the objects of the build. In `make soak` and `make nightly`
it is compiled with all kernels, which takes minutes, and for Arm also run, under an emulator if there is one;
the normal run only checks that it compiles for Arm, and that Arm's kernels do.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.cpp_program import compiled
from tests.support.scale import Scale

ROOT = Path(__file__).parents[2]
STEP = ROOT / "csrc" / "cpu" / "step"
SOURCES = (
    ROOT / "tests" / "csrc" / "step_variants.cpp",
    *sorted(STEP.glob("*.cpp")),
    *(
        ROOT / "csrc" / "cpu" / f"{name}.cpp"
        for name in ("team", "team_size", "platform", "memory", "shard_group")
    ),
)
FLAGS = ["-O1", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Werror", "-pthread"]


def compiled_comparison(*flags: str) -> Path:
    """Return the object of the program that compares, without the kernels."""
    return compiled("step_variants.o", str(SOURCES[0].relative_to(ROOT)), flags=[*FLAGS, *flags, "-c"])


@pytest.mark.parametrize(
    ("machine", "compiler", "emulator"),
    [("x86_64", "c++", []), ("aarch64", "aarch64-linux-gnu-g++", ["qemu-aarch64", "-cpu", "max"])],
)
def test_variants_compile_without_a_warning_and_have_the_portable_ones_bits(
    machine: str, compiler: str, emulator: list[str], scale: Scale, tmp_path: Path
) -> None:
    if platform.machine() == machine:
        compiler, emulator = "c++", []
    elif not emulator:
        pytest.skip(f"this machine is not {machine}")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    compile = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}"]
    if not scale.is_full:
        if emulator:
            subprocess.run([*compile, "-fsyntax-only", str(SOURCES[0])], check=True)
        else:
            compiled_comparison()
        return
    program = tmp_path / "step_variants"
    static = ["-static"] if emulator else []
    subprocess.run([*compile, *static, *map(str, SOURCES), "-o", str(program)], check=True)
    if emulator and shutil.which(emulator[0]) is None:
        pytest.skip(f"{emulator[0]} is not installed")
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert ", 0 failures" in done.stdout


def test_the_built_variants_have_the_portable_ones_bits(tmp_path: Path) -> None:
    folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    objects = [each for each in folder.glob("csrc.*.o") if not each.name.startswith("csrc.bindings")]
    if not objects:
        pytest.skip("the extension was not built in this tree")
    program = tmp_path / "step_variants"
    # `make sanitize` has built them with the sanitizers, whose functions they call.
    flags = ["-fsanitize=address,undefined"] if os.environ.get("TGI_SANITIZE") == "1" else []
    linked = [str(compiled_comparison(*flags)), *map(str, objects)]
    subprocess.run(["c++", *FLAGS, *flags, *linked, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert ", 0 failures" in done.stdout


@pytest.mark.parametrize("kernels", ["step_neon", "step_i8mm"])
def test_kernels_of_arm_compile_without_a_warning(kernels: str, tmp_path: Path) -> None:
    compiler = "c++" if platform.machine() == "aarch64" else "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    # Without optimisation: 3 seconds instead of 30. All templates are still compiled.
    flags = [flag for flag in FLAGS if flag != "-O1"]
    output = tmp_path / "kernels.o"
    command = [
        compiler,
        *flags,
        "-O0",
        f"-I{ROOT / 'csrc'}",
        "-c",
        f"{STEP / kernels}.cpp",
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True)
    assert output.stat().st_size > 1 << 16  # not the empty file of another architecture
