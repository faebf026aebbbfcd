"""The table of weight formats, which csrc/formats.def holds, and blocks of quantised safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.ops.grouped import GROUPED, decode_grouped, float8_blocks, int4_blocks, int8_blocks
from tgi_asgi.ops.layout import plain_order

__all__ = ["FORMATS", "decode_rows", "float8_blocks", "int4_blocks", "int8_blocks"]


@dataclass
class Format:
    name: str
    block_columns: int
    block_bytes: int
    is_quantised: bool
    has_kernel: bool
    ggml_type: int = 0


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
FORMATS = {name: Format(name, *block, name[0] == "Q", True) for name, block in BLOCKS.items()} | {
    name: Format(name, *block, False, False, -1) for name, block in GROUPED.items()
}


def decode_rows(data: npt.NDArray[np.uint8], name: str, columns: int) -> npt.NDArray[np.float32]:
    """Return rows of a format as float32 [rows, columns]."""
    info = FORMATS[name]
    rows = data.size // (columns // info.block_columns * info.block_bytes)
    if name in GROUPED:
        return decode_grouped(data, name, (rows, columns))
    packed: Any = _C.pack(sources=[data], format=name, columns=columns, order=plain_order(rows), arena=_C.Arena())
    return packed.unpack()[:rows, :columns]
