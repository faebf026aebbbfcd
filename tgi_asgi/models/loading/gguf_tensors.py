"""The tensors of a GGUF file under its own names: what both of its readers share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile, GgufTensor
from tgi_asgi.formats.gguf_converted import BY_NAME
from tgi_asgi.formats.small_floats import holds_fp4_scales
from tgi_asgi.ops import FORMATS, WeightSource, decoded_source
from tgi_asgi.ops.sources import decode

_Item = TypeVar("_Item", bound=np.generic)


class GgufTensors:
    """The tensors of an open GGUF file, which `close` closes."""

    is_gguf = True

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._unread = set(file.names)
        self.num_bytes = sum(info.nbytes for info in file.tensors.values())

    def matrix(self, name: str) -> WeightSource:
        """Return a whole tensor by the file's own name."""
        info = self._file.tensor(name)
        return self._source(info, self._rows(info, 0, info.shape[0], info.shape[0]), info.shape, 0)

    def _rows(self, info: GgufTensor, start: int, stop: int, count: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of some of a tensor's `count` rows, and note that it is read."""
        self._unread.discard(info.name)
        return self._file.raw(info.name, *(info.nbytes * at // count for at in (start, stop)))

    def _source(
        self, info: GgufTensor, data: npt.NDArray[np.uint8], shape: tuple[int, ...], start: int,
        *, is_scaled: bool = True,
    ) -> WeightSource:  # fmt: skip
        """Return bytes of a tensor in the format in which they are held.

        Args:
            shape: Of these bytes; more than two sizes are matrices one below another.
            start: Index of the first, for NVFP4's second scale.
            is_scaled: Whether to apply that scale.
        """
        matrix = shape if len(shape) < 3 else (math.prod(shape[:-1]), shape[-1])
        converted = BY_NAME.get(info.type)
        if converted is None:
            return WeightSource(data, info.type, matrix)
        source = WeightSource(converted.convert(data), converted.held, matrix)
        if info.type == "NVFP4" and is_scaled:
            return self._scaled(source, info.name.removesuffix(".weight"), start, start + shape[0])
        return source

    def _scaled(self, source: WeightSource, stem: str, start: int, stop: int) -> WeightSource:
        """Apply NVFP4's second scale, if there is one: of a matrix, or of each expert from start to stop.

        The scales of activations beside it, `input_scale`, are not used: activations are not quantised.
        """
        self._unread.discard(f"{stem}.input_scale")
        info = self._file.tensors.get(f"{stem}.scale")
        if info is None:
            return source
        self._unread.discard(info.name)
        if info.type != "F32" or len(info.shape) != 1:
            raise ModelLoadError(f"tensor {info.name!r} must hold floats, one or one for each expert")
        scales = self._file.raw(info.name).view(np.float32)
        if scales.size > 1:
            scales = scales[start:stop]
        if scales.size not in (1, stop - start):
            raise ModelLoadError(f"tensor {info.name!r} must have one scale for each expert")
        blocks = source.data.reshape(scales.size, -1, FORMATS["FP4_16"].block_bytes).copy()
        halves = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged file may have any scales
            halves *= scales[:, None, None]
            if holds_fp4_scales(2 * halves):
                blocks[..., :4] = halves.astype(np.float16).view(np.uint8)
                return replace(source, data=blocks.reshape(-1))
            weights = decode(source).reshape(scales.size, -1) * scales[:, None]
        return decoded_source(weights.reshape(source.shape))

    def unread(self) -> list[str]:
        """Return the names that were not read, as described in `Weights.unread`."""
        return sorted(self._unread)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


def held_format(name: str) -> str:
    """Return the format in which a tensor of this type is loaded."""
    converted = BY_NAME.get(name)
    return name if converted is None else converted.held


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a shape that are greater than 1: llama.cpp's converter leaves those of 1 out."""
    return tuple(size for size in shape if size != 1)


def join_rotary_halves(data: npt.NDArray[_Item], num_rows: int, head_dim: int) -> npt.NDArray[_Item]:
    """Undo llama.cpp's permutation of query and key rows; return a copy.

    The file stores a head's rows pair by pair (0, d/2, 1, d/2 + 1, ...); the kernels use the checkpoint's
    order, with the first halves first. Rows consist of whole blocks, so this works on any format's bytes, and
    on the rows' numbers.
    """
    pairs = data.reshape(num_rows // head_dim, head_dim // 2, 2, data.size // num_rows)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)
