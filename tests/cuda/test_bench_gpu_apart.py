"""bench/gpu_apart.py without a GPU: what a part's process may do, and what the caller learns of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import gpu_apart

# Python warns of every fork of a process with threads, such as torch's here.
FORK_WARNING = "ignore:This process .* is multi-threaded:DeprecationWarning"
pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings(FORK_WARNING)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that every process can open."""
    monkeypatch.setattr(gpu_apart, "open_gpu", lambda: None)


def test_a_part_returns_what_it_finds_from_a_process_of_its_own(gpu: None) -> None:
    pid, found = gpu_apart.apart(lambda: (os.getpid(), {"read": 1.5}), 60)
    assert found == {"read": 1.5}
    assert pid != os.getpid()


def _fail() -> None:
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("call", "limit_s", "why"),
    [
        (_fail, 60, "out of memory"),
        (lambda: os.kill(os.getpid(), 9), 60, "its process ended with status -9"),
        (lambda: time.sleep(60), 0.2, "it was not done after 0 s"),
    ],
)
def test_a_part_that_fails_dies_or_hangs_is_an_error_of_its_own(
    gpu: None, tmp_path: Path, call: Callable[[], object], limit_s: float, why: str
) -> None:
    with (tmp_path / "report").open("a", buffering=1) as file:

        def part() -> object:
            print("before", file=file)
            return call()

        with pytest.raises(RuntimeError, match=f"^{why}$"):
            gpu_apart.apart(part, limit_s)
    assert (tmp_path / "report").read_text() == "before\n"
    assert gpu_apart.apart(lambda: 3, 60) == 3


def test_a_gpu_that_a_forked_process_cannot_open_is_used_by_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_apart, "open_gpu", _fail)
    assert gpu_apart.apart(os.getpid, 60) == os.getpid()


def test_stages_that_are_imported_leave_the_gpu_to_their_parts() -> None:
    """A process that has asked the driver anything, even for the number of GPUs, can only use them itself."""
    code = """
import torch, sys
for name in ("init", "is_available", "device_count", "get_device_capability", "current_device"):
    setattr(torch.cuda, name, lambda *arguments, name=name: sys.exit(f"torch.cuda.{name} was called"))
from bench import gpu_kernels, gpu_runs
from tests.cuda import cases, gpu_device
torch.manual_seed(0)
assert [*cases.small(), *cases.large()]
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
