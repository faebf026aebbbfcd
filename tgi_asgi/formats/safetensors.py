"""Read safetensors files: headers checked in full, tensors as views of the mapped files.

Does not use the `safetensors` package. Without torch, it copies (1 GiB in 2.4 s, where these views take 0.03
s) and has no bfloat16. It also accepts duplicate tensors, and its errors name neither file nor tensor. Used
by `models/loading`.
Layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import (
    MappedFile,
    map_file,
    parse_json_object,
    read_beginning,
    refuse_overlaps,
)

_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
_MAX_JSON_ITEMS = 2_000_000  # a parsed small item takes thirty times its text; a tensor has about 10
_MAX_NAME_CHARS = 1024
_MAX_DIMS = 16
_MAX_ELEMENTS = 1 << 48

# Bits per element; the names are the format's own.
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64,
    "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """Location of a tensor."""

    name: str
    dtype: str  # the format's name: "F32", "F16", "BF16", ...
    shape: tuple[int, ...]
    offset: int  # in bytes from the start of the file
    nbytes: int


class SafetensorsFile:
    """One open safetensors file.

    Attributes:
        tensors: Tensors by name, in the header's order.
        metadata: The header's free-form strings (`{"format": "pt"}`).
    """

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self._file = MappedFile(data)
        try:
            header, start = _read_header(data)
            self.metadata = _read_metadata(header.pop("__metadata__", {}))
            self.tensors = {name: _read_info(name, entry, start) for name, entry in header.items()}
            _check_layout(self.tensors, start, data.size)
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from None

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Map a file and read its header.

        Raises:
            ModelLoadError: if it cannot be read, is not a safetensors file, or its header is inconsistent.
        """
        return cls(Path(path), map_file(Path(path)))

    def tensor(self, name: str) -> SafeTensor:
        """Return a tensor's location; raise `ModelLoadError` if there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelLoadError(f"{self.path}: there is no tensor {name!r}") from None

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, or a range of them: a flat read-only view, valid while referenced."""
        info = self.tensor(name)
        stop = info.nbytes if stop is None else stop
        return self._file.view(info.offset + start, stop - start)

    def close(self) -> None:
        """Release the mapping, as `MappedFile.close`."""
        self._file.close()


def read_header(path: Path, max_bytes: int) -> dict[str, SafeTensor]:
    """Read the tensors that a file's header lists, without the tensors themselves.

    Raises:
        ModelLoadError: if it has no such header of at most `max_bytes` bytes.
    """
    data = np.frombuffer(read_beginning(path, 8 + max_bytes), np.uint8)
    header, start = _read_header(data)
    header.pop("__metadata__", None)
    return {name: _read_info(name, entry, start) for name, entry in header.items()}


def _parse_strictly(data: bytes) -> dict[str, Any]:
    """Parse a JSON object as the format demands: no duplicate keys, no NaN, bounded work."""
    if sum(data.count(character) for character in b"[{,") > _MAX_JSON_ITEMS:
        raise ModelLoadError(f"the JSON has more than {_MAX_JSON_ITEMS} items")
    return parse_json_object(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} is given twice")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _read_header(data: npt.NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """Return the header's object and the offset at which the tensors' bytes start."""
    if data.size < 8:
        raise ModelLoadError(f"not a safetensors file: it has {data.size} bytes")
    length = struct.unpack("<Q", data[:8].tobytes())[0]
    if length > min(_MAX_HEADER_BYTES, data.size - 8):
        raise ModelLoadError(
            f"the header claims {length} bytes; the file has {data.size - 8} after it and "
            f"{_MAX_HEADER_BYTES} are allowed (truncated, or not safetensors?)"
        )
    try:
        return _parse_strictly(data[8 : 8 + length].tobytes()), 8 + length
    except ModelLoadError as error:
        raise ModelLoadError(f"the header is damaged: {error}") from None


def _read_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ModelLoadError("`__metadata__` must map strings to strings")
    return value


def _is_size(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _read_info(name: str, entry: Any, start: int) -> SafeTensor:
    if len(name) > _MAX_NAME_CHARS:
        raise ModelLoadError(f"a tensor's name has {len(name)} characters; {_MAX_NAME_CHARS} are allowed")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ModelLoadError(f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ModelLoadError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMS
        or not all(_is_size(size, _MAX_ELEMENTS) for size in shape)
        or math.prod(shape) > _MAX_ELEMENTS
    ):
        raise ModelLoadError(f"tensor {name!r} has the impossible shape {str(shape)[:100]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(at, 1 << 62) for at in offsets):
        raise ModelLoadError(f"tensor {name!r} has the impossible offsets {str(offsets)[:100]}")
    begin, end = offsets
    num_bits = math.prod(shape) * bits
    if num_bits % 8 or end - begin != num_bits // 8:
        raise ModelLoadError(
            f"tensor {name!r} of dtype {dtype} and shape {shape} takes {num_bits / 8:g} bytes, "
            f"but its offsets [{begin}, {end}] span {end - begin}"
        )
    return SafeTensor(name, dtype, tuple(shape), start + begin, end - begin)


def _check_layout(tensors: dict[str, SafeTensor], start: int, file_size: int) -> None:
    """Refuse what the format forbids: ranges past the end, overlaps, and holes."""
    for info in tensors.values():
        if info.offset + info.nbytes > file_size:
            raise ModelLoadError(
                f"tensor {info.name!r} takes bytes {info.offset} to {info.offset + info.nbytes}, "
                f"but the file ends at {file_size} (truncated?)"
            )
    refuse_overlaps((info.offset, info.offset + info.nbytes, info.name) for info in tensors.values())
    unused = file_size - start - sum(info.nbytes for info in tensors.values())
    if unused:
        raise ModelLoadError(f"{unused} bytes after the header belong to no tensor")
