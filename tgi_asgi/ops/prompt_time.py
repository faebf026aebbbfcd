"""Time of a prompt's product in bfloat16, relative to int8, with the kernels and threads in use."""

from __future__ import annotations

import time

import numpy as np

from tgi_asgi import _C
from tgi_asgi.ops import layout
from tgi_asgi.ops.formats import FORMATS

_TOKENS, _ROWS, _COLUMNS = 256, 512, 1024  # 0.13 ms at one multiply-add per picosecond
_ROUNDS = 4


def bfloat16_time_ratio(format: str) -> float:
    """Return the time of a many-token product in bfloat16 over int8, for a weight of this format."""

    info = FORMATS[format]
    data = np.zeros(_ROWS * _COLUMNS // info.block_columns * info.block_bytes, np.uint8)
    matrix = _C.pack(
        sources=[data], format=format, columns=_COLUMNS, order=layout.row_order(_ROWS), arena=_C.Arena()
    )
    x, out = np.ones((_TOKENS, _COLUMNS), np.float32), np.empty((_TOKENS, _ROWS), np.float32)
    best = dict.fromkeys(("int8", "bfloat16"), float("inf"))
    for _ in range(_ROUNDS):  # alternating, so that a rising clock rate favours neither
        for precision in best:
            begun_s = time.perf_counter()
            _C.linear_rows(matrix, None, x, out, precision)
            best[precision] = min(best[precision], time.perf_counter() - begun_s)
    return best["bfloat16"] / best["int8"]
