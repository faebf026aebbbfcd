"""The thread that reads a page of weights touches it first, so that NUMA systems place the page near it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.first_touch import CASES
from tests.support.cpp_program import compiled

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux",
    reason="pages are watched as x86 Linux has them",
)


@pytest.fixture(scope="module")
def watch() -> Path:
    """Build the library that records first touches."""
    return compiled("page_watch", "tests/csrc/page_watch.cpp", flags=["-O1", "-shared", "-fPIC"])


def test_the_member_that_reads_a_page_has_written_it_first(watch: Path) -> None:
    cases = [(2, case) for case in CASES] + [(3, next(iter(CASES)))]
    preloaded = f"{os.environ.get('LD_PRELOAD', '')} {watch}".strip()
    arguments = [f"{threads}:{case}" for threads, case in cases]
    done = subprocess.run(
        [sys.executable, "-m", "tests.csrc.first_touch", str(watch), *arguments],
        cwd=ROOT, env={**os.environ, "LD_PRELOAD": preloaded}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (threads, case), line in zip(cases, done.stdout.splitlines(), strict=True):
        packed, read = json.loads(line)
        pages = [(writer, reader) for writer, reader in zip(packed, read, strict=True) if reader]
        assert len(pages) > 100, case
        assert len({reader for _, reader in pages}) == threads, case
        moved = sum(writer != reader for writer, reader in pages)
        # A page on a border between threads' parts, or between two matrices, belongs to two.
        assert moved <= threads - 1 + 2, f"{case}: {moved} of {len(pages)} pages"
