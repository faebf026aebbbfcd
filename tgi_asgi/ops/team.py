"""The compute threads that every operator runs on. The runner sets them up once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from tgi_asgi import _C

# Lets a waking event loop go first. At 19 nothing more is won on an idle machine, and beside one busy program
# 16 streams got 88 tokens/s instead of 114, with an inter-token p99 of 168 ms instead of 73.
_NICE_ON_FEW_CORES = 5

# What Python does between two operators of a layer takes less, most of the time.
_SPIN_US = 1000


def num_threads() -> int:
    """Return the number of compute threads, the caller's own included."""
    return _C.num_threads()


def configure_threads(
    num_threads: int | None = None,
    *,
    nice: int | None = None,
    pin: bool | None = None,
    num_shards: int = 1,
) -> int:
    """Start the compute team; return how many threads it has, the launching one included.

    By default as many as the process may use of cores, by affinity and cgroup quota, not their SMT siblings;
    nice 5 where these are four or fewer, so that the event loop is not kept waiting (at equal priority
    4-11 ms); pinned to their cores if they are as many as these (a smaller team would take the cores of
    another process's).
    torch's own threads would fight the team for the cores: they are switched off for the process.

    Args:
        num_shards: processes that share the cores: each has as many threads. This one has the first cores.
    """
    count = num_threads or max(_C.default_num_threads() // num_shards, 1)
    if nice is None:
        nice = _NICE_ON_FEW_CORES if count * num_shards <= 4 else 0
    if pin is None:
        pin = hasattr(os, "sched_getaffinity") and count * num_shards == _C.num_cores()
    torch.set_num_threads(1)
    _C.configure_team(count, nice, pin)
    return count


def use_share_of_cores(rank: int, num_shards: int) -> int:
    """Keep this process, one of several, to cores of its own; return how many these are.

    Where there are fewer cores than processes, it stays on all of them.
    """
    cores = _C.usable_cores()
    each = len(cores) // num_shards
    if each:
        os.sched_setaffinity(0, cores[rank * each : (rank + 1) * each])
    return each


def wake_threads() -> None:
    """Wake the team ahead of a step, so that its 20 us pass while the step's arrays are written."""
    _C.wake_team()


@contextlib.contextmanager
def threads_kept_awake() -> Iterator[None]:
    """Keep the team from parking between operators that Python calls one by one.

    Each wake-up costs 16 to 25 us; a model of 16 layers that computes in torch calls some hundred operators
    for a token, and decodes a tenth faster so.
    """
    _C.team_spin(_SPIN_US)
    try:
        yield
    finally:
        _C.team_spin(0)


def join_threads() -> None:
    """Make the calling thread member 0 for good (its core, its nice value): for the runner's own thread."""
    _C.join_team()
