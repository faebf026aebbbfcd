"""A build for one machine (TGI_KERNEL_SETS=native): which kernel sets it has, and what it says on another."""

from __future__ import annotations

import ast
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.csrc.test_kernel_sets import arithmetic_of
from tests.support.cpp_program import compiled
from tgi_asgi import _C

ROOT = Path(__file__).parents[2]
ELSEWHERE = "this build lacks the kernels for this processor: install again on this machine"


def of_setup(*names: str) -> list[Any]:
    """Return constants and functions of setup.py, which cannot be imported without building."""
    found: dict[str, Any] = {}
    for statement in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        is_constant = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in names
        if is_constant or (isinstance(statement, ast.FunctionDef) and statement.name in names):
            exec(ast.unparse(statement), found)
    return [found[name] for name in names]


def lines_of(program: Path) -> list[str]:
    done = subprocess.run([program], capture_output=True, check=True, timeout=20, text=True)
    return done.stdout.split("\n")


def test_the_build_asks_for_the_sets_that_a_process_finds() -> None:
    [sources] = of_setup("SUPPORTED_SETS")
    assert lines_of(compiled("supported_sets", *sources))[:-1] == _C.kernel_sets()


@pytest.mark.parametrize(
    ("supported", "kept"),
    [
        ("portable", "portable"),
        ("portable avx2", "avx2"),
        ("portable avx2 avx_vnni", "avx2 avx_vnni"),
        (
            "portable avx2 avx_vnni avx512_vnni",
            "avx2 avx_vnni avx512_vnni",
        ),  # the same bits, any may be faster
        ("portable amx_model avx2 avx512_vnni avx512", "avx512"),
        ("portable amx_model avx2 avx_vnni avx512 avx512_vnni amx", "avx512_vnni amx"),
        ("portable neon", "neon"),
        ("portable neon i8mm", "i8mm"),
    ],
)
def test_a_build_for_this_machine_has_what_may_serve_on_it(supported: str, kept: str) -> None:
    kept_sets, prefix, _ = of_setup("kept_sets", "SET_PREFIX", "ALIKE")
    found = kept_sets(supported.split())
    assert found == kept.split()
    assert all((ROOT / f"{prefix}{name}.cpp").exists() for name in found)


def test_sets_that_setup_takes_for_alike_have_the_same_bits() -> None:
    [alike], arithmetics = of_setup("ALIKE"), {name: arithmetic_of(name) for name in _C.kernel_sets()}
    assert {arithmetics[name] for name in alike if name in arithmetics} <= {"fma"}
    assert [name for name, of in arithmetics.items() if of == "fma" and name not in alike] in (
        ["portable"], ["portable", "neon"],
    )  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine is not x86_64")
@pytest.mark.parametrize(
    ("has", "expected"),
    [
        (("BEST",), ["avx512", "", ""]),
        (("BEST", "PORTABLE"), ["portable", "avx512", "", ""]),
        (("PORTABLE",), ["portable", ELSEWHERE, ""]),
        ((), [ELSEWHERE, ""]),
    ],
)
def test_what_a_build_lacks_is_said(has: tuple[str, ...], expected: list[str]) -> None:
    flags = [f"-DTGI_HAS_{each}" for each in has]
    sources = ("tests/csrc/left_out_sets.cpp", "csrc/cpu/step/kernel_sets.cpp")
    assert lines_of(compiled("left_out_sets", *sources, flags=flags)) == expected
