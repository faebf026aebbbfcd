"""Products with a model's weights on a CUDA device: which kernel computes them, by number of tokens."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from tgi_asgi.ops.cuda_float8 import Float8Product
from tgi_asgi.ops.cuda_list import Condition, LaunchList, Rows, Size
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix
from tgi_asgi.ops.cuda_scratch import Scratch

# Maximum number of tokens for which the native kernel, not cuBLAS, computes a plain product. Measured on an
# H200 with Llama-3-8B's shapes: cuBLAS's time is 0.95 and 1.23 times the kernel's for 16 tokens, 0.79 and
# 0.94 times for 32.
MAX_SKINNY_TOKENS = 16
# The same for quantised products; above it, the matrix is decoded for cuBLAS. For 64 tokens that takes 1.2 to
# 1.5 times the kernel's time with int4, Q8_0 and FP8, and about as long with MXFP4 and codes like Q6_K's.
MAX_CODED_TOKENS = 64


class CudaLinear(Protocol):
    """A product `a @ W.T (+ bias)` of the first `count` rows of a [max_rows, columns]."""

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product to out [max_rows, rows], of a's dtype or float32."""

    def add(self, launches: LaunchList, a: Tensor, x: Tensor, product: Tensor, count: Size) -> None:
        """Add the product to x [max_rows, rows] float32; `product` is scratch, of x's shape and a's dtype."""


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
            _multiply_add(launches, a, self._matrix, self._bias, x, product, self._scratch, many)

    def _split(self, count: Size) -> tuple[Condition | None, Condition | None]:
        """Return when the native kernel computes (None: always), and when cuBLAS does (None: never)."""
        return _split(count, MAX_SKINNY_TOKENS, self._is_batch_invariant)


class QuantLinear:
    """A product with a quantised matrix: from its codes, or for many tokens in FP8 or after decoding it.

    Args:
        bias: [rows] float32.
        scratch: Buffers, with space for the decoded matrix unless `is_batch_invariant`.
        is_batch_invariant: Whether codes are used for any number of tokens; they are then read again for
            every 32 tokens.
        float8: The product of many tokens in FP8, unless results are float32; None: the matrix is decoded.
    """

    def __init__(
        self,
        matrix: CudaQuantMatrix,
        bias: Tensor | None,
        scratch: Scratch,
        *,
        is_batch_invariant: bool,
        float8: Float8Product | None = None,
    ) -> None:
        self._matrix, self._bias, self._scratch = matrix, bias, scratch
        self._is_batch_invariant, self._float8 = is_batch_invariant, float8

    def multiply(self, launches: LaunchList, a: Tensor, out: Tensor, count: Size) -> None:
        """Write the product; see `CudaLinear.multiply`."""
        float8 = self._float8 if out.dtype is a.dtype else None
        a, few, many = self._ordered(launches, a, count), *self._split(count, float8)
        self._multiply_codes(launches, a, out, count, few, is_added=False)
        if many is None:
            return
        if float8 is not None:
            self._multiply_float8(launches, float8, a, out, many)
        else:
            plain = self._decode(launches, many)
            _multiply(launches, a, plain, self._bias, out, self._scratch, many)

    def add(self, launches: LaunchList, a: Tensor, x: Tensor, product: Tensor, count: Size) -> None:
        """Add the product; see `CudaLinear.add`. Codes use one kernel, which does not round it first."""
        a, few, many = self._ordered(launches, a, count), *self._split(count, self._float8)
        self._multiply_codes(launches, a, x, count, few, is_added=True)
        if many is None:
            return
        if self._float8 is not None:
            self._multiply_float8(launches, self._float8, a, product, many)
            launches.add("tgi_cuda::residual_add", Rows(product, count), 1.0, Rows(x, count), when=many)
        else:
            plain = self._decode(launches, many)
            _multiply_add(launches, a, plain, self._bias, x, product, self._scratch, many)

    def _multiply_float8(
        self, launches: LaunchList, float8: Float8Product, a: Tensor, out: Tensor, when: Condition
    ) -> None:
        float8.multiply(launches, a, out, when)
        if self._bias is not None:
            launches.add("aten::add_.Tensor", Rows(out, when.size), self._bias, when=when)

    def _ordered(self, launches: LaunchList, a: Tensor, count: Size) -> Tensor:
        """Return the activations with their columns in the matrix's order."""
        if self._matrix.order is None:
            return a
        ordered = self._scratch.buffer("ordered", (a.shape[0], a.shape[1]), a.dtype)
        launches.add("aten::index_select.out", Rows(a, count), 1, self._matrix.order, Rows(ordered, count))
        return ordered

    def _multiply_codes(
        self, launches: LaunchList, a: Tensor, out: Tensor, count: Size, when: Condition | None, *,
        is_added: bool,
    ) -> None:  # fmt: skip
        matrix = self._matrix
        launches.add(
            "tgi_cuda::quant_linear", Rows(a, count), matrix.codes, matrix.scales, matrix.offsets, self._bias,
            matrix.bits, matrix.zero, is_added, Rows(out, count), when=when,
        )  # fmt: skip

    def _decode(self, launches: LaunchList, when: Condition) -> Tensor:
        """Return the decoded matrix."""
        matrix = self._matrix
        plain = self._scratch.matrix(matrix.shape)
        launches.add(
            "tgi_cuda::dequantise", matrix.codes, matrix.scales, matrix.offsets, matrix.bits, matrix.zero,
            plain, when=when,
        )  # fmt: skip
        return plain

    def _split(self, count: Size, float8: Float8Product | None) -> tuple[Condition | None, Condition | None]:
        """Return when codes are multiplied as they are (None: always), and when not (None: never)."""
        most = MAX_CODED_TOKENS if float8 is None else float8.max_exact_tokens
        return _split(count, most, self._is_batch_invariant)


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
    if has_wide_products(matrix.device, matrix.dtype):
        launches.add("aten::mm.dtype_out", source, matrix.t(), torch.float32, target, when=when)
    else:
        narrow_out = Rows(scratch.buffer("narrow", (out.shape[0], out.shape[1]), a.dtype), when.size)
        launches.add("aten::mm.out", source, matrix.t(), narrow_out, when=when)
        launches.add("aten::copy_", target, narrow_out, when=when)
    if bias is not None:
        launches.add("aten::add_.Tensor", target, bias, when=when)


def _multiply_add(
    launches: LaunchList, a: Tensor, matrix: Tensor, bias: Tensor | None, x: Tensor, product: Tensor,
    scratch: Scratch, when: Condition,
) -> None:  # fmt: skip
    """Append a cuBLAS product that is added to float32 `x` in its epilogue, if torch supports that."""
    target = Rows(x, when.size)
    if not _has_wide_sums(matrix.device, matrix.dtype):
        _multiply(launches, a, matrix, bias, product, scratch, when)
        launches.add("tgi_cuda::residual_add", Rows(product, when.size), 1.0, target, when=when)
        return
    source = Rows(a, when.size)
    # `x` is also the output: torch then copies nothing, and cuBLAS reads what it overwrites.
    launches.add(
        "aten::addmm.dtype_out", target, source, matrix.t(), torch.float32, 1, 1, target, when=when
    )  # fmt: skip
    if bias is not None:
        launches.add("aten::add_.Tensor", target, bias, when=when)


@functools.cache
def has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch multiplies 16-bit matrices into float32 here, so that logits keep all bits."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32, out=torch.empty(16, 16, device=device))
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


@functools.cache
def _has_wide_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch adds products of 16-bit matrices to a float32 matrix here, in place."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones, ones, torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
