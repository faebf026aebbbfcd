"""Read the untrusted header of a GGUF file: every count and length is checked before it is used.

`gguf.py` is the only caller. Arrays of strings stay in the file until they are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from tgi_asgi.errors import ModelLoadError

# Limits on what a hostile header can allocate; real files have about 50 keys and 2,000 tensors.
_MAX_KEYS = 1 << 16
_MAX_KEY_BYTES = (1 << 16) - 1  # the specification's own limit
_MAX_VALUE_BYTES = 1 << 28  # of one string or array of numbers, which are copied; real ones have a few MiB
_MAX_TENSORS = 1 << 17
_MAX_NAME_CHARS = 1024  # ggml itself allows 63
_MAX_DIMS = 4
_MAX_NESTING = 4
_MAX_NESTED_ARRAYS = 1 << 12  # arrays inside arrays, in the whole file
_MAX_ELEMENTS = 1 << 48

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GgufStrings(Sequence[str]):
    """An array of strings that stays in the file until its first element is read.

    Its bounds are already checked; reading raises `ModelLoadError` if a string is not UTF-8.
    """

    __slots__ = ("_buffer", "_count", "_items", "_key", "_start")

    def __init__(self, buffer: memoryview, start: int, count: int, key: str) -> None:
        self._buffer = buffer
        self._start = start
        self._count = count
        self._key = key
        self._items: list[str] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.to_list()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_list())

    def __repr__(self) -> str:
        return f"GgufStrings({self._key!r}, {self._count} strings)"

    def to_list(self) -> list[str]:
        """Decode all strings, once; later calls return the same list.

        Raises:
            ModelLoadError: if one is not UTF-8.
        """
        if self._items is None:
            buffer, at, unpack = self._buffer, self._start, _U64.unpack_from
            items = []
            try:
                for _ in range(self._count):
                    start = at + 8
                    at = start + unpack(buffer, at)[0]
                    items.append(str(buffer[start:at], "utf-8"))
            except UnicodeDecodeError as error:
                raise ModelLoadError(f"metadata `{self._key}`[{len(items)}] is not UTF-8: {error}") from None
            self._items = items
        return self._items


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's description as in the file, except that `shape` is in numpy's order (rows first)."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from the start of the data


@dataclass(frozen=True, slots=True)
class Header:
    """The contents of a file before the tensors' data."""

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    alignment: int
    data_start: int  # in bytes from the start of the file


