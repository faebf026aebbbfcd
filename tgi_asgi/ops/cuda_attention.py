"""Attention of prompts by torch's `scaled_dot_product_attention`, in the place of our kernel.

A sequence's keys and values are gathered from its blocks to one piece of memory first, which costs one read
and one write of them; what torch then takes is FlashAttention-2 (Dao, 2023). Lengths are the host's, so no
graph has these calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_kv import CudaKvLayer


class PromptAttention(StrEnum):
    """What computes the attention of prompts on a GPU; values are those of `--prompt-attention`."""

    PAGED = "paged"  # the project's kernel
    SDPA = "sdpa"  # torch, over copies of keys and values: this module
    FLASHINFER = "flashinfer"  # `cuda_flashinfer.py`


def can_gather(spec: AttentionSpec) -> bool:
    """Tell whether torch's fused kernels attend so: to all before, by scores that are only scaled."""
    others = (spec.window, spec.chunk, spec.soft_cap, spec.sinks, spec.slopes)
    return all(each is None for each in others)


class GatheredAttention:
    """One layer's attention of prompts.

        attention = GatheredAttention(layer, spec.scale, kept, room)
        attention.attend(query, block_table, first, lengths, out)

    Args:
        kept: [max_blocks * elements of a block], of the pool's dtype; layers may share it.
        room: the same of the dtype of queries; `kept` itself where these are one.
    """

    def __init__(self, layer: CudaKvLayer, scale: float, kept: Tensor, room: Tensor) -> None:
        from torch.nn.attention.bias import causal_lower_right  # a second and a half, of torch's compiler

        self._bias = causal_lower_right
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each new length of a prompt
        self._layer, self._scale = layer, scale
        self._kept, self._room = kept, room

    def attend(
        self,
        query: Tensor,
        block_table: Tensor,
        first: int,
        lengths: Sequence[tuple[int, int]],
        out: Tensor,
    ) -> None:
        """Attend sequence after sequence.

        Args:
            query, out: [n_tokens, num_heads, head_dim].
            block_table: [n_sequences or more, n_columns] int32.
            first: the first sequence's first token.
            lengths: tokens of each sequence in `query`, and of all of it; both at least 1.
        """
        for index, (num_tokens, context_len) in enumerate(lengths):
            keys, values = self._gather(block_table[index], context_len)
            # torch makes a tensor [num_tokens, context_len] of this bias, which nobody writes or reads.
            bias = None if num_tokens == context_len else self._bias(num_tokens, context_len)
            # The scales of an FP8 cache: that of keys is in the scores', that of values in the result's.
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
        """Return a sequence's keys and values, each [num_kv_heads, context_len, head_dim]; until the next."""
        pool = self._layer.pool
        _, _, num_kv_heads, block_size, head_dim = pool.shape
        num_blocks = -(-context_len // block_size)
        shape = (2, num_kv_heads, num_blocks, block_size, head_dim)
        size = num_blocks * pool[0].numel()
        # Eight bytes at a time: an element costs index_select as much, whatever its size.
        words = pool.view(torch.int64).permute(1, 2, 0, 3, 4)
        kept = self._kept[:size].view(shape)
        torch.index_select(words, 2, row[:num_blocks], out=kept.view(torch.int64))
        room = self._room[:size].view(shape)
        if self._room is not self._kept:
            room.copy_(kept)
        keys, values = room.view(2, num_kv_heads, num_blocks * block_size, head_dim)[:, :, :context_len]
        return keys, values
