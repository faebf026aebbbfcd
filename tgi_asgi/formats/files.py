"""What the readers of model files share: mapping a file, and refusing ranges that overlap."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """Map a regular file read-only.

    The array is flat; the file stays mapped as long as the array or a view of it lives.

    Raises:
        ModelLoadError: no such file, not a regular file, unreadable or empty.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelLoadError(f"{path} is not a regular file")
            if status.st_size == 0:
                raise ModelLoadError(f"{path} is empty")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelLoadError(f"no such file: {path}") from None
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from None
    return np.frombuffer(mapping, np.uint8)


def refuse_overlaps(ranges: Iterable[tuple[int, int, str]]) -> None:
    """Check that the byte ranges (start, stop, name of a tensor) are disjoint.

    Raises:
        ModelLoadError: two of them share a byte.
    """
    end, owner = 0, ""
    for start, stop, name in sorted(ranges):
        if start < end:
            raise ModelLoadError(f"tensors {owner!r} and {name!r} overlap")
        end, owner = stop, name


def _open_without_waiting(path: str, flags: int) -> int:
    """Open so that a FIFO given for a model is refused instead of waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