def read_header(buffer: memoryview) -> Header:
    """Read the header of the file whose bytes are `buffer`.

    Raises:
        ModelLoadError: if it is not a GGUF file, is truncated, or contradicts itself.
    """
    reader = _Reader(buffer)
    num_tensors, num_keys = _read_preamble(reader)
    metadata = _read_metadata(reader, num_keys)
    tensors = [_read_tensor_info(reader) for _ in range(num_tensors)]
    alignment = _alignment(metadata)
    return Header(metadata, tensors, alignment, -(-reader.at // alignment) * alignment)


class _Reader:
    """A cursor over the header that refuses to go past the end of the file."""

    __slots__ = ("at", "buffer", "nested", "size")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.at = 0
        self.nested = 0  # arrays inside arrays so far

    def take(self, num_bytes: int, what: str) -> memoryview:
        if num_bytes > self.size - self.at:
            raise ModelLoadError(
                f"{what} needs {num_bytes} bytes at {self.at}, but the file ends at {self.size} (truncated?)"
            )
        start = self.at
        self.at += num_bytes
        return self.buffer[start : self.at]

    def value(self, num_bytes: int, what: str) -> memoryview:
        """Take what is going to be copied."""
        data = self.take(num_bytes, what)
        if num_bytes > _MAX_VALUE_BYTES:
            raise ModelLoadError(f"{what} has {num_bytes} bytes; at most {_MAX_VALUE_BYTES} are read")
        return data

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def string(self, what: str) -> str:
        data = self.value(self.u64(f"the length of {what}"), what)
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise ModelLoadError(f"{what} is not UTF-8: {error}") from None

    def skip_strings(self, count: int, what: str) -> None:
        """Skip `count` strings. A hot loop: the default model's 98,000 take 10 ms of the start-up."""
        buffer, at, unpack = self.buffer, self.at, _U64.unpack_from
        if count * 8 > self.size - at:
            raise ModelLoadError(f"{what}: {count} strings do not fit into the file (truncated?)")
        try:
            for _ in range(count):
                at += 8 + unpack(buffer, at)[0]
        except (struct.error, OverflowError):
            at = self.size + 1
        if at > self.size:
            raise ModelLoadError(f"{what}: a string goes past the end of the file (truncated?)")
        self.at = at


# Value types of the metadata, by their number in the file.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    number: np.dtype(code)
    for number, code in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip


def _read_preamble(reader: _Reader) -> tuple[int, int]:
    """Check magic and version; return the numbers of tensors and of metadata keys."""
    if bytes(reader.take(4, "the magic number")) != b"GGUF":
        raise ModelLoadError("not a GGUF file (it does not start with `GGUF`)")
    version = reader.u32("the version")
    if version not in (2, 3):
        reason = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise ModelLoadError(f"the file is {reason}; little-endian GGUF of version 2 or 3 is read")
    num_tensors, num_keys = reader.u64("the number of tensors"), reader.u64("the number of keys")
    if num_tensors > _MAX_TENSORS or num_keys > _MAX_KEYS:
        raise ModelLoadError(
            f"the header claims {num_tensors} tensors and {num_keys} metadata keys; "
            f"at most {_MAX_TENSORS} and {_MAX_KEYS} are read"
        )
    return num_tensors, num_keys


def _read_metadata(reader: _Reader, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = reader.string("a metadata key")
        if len(key) > _MAX_KEY_BYTES or not key:
            raise ModelLoadError(
                f"a metadata key has {len(key)} characters; 1 to {_MAX_KEY_BYTES} are allowed"
            )
        if key in metadata:
            raise ModelLoadError(f"metadata `{key}` is given twice")
        metadata[key] = _read_value(reader, reader.u32(f"the type of `{key}`"), key, nesting=0)
    return metadata


def _read_value(reader: _Reader, kind: int, key: str, nesting: int) -> Any:
    what = f"metadata `{key}`"
    if kind == _STRING:
        return reader.string(what)
    if kind == _ARRAY:
        return _read_array(reader, key, nesting)
    dtype = _SCALARS.get(kind)
    if dtype is None:
        raise ModelLoadError(f"{what} has the unknown type {kind}")
    data = reader.take(dtype.itemsize, what)
    if kind == _BOOL and data[0] > 1:
        raise ModelLoadError(f"{what} is a boolean of value {data[0]}")
    return np.frombuffer(data, dtype)[0].item()


def _read_array(reader: _Reader, key: str, nesting: int) -> Any:
    what = f"metadata `{key}`"
    kind, count = reader.u32(f"the element type of `{key}`"), reader.u64(f"the length of `{key}`")
    if kind == _STRING:
        strings = GgufStrings(reader.buffer, reader.at, count, key)
        reader.skip_strings(count, what)
        return strings
    if kind == _ARRAY:
        reader.nested += count
        if nesting >= _MAX_NESTING or reader.nested > _MAX_NESTED_ARRAYS:
            raise ModelLoadError(f"{what} nests too many arrays")
        return [_read_array(reader, key, nesting + 1) for _ in range(count)]
    dtype = _SCALARS.get(kind)
    if dtype is None:
        raise ModelLoadError(f"{what} is an array of the unknown type {kind}")
    data = reader.value(count * dtype.itemsize, what)
    if kind == _BOOL and count and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise ModelLoadError(f"{what} holds a boolean that is neither 0 nor 1")
    values = np.frombuffer(data, dtype).copy()  # aligned, and independent of the mapping
    values.flags.writeable = False
    return values


def _read_tensor_info(reader: _Reader) -> TensorInfo:
    name = reader.string("a tensor's name")
    if len(name) > _MAX_NAME_CHARS:
        raise ModelLoadError(f"a tensor's name has {len(name)} characters; {_MAX_NAME_CHARS} are allowed")
    num_dims = reader.u32(f"the rank of {name!r}")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ModelLoadError(f"tensor {name!r} has {num_dims} dimensions; 1 to {_MAX_DIMS} are allowed")
    dims = [reader.u64(f"a dimension of {name!r}") for _ in range(num_dims)]
    if 0 in dims or math.prod(dims) > _MAX_ELEMENTS:
        raise ModelLoadError(f"tensor {name!r} has the impossible dimensions {dims}")
    kind, offset = reader.u32(f"the type of {name!r}"), reader.u64(f"the offset of {name!r}")
    return TensorInfo(name, tuple(reversed(dims)), kind, offset)


def _alignment(metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
        raise ModelLoadError(f"`general.alignment` must be a power of two up to 1 MiB, got {value!r}")
    return value
