"""Compile the small C++ programs of tests; what is compiled is kept, by a hash of its preprocessed sources.

program = compiled("team_size", "tests/csrc/team_size.cpp", "csrc/cpu/team_size.cpp", flags=["-O1"])
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.emulation import library

_ROOT = Path(__file__).parents[2]
_KEPT = _ROOT / "build" / "programs"
_MAX_KEPT_BYTES = 256 << 20  # ten times what a run of all tests needs
_TIMEOUT_S = 120


class CompileError(Exception):
    """The compiler failed; the message is what it printed."""


def compiled(name: str, *sources: str, flags: Sequence[str] = ()) -> Path:
    """Return a program, or with `-shared` a library, of sources that are named as seen from the root.

    Without a compiler, the test is skipped.

    Raises:
        CompileError: if the sources do not compile.
    """
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    command = [compiler, "-std=c++20", "-Icsrc", *flags]
    version = _output([compiler, "--version"])
    program = _KEPT / f"{name}.{library.digest(_output([*command, '-E', *sources]), flags, version)}"
    if not library.is_kept(program):
        _KEPT.mkdir(parents=True, exist_ok=True)
        partial = library.partial_of(program)
        _output([*command, *sources, "-o", str(partial)])
        partial.replace(program)
        library.discard_old(_KEPT, _MAX_KEPT_BYTES)
    return program


def _output(command: list[str]) -> str:
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout
