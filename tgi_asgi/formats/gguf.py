"""Read GGUF files (versions 2 and 3, little-endian): metadata, and views of the tensors' raw blocks.

The file is untrusted: every count, length, offset and product is checked against the file's size before it
is used, and arrays of strings are decoded only when somebody reads them. `models/loading` and
`text/gguf_vocab.py` use this; it knows neither models nor torch.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import map_file, refuse_overlaps

# Bounds on what a hostile header can make us build; real files have some 50 keys and 2,000 tensors.
_MAX_KEYS = 1 << 16
_MAX_KEY_BYTES = (1 << 16) - 1  # the specification's own bound
_MAX_TENSORS = 1 << 17
_MAX_DIMS = 4
_MAX_NESTING = 4
_MAX_NESTED_ARRAYS = 1 << 12  # arrays inside arrays, in the whole file
_MAX_ELEMENTS = 1 << 48

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GgufType(enum.IntEnum):
    """ggml's tensor types; `block_size` elements are stored in `block_bytes` bytes."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41

    @property
    def block_size(self) -> int:
        """Number of elements in a block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes that a block takes."""
        return _BLOCKS[self][1]


_BLOCKS: dict[GgufType, tuple[int, int]] = {
    GgufType.F32: (1, 4),
    GgufType.F16: (1, 2),
    GgufType.Q4_0: (32, 18),
    GgufType.Q4_1: (32, 20),
    GgufType.Q5_0: (32, 22),
    GgufType.Q5_1: (32, 24),
    GgufType.Q8_0: (32, 34),
    GgufType.Q8_1: (32, 40),
    GgufType.Q2_K: (256, 84),
    GgufType.Q3_K: (256, 110),
    GgufType.Q4_K: (256, 144),
    GgufType.Q5_K: (256, 176),
    GgufType.Q6_K: (256, 210),
    GgufType.Q8_K: (256, 292),
    GgufType.IQ2_XXS: (256, 66),
    GgufType.IQ2_XS: (256, 74),
    GgufType.IQ3_XXS: (256, 98),
    GgufType.IQ1_S: (256, 50),
    GgufType.IQ4_NL: (32, 18),
    GgufType.IQ3_S: (256, 110),
    GgufType.IQ2_S: (256, 82),
    GgufType.IQ4_XS: (256, 136),
    GgufType.I8: (1, 1),
    GgufType.I16: (1, 2),
    GgufType.I32: (1, 4),
    GgufType.I64: (1, 8),
    GgufType.F64: (1, 8),
    GgufType.IQ1_M: (256, 56),
    GgufType.BF16: (1, 2),
    GgufType.TQ1_0: (256, 54),
    GgufType.TQ2_0: (256, 66),
    GgufType.MXFP4: (32, 17),
    GgufType.NVFP4: (64, 36),
    GgufType.Q1_0: (128, 18),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies; `shape` is in numpy's order (rows first), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    offset: int  # in bytes from the start of the file
    nbytes: int


class GgufStrings(Sequence[str]):
    """An array of strings that stays in the file until its first element is read.

    Its bounds are checked already; reading raises `ModelLoadError` where a string is not UTF-8.
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
        """Decode all strings, once; later calls return the same list."""
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


class GgufFile:
    """An open GGUF file.

        with GgufFile.open("model.gguf") as file:
            file.metadata["general.architecture"]        # "llama"
            blocks = file.raw("token_embd.weight")       # uint8, a view of the mapped file

    Attributes:
        metadata: bool, int, float and str; arrays of numbers as read-only numpy arrays, arrays of strings
            as `GgufStrings`, arrays of arrays as lists.
        tensors: by name, in the file's order. A tensor of a type that is not in `GgufType` is left out
            here, and `tensor` and `raw` refuse it by that reason.
    """

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self._data = data
        reader = _Reader(data.data)
        try:
            num_tensors, num_keys = _read_preamble(reader)
            self.metadata = _read_metadata(reader, num_keys)
            infos = [_read_tensor_info(reader) for _ in range(num_tensors)]
            start = reader.aligned(_alignment(self.metadata))
            self.tensors, self._unknown = _locate(infos, start, reader.size, _alignment(self.metadata))
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from None

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map a file and read its header.

        Raises:
            ModelLoadError: it cannot be read, is no GGUF file, or its header contradicts itself.
        """
        return cls(Path(path), map_file(Path(path)))

    def tensor(self, name: str) -> GgufTensor:
        """Look a tensor up.

        Raises:
            ModelLoadError: there is none of that name, or its type is unknown.
        """
        info = self.tensors.get(name)
        if info is not None:
            return info
        if name in self._unknown:
            raise ModelLoadError(f"{self.path}: tensor {name!r} has the unknown type {self._unknown[name]}")
        raise ModelLoadError(f"{self.path}: there is no tensor {name!r}")

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes: a flat read-only view, valid as long as it is referenced."""
        info = self.tensor(name)
        return self._data[info.offset : info.offset + info.nbytes]

    def close(self) -> None:
        """Let go of the mapping; it is unmapped when the last view of it is gone. Idempotent."""
        self._data = self._data[:0].copy()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Reader:
    """A cursor over the header that refuses to leave the file."""

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

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def string(self, what: str) -> str:
        data = self.take(self.u64(f"the length of {what}"), what)
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise ModelLoadError(f"{what} is not UTF-8: {error}") from None

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings. A hot loop: the default model's 98,000 take 10 ms of the start-up."""
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

    def aligned(self, alignment: int) -> int:
        return -(-self.at // alignment) * alignment


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
    data = reader.take(count * dtype.itemsize, what)
    if kind == _BOOL and count and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise ModelLoadError(f"{what} holds a boolean that is neither 0 nor 1")
    values = np.frombuffer(data, dtype).copy()  # aligned, and independent of the mapping
    values.flags.writeable = False
    return values


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor's description as the file has it; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _read_tensor_info(reader: _Reader) -> _Info:
    name = reader.string("a tensor's name")
    num_dims = reader.u32(f"the rank of {name!r}")
    if num_dims > _MAX_DIMS:
        raise ModelLoadError(f"tensor {name!r} has {num_dims} dimensions; at most {_MAX_DIMS} are allowed")
    dims = [reader.u64(f"a dimension of {name!r}") for _ in range(num_dims)]
    if 0 in dims or math.prod(dims) > _MAX_ELEMENTS:
        raise ModelLoadError(f"tensor {name!r} has the impossible dimensions {dims}")
    kind, offset = reader.u32(f"the type of {name!r}"), reader.u64(f"the offset of {name!r}")
    return _Info(name, tuple(reversed(dims)), kind, offset)


def _alignment(metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
        raise ModelLoadError(f"`general.alignment` must be a power of two up to 1 MiB, got {value!r}")
    return value


def _locate(
    infos: list[_Info], start: int, file_size: int, alignment: int
) -> tuple[dict[str, GgufTensor], dict[str, int]]:
    """Turn descriptions into byte ranges, all inside the file and none over another."""
    tensors: dict[str, GgufTensor] = {}
    unknown: dict[str, int] = {}
    for info in infos:
        if info.name in tensors or info.name in unknown:
            raise ModelLoadError(f"tensor {info.name!r} is given twice")
        if info.offset % alignment:
            raise ModelLoadError(f"tensor {info.name!r} lies at {info.offset}, not a multiple of {alignment}")
        try:
            kind = GgufType(info.type)
        except ValueError:
            unknown[info.name] = info.type
            continue
        row = info.shape[-1] if info.shape else 1
        if row % kind.block_size:
            raise ModelLoadError(
                f"tensor {info.name!r} has rows of {row} elements, not a multiple of {kind.name}'s block of "
                f"{kind.block_size}"
            )
        nbytes = math.prod(info.shape) // kind.block_size * kind.block_bytes
        offset = start + info.offset
        if nbytes > file_size - offset:
            raise ModelLoadError(
                f"tensor {info.name!r} takes bytes {offset} to {offset + nbytes}, but the file ends at "
                f"{file_size} (truncated?)"
            )
        tensors[info.name] = GgufTensor(info.name, info.shape, kind, offset, nbytes)
    refuse_overlaps((item.offset, item.offset + item.nbytes, item.name) for item in tensors.values())
    return tensors, unknown
