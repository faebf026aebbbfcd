"""Memory that was freed, and that the C library would keep."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Return freed memory to the system; glibc would keep it for allocations that may never come.

    Takes about 0.1 s for a gigabyte, without the GIL.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries lack it
        trim(0)
