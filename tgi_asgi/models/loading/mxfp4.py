"""Read gpt-oss experts as published: a tensor of all experts' nibbles and one of exponents, in blocks of 32.

    experts.gate_up_proj_blocks [experts, rows, blocks, 16]    byte i: columns 2i and 2i + 1, the first low
    experts.gate_up_proj_scales [experts, rows, blocks]        2^(exponent - 127)

A block is converted to the equivalent ggml block; nothing is rounded.
Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.small_floats import mxfp4_blocks
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.loading.weights import check_shape
from tgi_asgi.ops import WeightSource

BLOCK = 32  # columns with one exponent
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")


class ExpertMatrix(NamedTuple):
    """Location of one expert's matrix in two tensors of all experts."""

    blocks: str
    scales: str
    number: int


def find_expert(checkpoint: Checkpoint, name: str) -> ExpertMatrix | None:
    """Return the location of `experts.5.gate_up_proj.weight`; None if it is not stored in such blocks."""
    parts = _EXPERT.fullmatch(name)
    if parts is None:
        return None
    found = ExpertMatrix(f"{parts[1]}.{parts[3]}_blocks", f"{parts[1]}.{parts[3]}_scales", int(parts[2]))
    return found if found.blocks in checkpoint else None


def read_expert(checkpoint: Checkpoint, matrix: ExpertMatrix, shape: tuple[int, ...]) -> WeightSource:
    """Return a copy of an expert's matrix [rows, columns].

    Raises:
        ModelLoadError: if a tensor is missing, has another type or does not fit.
    """
    rows, columns = shape
    blocks, scales = checkpoint.tensor(matrix.blocks), checkpoint.tensor(matrix.scales)
    count = blocks.shape[0] if blocks.shape else 0
    if columns % BLOCK or matrix.number >= count:
        raise ModelLoadError(f"{matrix.blocks!r} has no expert {matrix.number} of {columns} columns")
    for info, expected in (
        (blocks, (count, rows, columns // BLOCK, 16)),
        (scales, (count, rows, columns // BLOCK)),
    ):
        if info.dtype != "U8":
            raise ModelLoadError(f"tensor {info.name!r} is of dtype {info.dtype}, not U8")
        check_shape(info.name, info.shape, expected)
    codes, exponents = (
        checkpoint.raw(info.name, *(info.nbytes // count * at for at in (matrix.number, matrix.number + 1)))
        for info in (blocks, scales)
    )
    out = mxfp4_blocks(codes.reshape(-1, 16), exponents)
    return WeightSource(out.reshape(-1), "MXFP4", (rows, columns))


def stored_expert(name: str, elements: int) -> tuple[str, int] | None:
    """Return the format and number of elements to count for such a tensor; None if it is another."""
    if name.endswith("_blocks"):
        return "MXFP4", 2 * elements
    return ("MXFP4", 0) if name.endswith("_scales") else None
