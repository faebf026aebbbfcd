"""Products of many tokens with FP8 weights in FP8: activations are rounded to E4M3, too.

Tensor cores multiply FP8 at twice the rate of bfloat16, and no matrix is decoded. Rounding the activations,
whose codes have 4 significant bits, puts a result off by 2.6 % of its norm. The formats: Micikevicius et al.,
FP8 Formats for Deep Learning, 2022.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.ops.cuda_errors import is_out_of_memory
from tgi_asgi.ops.cuda_list import Condition, LaunchList, Rows
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix
from tgi_asgi.ops.cuda_scratch import Scratch
from tgi_asgi.ops.layout import round_up

logger = logging.getLogger(__name__)

_kernels: Any = torch.ops.tgi_cuda
GROUP = 128  # columns, and rows of weights, that share a scale
# Of products by block: unless columns are a multiple of this, cuBLAS reads the scales wrongly.
_COLUMN_MULTIPLE = 4 * GROUP
# It refuses other numbers of tokens than multiples of this, so buffers have rows for padding.
TOKEN_MULTIPLE = 4
MAX_COLUMNS = 32768  # of activations with one scale per token
_MULTIPLE = 16  # of rows and columns
# Maximum number of tokens whose activations are not rounded. On an H200 a product of 28,672 x 4,096 with
# scales per row takes 41 us for 32 tokens and 39 for 64, with scales per block some 20 us more. The native
# kernel takes 37 for 16, 60 for 32 and 108 for 64.
_MAX_EXACT_TOKENS, _MAX_EXACT_TOKENS_OF_BLOCKS = 16, 32


@dataclass(frozen=True, slots=True)
class Float8Matrix:
    """A matrix that torch multiplies in FP8.

    Attributes:
        codes: [rows, columns] float8_e4m3fn.
        scales: [rows] float32, or [rows / 128, columns / 128].
    """

    codes: Tensor
    scales: Tensor

    @property
    def has_groups(self) -> bool:
        """Whether activations have a scale per 128 columns, too."""
        return self.scales.dim() == 2


def float8_matrix(matrix: CudaQuantMatrix) -> Float8Matrix | None:
    """Return a matrix whose scales are per row or per block of 128 x 128; None: it has others."""
    rows, columns = matrix.shape
    if matrix.codes.dtype is not torch.float8_e4m3fn or matrix.order is not None:
        return None
    if rows % _MULTIPLE or columns % _MULTIPLE:
        return None
    scales = matrix.scales  # [groups, rows]
    if columns <= MAX_COLUMNS and bool((scales == scales[:1]).all()):
        return Float8Matrix(matrix.codes, scales[0].contiguous())
    if columns // scales.shape[0] != GROUP or rows % GROUP or columns % _COLUMN_MULTIPLE:
        return None
    blocks = scales.view(scales.shape[0], rows // GROUP, GROUP)
    if not bool((blocks == blocks[..., :1]).all()):
        return None
    return Float8Matrix(matrix.codes, blocks[..., 0].t().contiguous())


class Float8Product:
    """The launches of a product in FP8.

    Args:
        matrix: The weights.
        scratch: Buffers; those of activations' codes are shared by all products.

    Attributes:
        is_used: Whether a list has its launches.
    """

    def __init__(self, matrix: Float8Matrix, scratch: Scratch) -> None:
        self._matrix, self._scratch = matrix, scratch
        self.is_used = False

    @property
    def max_exact_tokens(self) -> int:
        """Maximum number of tokens for which the native kernel is used, without rounding."""
        return _MAX_EXACT_TOKENS_OF_BLOCKS if self._matrix.has_groups else _MAX_EXACT_TOKENS

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, when: Condition) -> None:
        """Append the product of rows of a [max_rows, columns] to `out` [max_rows, rows], of a's dtype.

        Up to three rows of `out` behind the step's tokens are overwritten.
        """
        matrix, (max_rows, columns) = self._matrix, a.shape
        assert max_rows % TOKEN_MULTIPLE == 0
        self.is_used = True
        count = max_rows * (columns // GROUP if matrix.has_groups else 1)
        codes = Rows(self._scratch.buffer("codes", (max_rows, columns), torch.float8_e4m3fn), when.size)
        scales = self._scratch.buffer("scales of codes", (count,), torch.float32)
        launches.add("tgi_cuda::quantise", Rows(a, when.size), matrix.has_groups, codes, scales, when=when)
        launches.add(
            "tgi_cuda::multiply_codes", codes, scales, matrix.codes, matrix.scales, Rows(out, when.size),
            when=when,
        )  # fmt: skip


@functools.cache
def can_multiply(device: torch.device, dtype: torch.dtype, *, has_groups: bool) -> bool:
    """Return whether torch multiplies FP8 with these scales here, by a trial with an odd number of tokens."""
    tokens, rows, columns = 2 * GROUP + 5, 2 * GROUP, _COLUMN_MULTIPLE
    padded = round_up(tokens, TOKEN_MULTIPLE)
    generator = torch.Generator().manual_seed(0)
    a, weight = (
        torch.randn(count, columns, generator=generator).to(device, torch.float8_e4m3fn)
        for count in (padded, rows)
    )
    shape = (columns // GROUP, padded) if has_groups else (tokens,)
    scales = torch.rand(shape, generator=generator).to(device)
    blocks = (rows // GROUP, columns // GROUP)
    of_weight = torch.rand(blocks if has_groups else (rows,), generator=generator).to(device)
    a, out = a[:tokens], torch.empty(padded, rows, dtype=dtype, device=device)[:tokens]
    kind = "per 128 columns" if has_groups else "per row"
    try:
        _kernels.multiply_codes(a, scales.flatten(), weight, of_weight, out)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        logger.warning(
            "torch does not multiply FP8 with scales %s here: %s", kind, str(error).partition("\n")[0]
        )
        return False
    if has_groups:
        scales = scales[:, :tokens].t().repeat_interleave(GROUP, 1)
        of_weight = of_weight.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    else:
        scales, of_weight = scales[:, None], of_weight[:, None]
    expected = (a.double() * scales) @ (weight.double() * of_weight).T
    is_right = bool((out.double() - expected).norm() <= 0.01 * expected.norm())
    if not is_right:
        logger.warning("torch multiplies FP8 with scales %s wrongly here: it is not used", kind)
    return is_right
