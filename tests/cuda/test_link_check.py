"""The symbol lookup of `make cuda-link`, on two small libraries."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda.link_check import pinned_version, unresolved


def _compile(target: Path, text: str, *flags: str) -> None:
    source = target.with_suffix(".c")
    source.write_text(text, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(target), *flags], check=True)


@pytest.mark.parametrize("is_given", [True, False])
def test_a_symbol_that_no_needed_library_defines_is_named(tmp_path: Path, is_given: bool) -> None:
    _compile(tmp_path / "libgiver.so", "int given(void) { return 1; }\nint other(void) { return 2; }\n")
    text = "#include <stdio.h>\nint given(void), other(void);\n"
    text += 'int taker(void) { return given() + other() + puts(""); }\n'
    _compile(tmp_path / "libtaker.so", text, f"-L{tmp_path}", "-lgiver")
    if not is_given:  # the library at run time
        _compile(tmp_path / "libgiver.so", "int other(void) { return 2; }\n")
    complaints, found = unresolved(tmp_path / "libtaker.so", [tmp_path])
    assert complaints == ([] if is_given else ["given"])
    assert found["libgiver.so"] == (2 if is_given else 1)
    assert found["libc.so.6"] >= 1  # puts, with its version


def test_a_needed_library_that_is_nowhere_is_named(tmp_path: Path) -> None:
    _compile(tmp_path / "libgiver.so", "int given(void) { return 1; }\n")
    _compile(tmp_path / "libtaker.so", "int given(void); int taker(void) { return given(); }\n",
             f"-L{tmp_path}", "-lgiver")  # fmt: skip
    complaints, _ = unresolved(tmp_path / "libtaker.so", [])
    assert complaints == ["the needed library libgiver.so is nowhere", "given"]


def test_the_wheel_that_is_fetched_is_never_a_cpu_build() -> None:
    assert re.fullmatch(r"[0-9.]+", pinned_version())
