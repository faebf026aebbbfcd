"""What the system gives this process, and what the process gives back."""

from __future__ import annotations

import ctypes
import os


def num_processors() -> int:
    """Return how many processors this process may use; all, if a sandbox does not let it ask."""
    try:
        return len(os.sched_getaffinity(os.getpid()))  # 0 would be the calling thread, which may be pinned
    except (AttributeError, OSError):  # the first: other systems than Linux
        return os.cpu_count() or 1


def return_freed_memory() -> None:
    """Return freed memory to the system; glibc would keep it for allocations that may never come.

    Takes about 0.1 s for a gigabyte, without the GIL.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries lack it
        trim(0)
