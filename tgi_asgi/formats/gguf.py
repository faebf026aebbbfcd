"""Read GGUF files (versions 2 and 3, little-endian): metadata, and views of the tensors' raw blocks.

The file is untrusted: every count, length, offset and product is checked against the file's size before it
is used. `models/loading` and `text/gguf_vocab.py` use this; it knows neither models nor torch.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import MappedFile, map_file, refuse_overlaps
from tgi_asgi.formats.gguf_header import GgufStrings, Header, read_header
from tgi_asgi.formats.gguf_types import READ, name_of

__all__ = ["GgufFile", "GgufStrings", "GgufTensor"]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies; `shape` is in numpy's order (rows first), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    type: str  # a weight format's name
    offset: int  # in bytes from the start of the file
    nbytes: int


class GgufFile:
    """An open GGUF file.

        with GgufFile.open("model.gguf") as file:
            file.metadata["general.architecture"]        # "llama"
            blocks = file.raw("token_embd.weight")       # uint8, a view of the mapped file

    Attributes:
        metadata: bool, int, float and str; arrays of numbers as read-only numpy arrays, arrays of strings
            as `GgufStrings`, arrays of arrays as lists.
        tensors: by name, in the file's order. A tensor of a type that is not read is left out
            here, and `tensor` and `raw` refuse it by that reason.
    """

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self._file = MappedFile(data)
        try:
            header = read_header(data.data)
            self.metadata = header.metadata
            self.tensors, self._unknown = _locate(header, data.size)
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from None

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map a file and read its header.

        Raises:
            ModelLoadError: it cannot be read, is no GGUF file, or its header contradicts itself.
        """
        return cls(Path(path), map_file(Path(path)))

    @property
    def names(self) -> list[str]:
        """The names of all tensors, of unknown types, too."""
        return [*self.tensors, *self._unknown]

    def tensor(self, name: str) -> GgufTensor:
        """Look a tensor up.

        Raises:
            ModelLoadError: there is none of that name, or its type is unknown.
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

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes: a flat read-only view, valid as long as it is referenced."""
        info = self.tensor(name)
        return self._file.view(info.offset, info.nbytes)

    def close(self) -> None:
        """Let go of the mapping, as `MappedFile.close` says."""
        self._file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _locate(header: Header, file_size: int) -> tuple[dict[str, GgufTensor], dict[str, int]]:
    """Turn descriptions into byte ranges, all inside the file and none over another.

    Returns:
        The tensors by name, and the types of those whose type is unknown.
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
