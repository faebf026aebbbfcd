"""Helpers shared by the readers of model files: map or read a file, parse JSON, refuse overlapping ranges."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError

_MAPPED_BYTES = 16 << 20  # limit of resident bytes through views of a mapped file
_MAX_POINTER_BYTES = 1024
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_JSON_BYTES = 100_000_000  # the largest tokenizer.json in use has about 40 MB


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """Map a regular file read-only.

    The array is flat; the file stays mapped as long as the array or a view of it is referenced. Truncating a
    mapped file crashes the process, so files that arrive while the server runs are read with `read_file`.

    Raises:
        ModelLoadError: if there is no such file, or it is not a regular file, unreadable or empty.
    """
    with _opened(path) as (file, _):
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, np.uint8)


def read_file(path: Path, max_bytes: int, why: str = "") -> npt.NDArray[np.uint8]:
    """Read a regular file into memory: a flat, read-only array that later changes to the file do not affect.

    Args:
        why: Text appended to the message if the file is too large.

    Raises:
        ModelLoadError: as `map_file`, or if the file has more than `max_bytes` bytes.
    """
    with _opened(path) as (file, size):
        # The file may grow or shrink while it is read, so check the bytes that were read, too.
        data = file.read(size + 1) if size <= max_bytes else b""
        if max(size, len(data)) > max_bytes:
            raise ModelLoadError(f"{path} has {size} bytes; at most {max_bytes} are read{why}")
    return np.frombuffer(data, np.uint8)


def read_beginning(path: Path, num_bytes: int) -> bytes:
    """Read the first bytes of a regular file, or all if it has fewer.

    Raises:
        ModelLoadError: as `map_file`.
    """
    with _opened(path) as (file, _):
        return file.read(num_bytes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file that is not empty; yield it and its size in bytes."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelLoadError(f"{path} is not a regular file")
            if status.st_size == 0:
                raise ModelLoadError(f"{path} is empty")
            if status.st_size < _MAX_POINTER_BYTES and file.peek(64).startswith(_LFS_POINTER):
                raise ModelLoadError(
                    f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
                )
            yield file, status.st_size
    except FileNotFoundError:
        raise ModelLoadError(f"no such file: {path}") from None
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from None


class MappedFile:
    """A mapped file of which little is resident at a time, however much of it is read.

        file = MappedFile(map_file(path))
        file.view(offset, size)      # uint8, valid as long as it is referenced

    Weights are packed once and not read again, but the pages of a mapped file stay resident until it is
    unmapped. Without this, a loaded model would occupy memory twice.
    """

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data = data
        self._num_viewed = 0  # bytes since pages were last released

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Return bytes, flat and read-only; pages read earlier may be released and are then read again."""
        if self._num_viewed > _MAPPED_BYTES:
            release_pages(self._data)
            self._num_viewed = 0
        self._num_viewed += size
        return self._data[offset : offset + size]

    def close(self) -> None:
        """Release the mapping; it is unmapped when its last view is gone. Idempotent.

        Views may wait for the garbage collector, so the pages are released now.
        """
        release_pages(self._data)
        self._data = self._data[:0].copy()


def release_pages(data: npt.NDArray[np.uint8]) -> None:
    """Release the pages of an array from `map_file`; its remaining views read the file again."""
    mapping = data.base.obj if isinstance(data.base, memoryview) else data.base
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model's directory.

    Raises:
        ModelLoadError: if it is absent, unreadable, too large, not JSON, or not an object.
    """
    data = read_file(path, MAX_JSON_BYTES)
    try:
        return parse_json_object(data.tobytes())
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from None


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object as `read_json` does; return {} if there is no such file."""
    return read_json(path) if path.exists() else {}


def parse_json_object(data: bytes, **hooks: Any) -> dict[str, Any]:
    """Parse a JSON object; `hooks` are passed to `json.loads` and may raise ValueError.

    Raises:
        ModelLoadError: if it is not UTF-8, not JSON, nested too deep, or not an object.
    """
    try:
        value = json.loads(str(data, "utf-8"), **hooks)
    except RecursionError:
        raise ModelLoadError("the JSON nests too deep") from None
    except ValueError as error:  # the base class of UnicodeDecodeError and JSONDecodeError
        raise ModelLoadError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"expected a JSON object, got {type(value).__name__}")
    return value


def refuse_overlaps(ranges: Iterable[tuple[int, int, str]]) -> None:
    """Check that the byte ranges (start, stop, name of a tensor) are disjoint.

    Raises:
        ModelLoadError: if two of them share a byte.
    """
    end, owner = 0, ""
    for start, stop, name in sorted(ranges):
        if start < end:
            raise ModelLoadError(f"tensors {owner!r} and {name!r} overlap")
        end, owner = stop, name


def _open_without_waiting(path: str, flags: int) -> int:
    """Open without blocking, so that a FIFO given as a model is refused instead of waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
