"""Weights in the layout of the recorded step: packed once from the file's own bytes, never held twice.

`ops/weights.py` calls this when a model is built for a recorded step; `ops/program.py` reads what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

STRIP_ROWS = 32
_VOCABULARY_ROWS = 8  # times as many rows as columns: more than any other matrix has
_HALF = STRIP_ROWS // 2
_PIECE = 64 << 20  # bytes
_QUANTISED = frozenset({"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"})


class Arena:
    """Memory for packed weights in large pieces, so that huge pages hold matrices that are smaller than one.

    Matrices lie in the order in which they were packed: a layer after the other, as a step reads them.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Return `size` bytes, uint8, at a multiple of 64; what is never written takes no memory."""
        if size > self._rest.numel():
            self._rest = torch.empty(max(size, _PIECE), dtype=torch.uint8)
            torch.ops.tgi.advise_huge_pages(self._rest)
        out, self._rest = self._rest[:size], self._rest[-(-size // 64) * 64 :]
        return out


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model's products compute when its step is recorded; given to the weights in place of a dtype.

    `is_exact` keeps activations in float32. Otherwise quantised weights are multiplied by activations of
    8 bits in blocks of 32, bfloat16 weights by bfloat16; float16 and float32 weights by float32 in both.
    """

    is_exact: bool
    quantise: str | None = None  # Q8_0 or Q4_0: what float weights become; a vocabulary stays at eight bits
    arena: Arena = field(default_factory=Arena, compare=False, repr=False)

    def format_of(self, name: str, rows: int, columns: int) -> str:
        """Return the format in which a [rows, columns] weight that the file has as `name` is kept.

        Embedding and head, told by their many rows, decide log-probabilities directly: never below Q8_0.
        """
        if self.quantise is None or name in _QUANTISED or columns % 32:
            return name
        return "Q8_0" if rows > _VOCABULARY_ROWS * columns else self.quantise


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix in panels of 16 rows: one part, or several where rows come in different formats."""

    parts: tuple[Tensor, ...]  # uint8
    formats: tuple[str, ...]
    shape: tuple[int, int]  # rows and columns, without padding
    precision: str  # of the activation that it is multiplied with: int8, bfloat16 or float32

    @property
    def nbytes(self) -> int:
        """Memory that the parts take."""
        return sum(part.nbytes for part in self.parts)


def precision_of(formats: Sequence[str], packing: Packing) -> str:
    """Return the activation's precision for weights of these formats."""
    if packing.is_exact:
        return "float32"
    if all(name in _QUANTISED for name in formats):
        return "int8"
    return "bfloat16" if all(name == "BF16" for name in formats) else "float32"


def pack(
    sources: Sequence[tuple[Tensor, str]], columns: int, order: npt.NDArray[np.int64], packing: Packing
) -> PackedMatrix:
    """Pack rows: row i of the result is row order[i] of the sources, one after the other (-1: zeros).

    Sources are (bytes, format). Where formats differ, each becomes a part of its own and `order` must keep
    each source's rows together.
    """
    formats = tuple(name for _, name in sources)
    rows = int((order >= 0).sum())
    if len(set(formats)) == 1:
        part = _pack_part([data for data, _ in sources], formats[0], columns, order, packing.arena)
        return PackedMatrix((part,), formats[:1], (rows, columns), precision_of(formats, packing))
    parts: list[Tensor] = []
    first = 0
    for data, name in sources:
        count = data.shape[0] // _row_bytes(name, columns)
        wanted = order[(order >= first) & (order < first + count)] - first
        parts.append(_pack_part([data], name, columns, wanted, packing.arena))
        first += count
    return PackedMatrix(tuple(parts), formats, (rows, columns), precision_of(formats, packing))


def unpack(matrix: PackedMatrix) -> Tensor:
    """Return the rows as they are stored, padding included: float32 [rows, columns]. For tests."""
    results = []
    for part, name in zip(matrix.parts, matrix.formats, strict=True):
        columns = matrix.shape[1]
        rows = part.shape[0] // torch.ops.tgi.packed_panel_bytes(name, columns) * _HALF
        out = torch.empty(rows, columns)
        torch.ops.tgi.unpack_weight(part, name, columns, 0, out)
        results.append(out)
    return torch.cat(results)


def plain_order(rows: int) -> npt.NDArray[np.int64]:
    """Rows in order, padded to whole strips."""
    order = np.full(-(-rows // STRIP_ROWS) * STRIP_ROWS, -1, np.int64)
    order[:rows] = np.arange(rows)
    return order


def head_order(num_rotated: int, num_plain: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Heads of queries and keys, then of values: a strip has the halves of 16 rotary pairs above each other.

    Rows i and i + head_dim / 2 of a rotated head turn together; the kernel wants the first in panel 0 and the
    second in panel 1 of one strip. Keys and queries alike, so that their products do not notice.
    """
    pairs = np.arange(head_dim).reshape(2, head_dim // STRIP_ROWS, _HALF)
    turned = pairs.swapaxes(0, 1).reshape(-1)  # [strip, half of the head, 16]
    starts = np.arange(num_rotated) * head_dim
    rotated = (starts[:, None] + turned).reshape(-1)
    plain = num_rotated * head_dim + np.arange(num_plain * head_dim)
    return np.concatenate([rotated, plain]).astype(np.int64)


def interleaved_order(rows: int) -> npt.NDArray[np.int64]:
    """Panels of 16 rows of gate and of up in turn: two strips give 32 outputs, a block of the next input."""
    panels = np.arange(rows, dtype=np.int64).reshape(-1, _HALF)
    return np.concatenate([panels, panels + rows], axis=1).reshape(-1)


def ordered_bias(bias: Tensor | None, order: npt.NDArray[np.int64]) -> Tensor | None:
    """Return the bias in the order of the packed rows, zero where a row is padding."""
    if bias is None:
        return None
    wanted = torch.from_numpy(order)
    return torch.where(wanted >= 0, bias[wanted.clamp(min=0)], torch.zeros(()))


def _row_bytes(name: str, columns: int) -> int:
    elements, size = BLOCKS[name]
    return columns // elements * size


def _pack_part(
    sources: Sequence[Tensor], name: str, columns: int, order: npt.NDArray[np.int64], arena: Arena
) -> Tensor:
    size = len(order) // _HALF * torch.ops.tgi.packed_panel_bytes(name, columns)
    out = arena.take(size)
    torch.ops.tgi.pack_weight(list(sources), name, columns, torch.from_numpy(order), out)
    return out


# Weight formats: (elements, bytes) of a block as the file has it.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
