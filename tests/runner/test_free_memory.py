"""The free memory that loading divides."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tgi_asgi.runner import free_memory

STAT = "anon 1000\nfile 3500\ninactive_file 2000\nactive_file 1000\nshmem 500\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "5000000", "memory.current": "2000000"}, 3000000),
        ({"memory.max": "max", "memory.current": "2000000"}, None),
        ({"memory.max": "9000000", "memory.high": "5000000", "memory.current": "2000000"}, 3000000),
        ({"memory.max": "5000000", "memory.high": "max", "memory.current": "2000000"}, 3000000),
        ({"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "900"}, 0),
        ({"memory.max": "5000", "memory.current": "4500", "memory.stat": STAT}, 5000 - 4500 + 3000),
        ({"a/b/memory.max": "max", "a/memory.max": "700", "a/memory.current": "100"}, 600),
        (
            {
                "memory/a/b/memory.limit_in_bytes": "5000",
                "memory/a/b/memory.usage_in_bytes": "4500",
                "memory/a/b/memory.stat": "inactive_file 1\ntotal_inactive_file 40\ntotal_active_file 2",
            },
            542,
        ),
        ({}, None),
    ],
)
def test_control_groups_bound_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    membership = tmp_path / "membership"
    membership.write_text("9:cpu,cpuacct:/c\n4:memory:/a/b\n0::/a/b\n")
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(free_memory, "_MEMBERSHIP", membership)
    monkeypatch.setattr(free_memory, "_meminfo", lambda key: 1 << 40)
    assert free_memory.free_memory() == (1 << 40 if expected is None else expected)


def test_the_limit_of_the_process_bounds_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for room, expected in ((1 << 28, 1 << 28), (-(1 << 28), 0)):
        limits = (mapped + room, resource.RLIM_INFINITY)
        monkeypatch.setattr(resource, "getrlimit", lambda which, limits=limits: limits)
        assert abs(free_memory.free_memory() - expected) < 1 << 27


def test_this_machine_has_free_memory() -> None:
    assert free_memory.free_memory() > 1 << 20
