"""Products with a model's weights on a CUDA device: which kernel computes them, by number of tokens."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from tgi_asgi.ops.cuda_list import Condition, LaunchList, Rows, Size
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix

# Maximum number of tokens for which the native kernel, not cuBLAS, computes a plain product. Not measured: at
# this size a block of the kernel reads as many bytes of activations, from the L2 cache, as of weights.
MAX_SKINNY_TOKENS = 32
# The same for quantised products; above it, the matrix is decoded for cuBLAS. Not measured either.
MAX_CODED_TOKENS = 32


class CudaLinear(Protocol):
    """A product `a @ W.T (+ bias)` of the first `count` rows of a [max_rows, columns]."""

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product to out [max_rows, rows], of a's dtype or float32."""

    def add(self, launches: LaunchList, a: Tensor, x: Tensor, product: Tensor, count: Size) -> None:
        """Add the product to x [max_rows, rows] float32; `product` is scratch, of x's shape and a's dtype."""


class Scratch:
    """Buffers that launches share: each finishes with a buffer before the next writes it.

    Args:
        dtype: Dtype of activations.
        num_decoded: Number of weights in the largest matrix that is decoded.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, num_decoded: int = 0) -> None:
        self._dtype, self._device = dtype, device
        self._decoded = torch.empty(num_decoded, dtype=dtype, device=device)
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer of that name, shape and dtype (None: the activations'), initially zero."""
        key = (name, shape, dtype or self._dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=key[2], device=self._device)
        return self._buffers[key]

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        """Return the buffer for a decoded matrix, which all matrices share."""
        return self._decoded[: shape[0] * shape[1]].view(shape)


class PlainLinear:
    """A product with a plain matrix.

    Args:
        matrix: [rows, columns] bfloat16 or float16.
        bias: [rows] float32.
        is_batch_invariant: Whether a token's result has the same bits whatever the other tokens are. cuBLAS
            does not guarantee that: it chooses the order of additions by the number of tokens.
    """

    def __init__(
        self, matrix: Tensor, bias: Tensor | None, scratch: Scratch, *, is_batch_invariant: bool
    ) -> None:
        self._matrix, self._bias, self._scratch = matrix, bias, scratch
        self._is_batch_invariant = is_batch_invariant

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product; see `CudaLinear.multiply`."""
        few, many = self._split(count)
        launches.add(
            "tgi_cuda::linear", Rows(a, count), self._matrix, self._bias, False, Rows(out, count), when=few
        )
        if many is not None:
            _multiply(launches, a, self._matrix, self._bias, out, self._scratch, many)

    def add(self, launches: LaunchList, a: Tensor, x: Tensor, product: Tensor, count: Size) -> None:
        """Add the product; see `CudaLinear.add`. Few tokens use one kernel, which does not round it first."""
        few, many = self._split(count)
        launches.add(
            "tgi_cuda::linear", Rows(a, count), self._matrix, self._bias, True, Rows(x, count), when=few
        )
        if many is not None:
            _multiply(launches, a, self._matrix, self._bias, product, self._scratch, many)
            launches.add("aten::add_.Tensor", Rows(x, count), Rows(product, count), when=many)

    def _split(self, count: Size) -> tuple[Condition | None, Condition | None]:
        """Return when the native kernel computes (None: always), and when cuBLAS does (None: never)."""
        return _split(count, MAX_SKINNY_TOKENS, self._is_batch_invariant)


class QuantLinear:
    """A product with a quantised matrix, computed from its codes or after decoding it.

    Args:
        bias: [rows] float32.
        scratch: Buffers, with space for the decoded matrix unless `is_batch_invariant`.
        is_batch_invariant: Whether codes are used for any number of tokens; they are then read again for
            every eight tokens.
    """

    def __init__(
        self, matrix: CudaQuantMatrix, bias: Tensor | None, scratch: Scratch, *, is_batch_invariant: bool
    ) -> None:
        self._matrix, self._bias, self._scratch = matrix, bias, scratch
        self._is_batch_invariant = is_batch_invariant

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product; see `CudaLinear.multiply`."""
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
        """Add the product; see `CudaLinear.add`."""
        self.multiply(launches, a, product, count)
        launches.add("aten::add_.Tensor", Rows(x, count), Rows(product, count))


def _split(
    count: Size, max_count: int, is_batch_invariant: bool
) -> tuple[Condition | None, Condition | None]:
    if is_batch_invariant:
        return None, None
    return Condition(count, max=max_count), Condition(count, min=max_count + 1)


def _multiply(
    launches: LaunchList,
    a: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch,
    when: Condition,
) -> None:
    """Append a cuBLAS product; a float32 output is not rounded if torch supports that."""
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
    """Return whether torch multiplies 16-bit matrices into float32 here, so that logits keep all bits."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32, out=torch.empty(16, 16, device=device))
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
