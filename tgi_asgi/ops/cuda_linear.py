"""Products with a model's weights on a CUDA device: which kernel computes them, for how many tokens."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from tgi_asgi.ops.cuda_list import LaunchList, Rows, Size, When
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix

# Plain products of up to so many tokens are our kernel's, of more cuBLAS's. Not measured: it is where a block
# of our kernel reads as many bytes of activations, from the L2 cache, as of weights.
MAX_SKINNY_TOKENS = 32
# The same for products with codes; above, the matrix is decoded for cuBLAS. Not measured either.
MAX_CODED_TOKENS = 32


class CudaLinear(Protocol):
    """`a @ W.T (+ bias)` of the first rows of a [max_rows, columns]: as many as the size `count` says."""

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product to out [max_rows, rows], of a's dtype or float32."""

    def add(self, launches: LaunchList, a: Tensor, x: Tensor, product: Tensor, count: Size) -> None:
        """Add the product to x [max_rows, rows] float32; `product`, as x but of a's dtype, is room for it."""


class Scratch:
    """Buffers that launches share: each is done with what is in one before the next writes it.

    Args:
        dtype: of activations.
        num_decoded: weights of the largest matrix that is decoded.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, num_decoded: int = 0) -> None:
        self._dtype, self._device = dtype, device
        self._decoded = torch.empty(num_decoded, dtype=dtype, device=device)
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer of that name, shape and dtype (None: of activations), of zeros at first."""
        key = (name, shape, dtype or self._dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=key[2], device=self._device)
        return self._buffers[key]

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        """Return room for a decoded matrix, which all have in common."""
        return self._decoded[: shape[0] * shape[1]].view(shape)


class PlainLinear:
    """A product with a plain matrix.

    Args:
        matrix: [rows, columns] bfloat16 or float16.
        bias: [rows] float32.
        is_batch_invariant: a token's result is the same bits whatever the others are. Not so cuBLAS's: it
            chooses the order of additions by their number.
    """

    def __init__(
        self, matrix: Tensor, bias: Tensor | None, scratch: Scratch, *, is_batch_invariant: bool
    ) -> None:
        self._matrix, self._bias, self._scratch = matrix, bias, scratch
        self._is_batch_invariant = is_batch_invariant

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product, as `CudaLinear.multiply` says."""
        few, many = self._split(count)
        launches.add(
            "tgi_cuda::linear", Rows(a, count), self._matrix, self._bias, False, Rows(out, count), when=few
        )
        if many is not None:
            _multiply(launches, a, self._matrix, self._bias, out, self._scratch, many)

    def add(self, launches: LaunchList, a: Tensor, x: Tensor, product: Tensor, count: Size) -> None:
        """Add the product, as `CudaLinear.add` says: few tokens in one kernel, without rounding it first."""
        few, many = self._split(count)
        launches.add(
            "tgi_cuda::linear", Rows(a, count), self._matrix, self._bias, True, Rows(x, count), when=few
        )
        if many is not None:
            _multiply(launches, a, self._matrix, self._bias, product, self._scratch, many)
            launches.add("aten::add_.Tensor", Rows(x, count), Rows(product, count), when=many)

    def _split(self, count: Size) -> tuple[When | None, When | None]:
        """Return when our kernel computes (None: always), and when cuBLAS does (None: never)."""
        return _split(count, MAX_SKINNY_TOKENS, self._is_batch_invariant)


class QuantLinear:
    """A product with a quantised matrix: by its codes, or once it is decoded.

    Args:
        bias: [rows] float32.
        scratch: has room for the decoded matrix, unless `is_batch_invariant`.
        is_batch_invariant: by the codes for any number of tokens: they are then read again for every eight.
    """

    def __init__(
        self, matrix: CudaQuantMatrix, bias: Tensor | None, scratch: Scratch, *, is_batch_invariant: bool
    ) -> None:
        self._matrix, self._bias, self._scratch = matrix, bias, scratch
        self._is_batch_invariant = is_batch_invariant

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product, as `CudaLinear.multiply` says."""
        matrix = self._matrix
        if matrix.order is not None:
            ordered = self._scratch.buffer("ordered", (a.shape[0], a.shape[1]), a.dtype)
            launches.add("aten::index_select.out", Rows(a, count), 1, matrix.order, Rows(ordered, count))
            a = ordered
        few, many = _split(count, MAX_CODED_TOKENS, self._is_batch_invariant)
        launches.add(
            "tgi_cuda::quant_linear", Rows(a, count), matrix.codes, matrix.scales, matrix.offsets, self._bias,
            matrix.bits, matrix.zero, Rows(out, count), when=few,
        )  # fmt: skip
        if many is not None:
            plain = self._scratch.matrix(matrix.shape)
            launches.add(
                "tgi_cuda::dequantise", matrix.codes, matrix.scales, matrix.offsets, matrix.bits, matrix.zero,
                plain, when=many,
            )  # fmt: skip
            _multiply(launches, a, plain, self._bias, out, self._scratch, many)

    def add(self, launches: LaunchList, a: Tensor, x: Tensor, product: Tensor, count: Size) -> None:
        """Add the product, as `CudaLinear.add` says."""
        self.multiply(launches, a, product, count)
        launches.add("aten::add_.Tensor", Rows(x, count), Rows(product, count))


def _split(count: Size, most: int, is_batch_invariant: bool) -> tuple[When | None, When | None]:
    if is_batch_invariant:
        return None, None
    return When(count, most=most), When(count, least=most + 1)


def _multiply(
    launches: LaunchList,
    a: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch,
    when: When,
) -> None:
    """Add a product of cuBLAS's: to float32 without rounding, where torch has that."""
    source, target = Rows(a, when.size), Rows(out, when.size)
    if out.dtype is not torch.float32:
        if bias is None:
            launches.add("aten::mm.out", source, matrix.t(), target, when=when)
        else:
            narrow = bias.to(matrix.dtype)
            launches.add("aten::addmm.out", narrow, source, matrix.t(), 1, 1, target, when=when)
        return
    if _has_wide_products(matrix.device, matrix.dtype):
        launches.add("aten::mm.dtype_out", source, matrix.t(), torch.float32, target, when=when)
    else:
        narrow_out = Rows(scratch.buffer("narrow", (out.shape[0], out.shape[1]), a.dtype), when.size)
        launches.add("aten::mm.out", source, matrix.t(), narrow_out, when=when)
        launches.add("aten::copy_", target, narrow_out, when=when)
    if bias is not None:
        launches.add("aten::add_.Tensor", target, bias, when=when)


@functools.cache
def _has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies 16-bit matrices into float32 here: logits then keep all their bits."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32, out=torch.empty(16, 16, device=device))
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
