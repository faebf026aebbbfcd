"""torch's product of FP8 matrices on CPU tensors, for the emulation: in float64, with CUDA's layouts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

_FLOAT8 = torch.float8_e4m3fn


class ScaledMmStandIn:
    """`_scaled_mm.out` for CPUs while it is kept, with scales per row or per 128 columns.

    Attributes:
        calls: Shapes of the products, tokens first.
        refuses: Whether it raises.
        is_wrong: Whether its scales of the weights are forgotten.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.refuses = False
        self.is_wrong = False
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own for CPUs is overridden
            self._library.impl("_scaled_mm.out", self._multiply, "CPU")

    def close(self) -> None:
        self._library._destroy()

    def _multiply(
        self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
        scale_result: Tensor | None = None, out_dtype: Any = None, use_fast_accum: bool = False, *,
        out: Tensor,
    ) -> Tensor:  # fmt: skip
        if self.refuses:
            raise RuntimeError("this GPU has no FP8\nat all")
        (tokens, columns), rows = a.shape, b.shape[1]
        assert a.dtype is b.dtype is _FLOAT8 and scale_a.dtype is scale_b.dtype is torch.float32
        assert a.is_contiguous() and b.t().is_contiguous() and out.is_contiguous()
        assert rows % 16 == 0 and columns % 16 == 0 and out.dtype is out_dtype and bias is None
        if scale_a.shape == (tokens, 1):
            assert scale_b.shape == (1, rows) and scale_a.is_contiguous() and scale_b.is_contiguous()
            assert use_fast_accum
        else:
            assert tokens % 4 == 0 and columns % 512 == 0
            assert scale_a.shape == (tokens, columns // 128) and scale_a.t().is_contiguous()
            assert scale_b.shape == (columns // 128, rows // 128) and scale_b.t().is_contiguous()
            assert not use_fast_accum
            scale_a = scale_a.repeat_interleave(128, 1)
            scale_b = scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
        self.calls.append((tokens, rows, columns))
        weight = b.double() if self.is_wrong else b.double() * scale_b
        return out.copy_((a.double() * scale_a) @ weight)
