"""Products with a model's weights on a CUDA device: which kernel computes them, for how many tokens."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

from tgi_asgi.ops.cuda_quant import CudaQuantMatrix

_kernels: Any = torch.ops.tgi_cuda

# Plain products of up to so many tokens are our kernel's, of more cuBLAS's. Not measured: it is where a block
# of our kernel reads as many bytes of activations, from the L2 cache, as of weights.
MAX_SKINNY_TOKENS = 32
# The same for products with codes; above, the matrix is decoded for cuBLAS. Not measured either.
MAX_CODED_TOKENS = 32


class CudaLinear(Protocol):
    """`a @ W.T (+ bias)` of tokens a [n_tokens, columns]."""

    def multiply(self, a: Tensor, out: Tensor) -> None:
        """Write the product to out [n_tokens, rows], of a's dtype or float32."""

    def add(self, a: Tensor, x: Tensor, product: Tensor) -> None:
        """Add the product to x [n_tokens, rows] float32; `product`, as x but of a's dtype, is room for it."""


class PlainLinear:
    """A product with a plain matrix.

    Args:
        matrix: [rows, columns] bfloat16 or float16.
        bias: [rows] float32.
        is_batch_invariant: a token's result is the same bits whatever the others are. Not so cuBLAS's: it
            chooses the order of additions by their number.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, *, is_batch_invariant: bool) -> None:
        self._matrix, self._bias = matrix, bias
        self._is_batch_invariant = is_batch_invariant
        self._narrow_bias = None if bias is None else bias.to(matrix.dtype)
        self._has_wide_products = _has_wide_products(matrix.device, matrix.dtype)

    def multiply(self, a: Tensor, out: Tensor) -> None:
        """Write the product, as `CudaLinear.multiply` says."""
        if self._is_skinny(a):
            _kernels.linear(a, self._matrix, self._bias, False, out)
        elif out.dtype is torch.float32:
            self._multiply_wide(a, out)
        elif self._narrow_bias is None:
            torch.mm(a, self._matrix.t(), out=out)
        else:
            torch.addmm(self._narrow_bias, a, self._matrix.t(), out=out)

    def _multiply_wide(self, a: Tensor, out: Tensor) -> None:
        if self._has_wide_products:
            torch.mm(a, self._matrix.t(), out_dtype=torch.float32, out=out)
        else:
            out.copy_(torch.mm(a, self._matrix.t()))
        if self._bias is not None:
            out += self._bias

    def add(self, a: Tensor, x: Tensor, product: Tensor) -> None:
        """Add the product, as `CudaLinear.add` says: few tokens in one kernel, without rounding it first."""
        if self._is_skinny(a):
            _kernels.linear(a, self._matrix, self._bias, True, x)
        else:
            self.multiply(a, product)
            x += product

    def _is_skinny(self, a: Tensor) -> bool:
        return self._is_batch_invariant or a.shape[0] <= MAX_SKINNY_TOKENS


class Room:
    """Memory for one quantised matrix at a time as a plain one, for products of many tokens."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, shape: tuple[int, int]) -> None:
        """Make sure that a matrix of this shape finds room."""
        if self._memory.numel() < shape[0] * shape[1]:
            self._memory = torch.empty(
                shape[0] * shape[1], dtype=self._memory.dtype, device=self._memory.device
            )

    def view(self, shape: tuple[int, int]) -> Tensor:
        """Return the memory as a matrix of this shape."""
        return self._memory[: shape[0] * shape[1]].view(shape)


class QuantLinear:
    """A product with a quantised matrix: by its codes, or once it is decoded.

    Args:
        bias: [rows] float32.
        room: where the matrix is decoded to.
        is_batch_invariant: by the codes for any number of tokens: they are then read again for every eight.
    """

    def __init__(
        self, matrix: CudaQuantMatrix, bias: Tensor | None, room: Room, *, is_batch_invariant: bool
    ) -> None:
        self._matrix, self._bias, self._room = matrix, bias, room
        self._is_batch_invariant = is_batch_invariant
        if not is_batch_invariant:
            room.reserve(matrix.shape)

    def multiply(self, a: Tensor, out: Tensor) -> None:
        """Write the product, as `CudaLinear.multiply` says."""
        if self._is_batch_invariant or a.shape[0] <= MAX_CODED_TOKENS:
            self._matrix.multiply(a, self._bias, out)
            return
        plain = self._room.view(self._matrix.shape)
        self._matrix.decode(plain)
        out.copy_(torch.mm(self._matrix.gather(a), plain.t()))
        if self._bias is not None:
            out += self._bias

    def add(self, a: Tensor, x: Tensor, product: Tensor) -> None:
        """Add the product, as `CudaLinear.add` says."""
        self.multiply(a, product)
        x += product


@functools.cache
def _has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies 16-bit matrices into float32 here: logits then keep all their bits."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32, out=torch.empty(16, 16, device=device))
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
