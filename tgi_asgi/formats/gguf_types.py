"""ggml's tensor types, and how many elements and bytes a block of each has (ggml-common.h)."""

from __future__ import annotations

import enum


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
