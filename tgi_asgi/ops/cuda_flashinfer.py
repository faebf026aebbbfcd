"""Prompt attention by FlashInfer, directly on the paged pools, instead of the native kernel.

FlashInfer (Ye et al., 2025) splits the work of a step's prompts over the GPU once, on the host (`plan`), and
every layer of the same kind runs that plan (`run`). Its "HND" layout of a paged cache is `CudaKvLayer.pool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_kv import CudaKvLayer

_HEAD_DIMS = (64, 128, 256)  # FlashInfer's prefill kernels are compiled for these
# A plan is copied to the GPU from pinned memory of its wrapper, which the next plan overwrites. Two steps are
# in flight, and a failed step may have left its copy queued after them.
_NUM_WRAPPERS = 3
_WORKSPACE_BYTES = 256 << 20  # partial results of split prompts; FlashInfer advises 128 MiB or more


def can_plan(spec: AttentionSpec, head_dim: int) -> bool:
    """Return whether FlashInfer's prefill kernels compute this attention."""
    others = (spec.chunk, spec.sinks, spec.slopes)
    return head_dim in _HEAD_DIMS and all(each is None for each in others)


class FlashInfer:
    """The package, and the device memory that its plans share, since they run one after another.

    Raises:
        ImportError: if the package flashinfer-python is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        import flashinfer

        self._make: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def wrappers(self) -> list[Any]:
        """Return wrappers that hold the plans of one kind of attention in turn."""
        return [self._make(self._workspace, "HND") for _ in range(_NUM_WRAPPERS)]


class PlannedAttention:
    """Prompt attention of all layers with one spec.

        attention = PlannedAttention(package, spec, layer.pool, query)
        attention.plan(block_table, lengths)  # once per step
        attention.attend(layer, query, first, out)  # once per layer

    Args:
        pool: Pool of any of the layers.
        query: Queries of any step, [n_tokens, num_heads, head_dim].
    """

    def __init__(self, package: FlashInfer, spec: AttentionSpec, pool: Tensor, query: Tensor) -> None:
        self._wrappers = package.wrappers()
        self._num_plans = 0
        self._num_tokens = 0  # of the planned step
        self._spec, self._pool, self._query = spec, pool, query

    def plan(self, block_table: Tensor, lengths: Sequence[tuple[int, int]]) -> None:
        """Plan a step's prompts, at least one.

        Args:
            block_table: [n_prompts or more, n_columns] int32, on the device.
            lengths: For each prompt, its tokens in this step and its tokens up to the end of this step.
        """
        self._num_plans += 1
        _, _, num_kv_heads, block_size, head_dim = self._pool.shape
        starts, of_pages, pages, last = [0], [0], [], []
        for row, (num_tokens, context_len) in zip(block_table, lengths, strict=False):
            num_blocks = -(-context_len // block_size)
            starts.append(starts[-1] + num_tokens)
            of_pages.append(of_pages[-1] + num_blocks)
            pages.append(row[:num_blocks])
            last.append(context_len - (num_blocks - 1) * block_size)
        self._num_tokens = starts[-1]
        spec = self._spec
        self._wrapper.plan(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(of_pages, dtype=torch.int32),
            torch.cat(pages),
            torch.tensor(last, dtype=torch.int32),
            self._query.shape[1],
            num_kv_heads,
            head_dim,
            block_size,
            causal=True,
            sm_scale=spec.scale,
            window_left=-1 if spec.window is None else spec.window - 1,  # FlashInfer does not count the query
            logits_soft_cap=spec.soft_cap or 0.0,
            q_data_type=self._query.dtype,
            kv_data_type=self._pool.dtype,
        )

    def attend(self, layer: CudaKvLayer, query: Tensor, first: int, out: Tensor) -> None:
        """Compute one layer as planned.

        Args:
            query, out: [n_tokens, num_heads, head_dim].
            first: Index of the first prompt's first token.
        """
        rows = slice(first, first + self._num_tokens)
        scales = {}
        if (layer.key_scale, layer.value_scale) != (1.0, 1.0):
            scales = {"k_scale": layer.key_scale, "v_scale": layer.value_scale}
        self._wrapper.run(query[rows], layer.pool, out=out[rows], **scales)

    @property
    def _wrapper(self) -> Any:
        return self._wrappers[self._num_plans % _NUM_WRAPPERS]
