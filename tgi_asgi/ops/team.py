"""The compute threads that every operator runs on. The runner sets them up once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tgi_asgi import _C

# Lets a waking event loop run first. On an idle machine, nice 19 gains nothing more; next to one busy program
# it gave 16 streams 88 tokens/s instead of 114, and an inter-token p99 of 168 ms instead of 73.
_NICE_ON_FEW_CORES = 5

# Python's work between two operators of a layer usually takes less than this.
_SPIN_US = 1000


def num_threads() -> int:
    """Return the number of compute threads, including the caller's own."""
    return _C.num_threads()


def num_running_threads() -> int:
    """Return how many threads the last run had: fewer than `num_threads()` while cores are busy."""
    return _C.num_running_threads()


def team_progress() -> int:
    """Return a number that changes many times in a step, however slow the machine is, unless it hangs."""
    return _C.team_progress()


def configure_threads(
    num_threads: int | None = None,
    *,
    nice: int | None = None,
    pin: bool | None = None,
    num_shards: int = 1,
) -> int:
    """Start the compute team; return its number of threads, including the caller.

    The default is one thread per core that the process may use, by affinity and cgroup quota, not counting
    SMT siblings. On four cores or fewer the threads run at nice 5, so that the event loop does not have to
    wait for them (at equal priority, 4-11 ms). Threads are pinned if they are as many as the cores; a smaller
    team would take cores that another process's team uses. While other programs use the cores, runs leave
    threads out, which changes no result.

    Args:
        num_shards: Number of shards that share the cores, each with as many threads. This one has the
            first cores.
    """
    count = num_threads or max(_C.default_num_threads() // num_shards, 1)
    if nice is None:
        nice = _NICE_ON_FEW_CORES if count * num_shards <= 4 else 0
    if pin is None:
        pin = hasattr(os, "sched_getaffinity") and count * num_shards == _C.num_cores()
    # All threads of all shards meet at one barrier, so none of them can be left out.
    _C.configure_team(count, nice, pin, yields_cores=num_shards == 1)
    return count


def use_share_of_cores(rank: int, num_shards: int) -> int:
    """Restrict this shard, one of several, to its own cores; return their number.

    With fewer cores than shards, it stays on all of them.
    """
    cores = _C.usable_cores()
    each = len(cores) // num_shards
    if each:
        os.sched_setaffinity(0, cores[rank * each : (rank + 1) * each])
    return each


def wake_threads() -> None:
    """Wake the team before a step, so that the 20 us this takes overlap with writing the step's arrays."""
    _C.wake_team()


@contextlib.contextmanager
def keep_threads_awake() -> Iterator[None]:
    """Keep the team from parking between operators that Python calls one by one.

    Each wake-up costs 16 to 25 us. A model of 16 layers that computes in torch calls about a hundred
    operators per token, and decodes a tenth faster this way.
    """
    _C.team_spin(_SPIN_US)
    try:
        yield
    finally:
        _C.team_spin(0)


def join_threads() -> None:
    """Make the runner's thread, which calls this, member 0, with its nice value and core (`pin`)."""
    _C.join_team()
