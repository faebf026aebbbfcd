"""Read GGUF files (versions 2 and 3, little-endian): metadata, and views of the tensors' raw blocks.

A model may be split into several files by llama.cpp's `gguf-split`: the first has the metadata, and each has
some of the tensors. They are read as one `GgufFile`.

The file is untrusted: every count, length, offset and product is checked against the file's size before it is
used. Used by `models/loading` and `text/gguf_vocab.py`; knows neither models nor torch.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import MappedFile, map_file, refuse_overlaps
from tgi_asgi.formats.gguf_header import GgufStrings, Header, read_header
from tgi_asgi.formats.gguf_names import Part
from tgi_asgi.formats.gguf_types import READ, name_of

__all__ = ["GgufFile", "GgufStrings", "GgufTensor"]

_NUMBER, _COUNT, _NUM_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Location of a tensor; `shape` is in numpy's order (rows first), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    type: str  # name of a weight format
    offset: int  # in bytes from the start of its file
    nbytes: int


class GgufFile:
    """A model's open GGUF file, or all files that it is split into.

        with GgufFile.open("model.gguf") as file:
            file.metadata["general.architecture"]        # "llama"
            blocks = file.raw("token_embd.weight")       # uint8, a view of the mapped file

    Attributes:
        path: The file, or the first of several.
        metadata: Values are bool, int, float and str; arrays of numbers are read-only numpy arrays, arrays of
            strings `GgufStrings`, arrays of arrays lists. For several files, that of the first.
        tensors: Tensors by name, in the files' order. A tensor of an unsupported type is omitted here, and
            `tensor` and `raw` refuse it with that reason.
    """

    def __init__(self, parts: list[_PartFile]) -> None:
        self.path = parts[0].path
        self.metadata = parts[0].metadata
        self.tensors = {name: info for part in parts for name, info in part.tensors.items()}
        self._unknown = {name: kind for part in parts for name, kind in part.unknown.items()}
        self._parts = parts
        self._part_of = {name: part for part in parts for name in part.tensors}

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map a file and the other parts of its model, and read their headers.

        Args:
            path: The file, or any of several parts.

        Raises:
            ModelLoadError: if one cannot be read, is not a GGUF file, or its header contradicts itself; if a
                part is missing or belongs to another model.
        """
        path = Path(path)
        named = Part.of(path.name)
        part = _PartFile(path)
        if part.count == 1 and (named is None or named.count == 1):
            return cls([part])
        if named is None:
            raise ModelLoadError(
                f"{path} is part {part.number} of {part.count} of a model: the others can only be found if "
                f"it has a name such as model-{part.number:05}-of-{part.count:05}.gguf"
            )
        _check_part(part, named.number, named.count)
        parts = []
        for number in range(1, named.count + 1):
            is_named = number == named.number
            parts.append(part if is_named else _PartFile(path.with_name(named.name_of(number)), path))
            _check_part(parts[-1], number, named.count)
        _check_whole(parts)
        return cls(parts)

    @property
    def names(self) -> list[str]:
        """The names of all tensors, including those of unknown types."""
        return [*self.tensors, *self._unknown]

    def tensor(self, name: str) -> GgufTensor:
        """Return a tensor's location.

        Raises:
            ModelLoadError: if there is none of that name, or its type is not supported.
        """
        info = self.tensors.get(name)
        if info is not None:
            return info
        if name in self._unknown:
            raise ModelLoadError(
                f"{self.path}: tensor {name!r} is of type {name_of(self._unknown[name])}, which is not "
                f"supported; supported are {', '.join(row.name for row in READ.values())}"
            )
        raise ModelLoadError(f"{self.path}: there is no tensor {name!r}")

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, or a range of them: a flat read-only view, valid while referenced."""
        info = self.tensor(name)
        stop = info.nbytes if stop is None else stop
        return self._part_of[name].file.view(info.offset + start, stop - start)

    def close(self) -> None:
        """Release the mappings, as `MappedFile.close`."""
        for part in self._parts:
            part.file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _PartFile:
    """One mapped file: its header, and what the header says about the parts of its model.

    Raises:
        ModelLoadError: as `GgufFile.open`; `wanted_by` is the part that was named.
    """

    def __init__(self, path: Path, wanted_by: Path | None = None) -> None:
        self.path = path
        if wanted_by is not None and not path.exists():
            raise ModelLoadError(f"{path} is missing, which is part of the same model as {wanted_by}")
        data = map_file(path)
        self.file = MappedFile(data)
        try:
            header = read_header(data.data)
            self.metadata = header.metadata
            self.tensors, self.unknown = _locate(header, data.size)
            self.count = self._integer(_COUNT, 1)
            self.number = self._integer(_NUMBER, 0) + 1  # the file counts from 0, names from 1
            self.num_tensors = self._integer(_NUM_TENSORS, -1)  # of all parts
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from None

    def _integer(self, key: str, default: int) -> int:
        value: Any = self.metadata.get(key, default)
        if type(value) is not int:
            raise ModelLoadError(f"`{key}` must be an integer, got {str(value)[:100]}")
        return max(value, 1) if key == _COUNT else value  # a model in one file may say 0


def _check_part(part: _PartFile, number: int, count: int) -> None:
    """Refuse a part whose metadata contradicts its name."""
    if _COUNT not in part.metadata:
        raise ModelLoadError(
            f"{part.path} is named as part {number} of {count}, but its metadata says nothing of parts "
            "(`split.count`)"
        )
    if (part.number, part.count) != (number, count):
        raise ModelLoadError(
            f"{part.path} is named as part {number} of {count}, but says that it is {part.number} of "
            f"{part.count}: of another model?"
        )


def _check_whole(parts: list[_PartFile]) -> None:
    """Refuse parts that do not make up one model."""
    first = parts[0]
    owners: dict[str, Path] = {}
    for part in parts:
        if part.num_tensors != first.num_tensors:
            raise ModelLoadError(
                f"{part.path} is of a model of {part.num_tensors} tensors, but {first.path} of one of "
                f"{first.num_tensors}"
            )
        for name in (*part.tensors, *part.unknown):
            if name in owners:
                raise ModelLoadError(f"tensor {name!r} is both in {owners[name]} and in {part.path}")
            owners[name] = part.path
    if len(owners) != first.num_tensors:
        raise ModelLoadError(
            f"{first.path} says that its {first.count} parts have {first.num_tensors} tensors; they have "
            f"{len(owners)}"
        )


def _locate(header: Header, file_size: int) -> tuple[dict[str, GgufTensor], dict[str, int]]:
    """Turn descriptions into byte ranges, all inside the file and without overlaps.

    Returns:
        The tensors by name, and the types of the tensors with unsupported types.
    """
    tensors: dict[str, GgufTensor] = {}
    unknown: dict[str, int] = {}
    for info in header.tensors:
        if info.name in tensors or info.name in unknown:
            raise ModelLoadError(f"tensor {info.name!r} is given twice")
        if info.offset % header.alignment:
            raise ModelLoadError(
                f"tensor {info.name!r} lies at {info.offset}, not a multiple of {header.alignment}"
            )
        kind = READ.get(info.type)
        if kind is None:
            unknown[info.name] = info.type
            continue
        row = info.shape[-1] if info.shape else 1
        if row % kind.block_columns:
            raise ModelLoadError(
                f"tensor {info.name!r} has rows of {row} elements, not a multiple of {kind.name}'s block of "
                f"{kind.block_columns}"
            )
        nbytes = math.prod(info.shape) // kind.block_columns * kind.block_bytes
        offset = header.data_start + info.offset
        if nbytes > file_size - offset:
            raise ModelLoadError(
                f"tensor {info.name!r} takes bytes {offset} to {offset + nbytes}, but the file ends at "
                f"{file_size} (truncated?)"
            )
        tensors[info.name] = GgufTensor(info.name, info.shape, kind.name, offset, nbytes)
    refuse_overlaps((item.offset, item.offset + item.nbytes, item.name) for item in tensors.values())
    return tensors, unknown
