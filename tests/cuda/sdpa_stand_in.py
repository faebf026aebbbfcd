"""torch's fused attention on CPU tensors, for the emulation: in float64, by torch's signatures.

It refuses what cuDNN or torch's wrapper refuse, and its results past the causal mask's corner are as theirs:
cuDNN's mask begins at the first query and key, FlashAttention-2's ends at the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SdpaStandIn:
    """Both operators for CPUs while it is kept.

    Attributes:
        plans: Keys of the plans that cuDNN would have made.
        calls: Names of the libraries, in the order of calls.
        refuses: Names of libraries that raise.
        reason: What they say.
        is_wrong: Whether cuDNN's sums are wrong.
    """

    def __init__(self) -> None:
        self.plans: set[tuple[Any, ...]] = set()
        self.calls: list[str] = []
        self.refuses: set[str] = set()
        self.reason = "is not for these\nof course"
        self.is_wrong = False
        self._library = torch.library.Library("aten", "IMPL")
        self._library.impl("_scaled_dot_product_cudnn_attention", self._cudnn, "CPU")
        self._library.impl("_scaled_dot_product_flash_attention", self._flash, "CPU")

    def close(self) -> None:
        self._library._destroy()

    def _cudnn(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, has_sums: bool,
        dropout: float = 0.0, is_causal: bool = False, has_mask: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert (bias, dropout, has_mask) == (None, 0.0, False)
        self._note("cudnn", query, key, value)
        shapes = [(each.shape, each.stride()) for each in (query, key, value)]
        self.plans.add((*shapes, is_causal, has_sums))
        out, sums = _attend(query, key, value, scale, 0 if is_causal else None)
        sums = sums + 1 * (self.is_wrong and is_causal)
        return self._results(out, sums[..., None] if has_sums else torch.empty(0))

    def _flash(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, is_causal: bool = False,
        has_mask: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert (dropout, is_causal, has_mask) == (0.0, True, False)
        self._note("flash", query, key, value)
        return self._results(*_attend(query, key, value, scale, key.shape[2] - query.shape[2]))

    def _note(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        if name in self.refuses:
            raise RuntimeError(f"{name} {self.reason}")
        self.calls.append(name)
        for each in (query, key, value):
            assert each.dim() == 4 and each.stride(3) == 1 and each.data_ptr() % 16 == 0
            assert all(stride * each.itemsize % 16 == 0 for stride in each.stride()[:3])

    def _results(self, out: Tensor, sums: Tensor) -> tuple[Any, ...]:
        none = torch.empty(0)
        return out, sums, none, none, 0, 0, none, none, none


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """Return attention in the query's layout, and the logarithms of sums [1, heads, queries]."""
    group = query.shape[1] // key.shape[1]
    keys, values = (each.double().repeat_interleave(group, 1) for each in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if diagonal is not None:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(diagonal)
        scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.empty_like(query)
    out.copy_(scores.softmax(-1) @ values)
    return out, scores.logsumexp(-1).float()
