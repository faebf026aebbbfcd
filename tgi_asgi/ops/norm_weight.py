"""Parameters of norms: of a row, and of the heads of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.qkv_heads import QkvHeads


@dataclass(frozen=True, slots=True, eq=False)
class NormWeight:
    """An RMSNorm, or with a bias a LayerNorm, in one representation for all file formats.

        NormWeight(weight, 1e-5)                    # x / rms(x) * weight
        NormWeight(weight, 1e-5, bias)              # (x - mean) / deviation * weight + bias
        NormWeight.layer(2048, 1e-5, weight=None)   # OLMo 1, which learns neither

    Sources: Zhang and Sennrich, Root Mean Square Layer Normalization, section 4; Ba et al., Layer
    Normalization, section 3.

    Attributes:
        weight, bias: float32 [columns]; for heads [head_dim], shared by all, or [num_heads * head_dim].
        eps: Number added to the mean square, or to the variance.
    """

    weight: Floats
    eps: float
    bias: Floats | None = None

    def __post_init__(self) -> None:
        if self.bias is not None and self.bias.shape != self.weight.shape:
            raise ValueError(f"a norm's bias must have {self.weight.size} elements, got {self.bias.size}")

    @classmethod
    def layer(
        cls, columns: int, eps: float, *, weight: Floats | None, bias: Floats | None = None
    ) -> NormWeight:
        """Make a LayerNorm, with ones and zeros for a missing weight and bias."""
        return cls(
            np.ones(columns, np.float32) if weight is None else weight,
            eps,
            np.zeros(columns, np.float32) if bias is None else bias,
        )

    @classmethod
    def rms(cls, columns: int, eps: float, *, weight: Floats | None) -> NormWeight:
        """Make an RMSNorm, with ones for a missing weight."""
        return cls(np.ones(columns, np.float32) if weight is None else weight, eps)

    @property
    def columns(self) -> int:
        """Number of columns of its input rows."""
        return self.weight.size

    def apply(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the norm of rows [..., columns] in float64, for code that does not use the kernels."""
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # what is not finite stays so
            if self.bias is not None:
                x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.eps) * self.weight
            return x if self.bias is None else x + self.bias


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of queries and keys, both of one kind: per head (Qwen 3), or over all heads together (OLMo 2).

    Attributes:
        query, key: Norms with one weight for all heads, or one for each.
        is_whole: Whether each norm is an RMSNorm over all heads together.
        is_last: Whether they are applied after the rotation (Hunyuan), not before.
        has_values: Whether values are normalised, too, by an RMSNorm without a weight (Gemma 4).
    """

    query: NormWeight
    key: NormWeight
    is_whole: bool = False
    is_last: bool = False
    has_values: bool = False

    def check(self, heads: QkvHeads) -> None:
        """Check the sizes against those of the heads.

        Raises:
            ValueError: if a norm has another size, or the two are of different kinds.
        """
        query, key = self.query, self.key
        if (query.bias is None) != (key.bias is None) or query.eps != key.eps:
            raise ValueError("the norms of queries and of keys must be of one kind")
        if self.is_whole and (query.bias is not None or self.is_last):
            raise ValueError("a norm over all heads must be an RMSNorm before the rotation")
        if self.has_values and (self.is_whole or query.bias is not None):
            raise ValueError("values are normalised with the RMSNorms of single heads")
        is_each = self.is_whole or query.columns != heads.head_dim
        for norm, num_rows in zip((query, key), heads.rows, strict=False):
            expected = num_rows if is_each else heads.head_dim
            if norm.columns != expected:
                raise ValueError(f"a norm must have {expected} elements, got {norm.columns}")
