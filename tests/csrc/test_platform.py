"""What the team detects about the machine: cgroup quotas (v1 and v2) and the requested instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cpp_program import compiled
from tgi_asgi import _C

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quota_program() -> Path:
    """Build a program that runs platform.cpp on a hierarchy from the test."""
    return compiled("quota", "tests/csrc/quota.cpp", "csrc/cpu/platform.cpp")


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000", "a/cpu.max": "300000 100000"}, 1),
        ("0::/a\n", {"a/cpu.max": "20000 100000"}, 1),
        ("0::/elsewhere\n", {"cpu.max": "400000 100000"}, 4),
        (
            "3:cpu,cpuacct:/box\n1:memory:/other\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "350000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("3:cpu:/box\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpu:/box\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("garbage\n", {"cpu.max": "garbage"}, 8),
    ],
)
def test_the_tightest_quota_decides(
    quota_program: Path, tmp_path: Path, membership: str, files: dict[str, str], cores: int
) -> None:
    (tmp_path / "self").write_text(membership)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    arguments = [quota_program, tmp_path / "root", tmp_path / "self"]
    assert int(subprocess.run(arguments, capture_output=True, check=True, timeout=20).stdout) == cores


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        ({}, [0, 1]),
        ({0: "0", 1: "1"}, [0, 1]),
        ({0: "0-1", 1: "0-1"}, [0]),
        ({0: "0,4", 1: "1,5"}, [0, 1]),
        ({1: "garbage"}, [0, 1]),
    ],
)
def test_a_core_counts_once_whatever_its_hardware_threads(
    quota_program: Path, tmp_path: Path, siblings: dict[int, str], expected: list[int]
) -> None:
    mine = sorted(os.sched_getaffinity(0))
    if mine[:2] != [0, 1]:
        pytest.skip("the process may not use the first two processors")
    for thread, text in siblings.items():
        folder = tmp_path / f"cpu{thread}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    done = subprocess.run([quota_program, tmp_path], capture_output=True, check=True, timeout=20)
    assert [int(core) for core in done.stdout.split()] == expected + mine[2:]


def imported_with(isa: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from tgi_asgi import _C; print(_C.kernel_set())"]
    environ = {**os.environ, "TGI_ISA": isa}
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_instruction_set_wished_for_is_used() -> None:
    assert imported_with("portable").stdout.strip() == "portable"
    assert imported_with("").stdout.strip() in _C.kernel_sets()


def test_a_wish_that_cannot_be_met_is_refused() -> None:
    refused = imported_with("sse9")
    assert refused.returncode != 0
    assert "TGI_ISA must be one of portable" in refused.stderr
