"""Write small GGUF files, valid or deliberately invalid."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {"u8": (0, "<B"), "i8": (1, "<b"), "i32": (5, "<i"), "u64": (10, "<Q")}


@dataclass
class Tensor:
    """A tensor's entry; None stands for the valid value."""

    name: str
    dims: Sequence[int]  # in the file's order: the row's length first
    type: int
    data: bytes = b""
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    """Encode a string: its length in eight bytes, then its bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Encode a typed value. Lists become arrays; a tuple such as ("u8", 3) chooses a scalar type."""
    if isinstance(item, bytes):  # already encoded
        return item
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, tuple):
        kind, code = _SCALARS[item[0]]
        return struct.pack("<I", kind) + struct.pack(code, item[1])
    if isinstance(item, np.ndarray):
        kind = {"f4": 6, "i4": 5, "u1": 0}[item.dtype.str[1:]]
        return struct.pack("<IIQ", 9, kind, item.size) + item.tobytes()
    parts = [value(part) for part in item]
    kinds = parts[0][:4] if parts else struct.pack("<I", 8)
    return struct.pack("<I", 9) + kinds + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)


def gguf_bytes(
    metadata: Mapping[str, Any] | None = None,
    tensors: Sequence[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Encode a whole file."""
    metadata = metadata or {}
    out = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(metadata) if num_keys is None else num_keys,
    )
    for key, item in metadata.items():
        out += string(key) + value(item)
    data = b""
    for tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        out += string(tensor.name) + struct.pack("<I", len(tensor.dims))
        out += struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims) + struct.pack("<IQ", tensor.type, offset)
        data += tensor.data + bytes(-len(tensor.data) % alignment)
    return out + bytes(-len(out) % alignment) + data


def write(path: Path, data: bytes) -> Path:
    """Write the bytes and return the path."""
    path.write_bytes(data)
    return path
