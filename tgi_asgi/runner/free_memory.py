"""The memory that this process may still use: on the machine, and within its limit and its control groups."""

from __future__ import annotations

import resource
from pathlib import Path

from tgi_asgi.errors import ModelLoadError

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_OWN_SIZES = Path("/proc/self/statm")  # in pages; the first is the address space
# cgroup versions 2 and 1: the hierarchy's name, the limit and usage files, the prefix of the statistics.
# Beyond memory.high (systemd's MemoryHigh, Kubernetes' MemoryQoS) nothing is killed, but everything waits.
_CONTROLLERS = (
    ("", ("memory.max", "memory.current", "")),
    ("", ("memory.high", "memory.current", "")),
    ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")),
)


def free_memory() -> int:
    """Return the bytes that this process may still use.

    They are limited by the machine, by the process's address space (`ulimit -v`, which schedulers of batch
    jobs set) and by its control groups.
    """
    free = _meminfo("MemAvailable")
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        mapped = int(_read_text(_OWN_SIZES).split()[0]) * resource.getpagesize()
        free = min(free, max(most - mapped, 0))
    for controller, names in _CONTROLLERS:
        for group in _groups(controller):
            limit, used = _read_number(group / names[0]), _read_number(group / names[1])
            if limit is not None and used is not None:
                free = min(free, max(limit - max(used - _page_cache(group, names[2]), 0), 0))
    return free


def _groups(controller: str) -> list[Path]:
    """Return the directories of this process's control group and its visible ancestors."""
    root = _CGROUP / controller
    for line in _read_text(_MEMBERSHIP).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):  # version 2 has no name
            group = root / path.lstrip("/")
            return [group, *(above for above in group.parents if above.is_relative_to(root))]
    return [root]


def _page_cache(group: Path, prefix: str) -> int:
    """Return the reclaimable page-cache bytes charged to a group, such as the files of a model just read."""
    cached = 0
    for line in _read_text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
            cached += int(value)
    return cached


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise ModelLoadError(f"/proc/meminfo has no {key}")


def _read_number(path: Path) -> int | None:
    """Read a control group's number; None if there is none ("max", or no such file)."""
    try:
        return int(_read_text(path))
    except ValueError:
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
