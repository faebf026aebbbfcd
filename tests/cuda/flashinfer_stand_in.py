"""A stand-in for FlashInfer on a machine without a GPU, by the signatures and documentation of 0.7.2.

It asserts what the package requires of its arguments, and of the order of calls.
"""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

MAX_IN_FLIGHT = 2


class BatchPrefillWithPagedKVCacheWrapper:
    """Attention of several prompts' ends over paged keys and values; only what the server calls."""

    # Plans so far, with the kind of attention. A plan is copied to the GPU from memory of its
    # wrapper, which must not be planned again before the step has run.
    planned: ClassVar[list[tuple[tuple[int, float], BatchPrefillWithPagedKVCacheWrapper]]]
    num_runs = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert (float_workspace_buffer.dtype, kv_layout) == (torch.uint8, "HND")

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        """Note what the runs until the next plan compute."""
        kind = (window_left, logits_soft_cap or 0.0)
        alike = [wrapper for other, wrapper in type(self).planned if other == kind]
        assert self not in alike[-MAX_IN_FLIGHT:], "the plan before may still be on its way to the GPU"
        type(self).planned.append((kind, self))
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert tensor.dtype is torch.int32 and tensor.dim() == 1
        assert causal and num_qo_heads % num_kv_heads == 0 and head_dim_qk in (64, 128, 256)
        self._starts = qo_indptr.tolist()
        self._of_pages = paged_kv_indptr.tolist()
        self._pages = paged_kv_indices.clone().long()
        self._last = paged_kv_last_page_len.tolist()
        assert self._of_pages[-1] == len(self._pages) and all(0 < n <= page_size for n in self._last)
        self._sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self._window_left, self._soft_cap = window_left, logits_soft_cap or 0.0
        self._types = (q_data_type, kv_data_type or q_data_type)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor,
        *,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend in float64."""
        alike = [
            wrapper for kind, wrapper in type(self).planned if kind == (self._window_left, self._soft_cap)
        ]
        assert alike[-1] is self, "not the plan of this step"
        type(self).num_runs += 1
        heads, kv_heads, head_dim, page_size = self._sizes
        assert (
            q.shape == (self._starts[-1], heads, head_dim) and (q.dtype, paged_kv_cache.dtype) == self._types
        )
        assert paged_kv_cache.shape[1:] == (2, kv_heads, page_size, head_dim)
        out = torch.empty_like(q) if out is None else out
        assert out.is_contiguous() and out.shape == q.shape
        for i, last in enumerate(self._last):
            pages = self._pages[self._of_pages[i] : self._of_pages[i + 1]]
            rows = slice(self._starts[i], self._starts[i + 1])
            length = (len(pages) - 1) * page_size + last
            kept = (
                paged_kv_cache[pages].double().permute(1, 2, 0, 3, 4)
            )  # [2, kv_heads, pages, page_size, dim]
            keys, values = kept.reshape(2, kv_heads, -1, head_dim)[:, :, :length]
            query = q[rows].double().view(-1, kv_heads, heads // kv_heads, head_dim)
            scores = torch.einsum("qkgd,ktd->kgqt", query, keys) * self._scale * (k_scale or 1.0)
            if self._soft_cap:
                scores = self._soft_cap * (scores / self._soft_cap).tanh()
            at = torch.arange(length - len(query), length)[:, None]
            hidden = torch.arange(length) > at
            if self._window_left >= 0:
                hidden |= torch.arange(length) < at - self._window_left
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[rows] = (
                (torch.einsum("kgqt,ktd->qkgd", weights, values) * (v_scale or 1.0)).flatten(1, 2).to(q.dtype)
            )
        return out


def make_module() -> ModuleType:
    """Return the module `flashinfer`, which counts from now on."""

    class Counting(BatchPrefillWithPagedKVCacheWrapper):
        planned: ClassVar[list[tuple[tuple[int, float], BatchPrefillWithPagedKVCacheWrapper]]] = []
        num_runs = 0

    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Counting  # type: ignore[attr-defined]
    return module
