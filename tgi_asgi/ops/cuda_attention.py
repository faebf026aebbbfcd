"""Prompt attention by torch's `scaled_dot_product_attention`, instead of the native kernel.

A sequence's keys and values are first gathered from its blocks into contiguous memory, which costs one read
and one write of them. torch then uses FlashAttention-2 (Dao, 2023). Lengths come from the host, so graphs
cannot contain these calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_kv import CudaKvLayer


class PromptAttention(StrEnum):
    """Implementation of prompt attention on a GPU; the values are those of `--prompt-attention`."""

    PAGED = "paged"  # the native kernel
    SDPA = "sdpa"  # torch, over gathered keys and values: this module
    FLASHINFER = "flashinfer"  # `cuda_flashinfer.py`


def can_gather(spec: AttentionSpec) -> bool:
    """Return whether torch's fused kernels support this: causal attention whose scores are only scaled."""
    others = (spec.window, spec.chunk, spec.soft_cap, spec.sinks, spec.slopes)
    return all(each is None for each in others)


class GatheredAttention:
    """One layer's attention of prompts.

        attention = GatheredAttention(layer, spec.scale, gathered, converted)
        attention.attend(query, block_table, first, lengths, out)

    Args:
        gathered: Buffer [max_blocks * elements of a block] of the pool's dtype; layers may share it.
        converted: The same buffer in the queries' dtype; `gathered` itself if the dtypes are equal.
    """

    def __init__(self, layer: CudaKvLayer, scale: float, gathered: Tensor, converted: Tensor) -> None:
        from torch.nn.attention.bias import causal_lower_right  # takes 1.5 s: it imports torch's compiler

        self._bias = causal_lower_right
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN would make a plan for each new prompt length
        self._layer, self._scale = layer, scale
        self._gathered, self._converted = gathered, converted

    def attend(
        self,
        query: Tensor,
        block_table: Tensor,
        first: int,
        lengths: Sequence[tuple[int, int]],
        out: Tensor,
    ) -> None:
        """Attend one sequence at a time.

        Args:
            query, out: [n_tokens, num_heads, head_dim].
            block_table: [n_sequences or more, n_columns] int32.
            first: Index of the first sequence's first token.
            lengths: (tokens in `query`, tokens in total) of each sequence; both at least 1.
        """
        for index, (num_tokens, context_len) in enumerate(lengths):
            keys, values = self._gather(block_table[index], context_len)
            # torch allocates a tensor [num_tokens, context_len] for this bias, but never writes or reads it.
            bias = None if num_tokens == context_len else self._bias(num_tokens, context_len)
            # Scales of an FP8 cache: the keys' scale is applied to the scores, the values' scale to the
            # result.
            attended = torch.nn.functional.scaled_dot_product_attention(
                query[first : first + num_tokens].transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=bias,
                is_causal=bias is None,
                scale=self._scale * self._layer.key_scale,
                enable_gqa=True,
            )  # [1, num_heads, num_tokens, head_dim]
            rows = attended[0].transpose(0, 1)
            torch.mul(rows, self._layer.value_scale, out=out[first : first + num_tokens])
            first += num_tokens

    def _gather(self, row: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [num_kv_heads, context_len, head_dim] of a sequence, until the next call."""
        pool = self._layer.pool
        _, _, num_kv_heads, block_size, head_dim = pool.shape
        num_blocks = -(-context_len // block_size)
        shape = (2, num_kv_heads, num_blocks, block_size, head_dim)
        size = num_blocks * pool[0].numel()
        # Moves eight bytes at a time: index_select's cost per element does not depend on the element's size.
        words = pool.view(torch.int64).permute(1, 2, 0, 3, 4)
        gathered = self._gathered[:size].view(shape)
        torch.index_select(words, 2, row[:num_blocks], out=gathered.view(torch.int64))
        converted = self._converted[:size].view(shape)
        if self._converted is not self._gathered:
            converted.copy_(gathered)
        keys, values = converted.view(2, num_kv_heads, num_blocks * block_size, head_dim)[:, :, :context_len]
        return keys, values
