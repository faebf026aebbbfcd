"""Prompt attention by torch's fused kernels (`cuda_sdpa.py`), instead of the native kernel.

A sequence's keys and values are first gathered from its blocks into contiguous memory, which costs one read
and one write of them. Lengths come from the host, so graphs cannot contain these calls.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.ops import cuda_sdpa
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_errors import is_out_of_memory
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_sdpa import Library, Workspace

logger = logging.getLogger(__name__)

_kernels: Any = torch.ops.tgi_cuda

# `attention_prefill` of consecutive sequences, which writes rows of `out`:
# paged(query, query_start, context_len, block_table, max_query_len, out)
Paged = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor], None]


class PromptAttention(StrEnum):
    """Implementation of prompt attention on a GPU; the values are those of `--prompt-attention`."""

    AUTO = "auto"  # torch for prompts that are long enough, the native kernel for others
    PAGED = "paged"  # the native kernel
    SDPA = "sdpa"  # torch, over gathered keys and values: this module
    FLASHINFER = "flashinfer"  # `cuda_flashinfer.py`


def can_gather(spec: AttentionSpec) -> bool:
    """Return whether torch's fused kernels support this: causal attention whose scores are only scaled."""
    others = (spec.window, spec.chunk, spec.soft_cap, spec.sinks, spec.slopes)
    return all(each is None for each in others)


@dataclass(frozen=True, slots=True)
class Gathering:
    """The library that computes prompts, and which prompts those are.

    Attributes:
        min_tokens: Fewest tokens of a step. Fewer leave tiles of the library empty, and gathering costs as
            much as is gained: on an H200 2 ns a key, against 44 ps a query and key.
        min_pairs: Fewest pairs of a query and a key that it sees, for each call of the library: these take
            the host 0.15 ms. On an H200 (32 heads of 128) a prompt of 8,192 tokens takes cuDNN 0.95 ms and
            the native kernel 2.4, one of 2,048 tokens 0.17 and 0.20; but 512 tokens after 7,680, which are
            five calls, 0.77 and 0.30.
    """

    library: Library
    min_tokens: int = 128
    min_pairs: int = 1 << 21

    def takes(self, num_tokens: int, context_len: int) -> bool:
        """Return whether the library computes a prompt's last tokens, not the native kernel."""
        num_pairs = num_tokens * (2 * context_len - num_tokens + 1) // 2
        if num_tokens < self.min_tokens:
            return False
        return num_pairs >= self.min_pairs * cuda_sdpa.num_calls(self.library, num_tokens, context_len)


def choose_gathering(query: Tensor, num_kv_heads: int, *, is_wanted: bool) -> Gathering | None:
    """Choose a library by a trial; None: none computes these shapes here.

    Args:
        query: Queries of any step, [n_tokens, num_heads, head_dim].
        is_wanted: Whether the library computes every prompt, also short ones.

    Raises:
        ModelLoadError: if it is wanted and there is none.
    """
    _, num_heads, head_dim = query.shape
    library = cuda_sdpa.choose_library(num_heads, num_kv_heads, head_dim, query.dtype, query.device)
    if library is not None:
        return Gathering(library, 1, 1) if is_wanted else Gathering(library)
    if is_wanted:
        raise ModelLoadError(
            "--prompt-attention sdpa: no attention of this torch computes this model's shapes on this GPU "
            "(the log says why): use auto or paged"
        )
    return None


def workspace_shapes(
    layer: CudaKvLayer, max_blocks: int, queries: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a `Workspace`'s tensors.

    Args:
        max_blocks: Blocks of the longest context.
        queries: Shape of the queries of the largest step.
    """
    max_tokens, num_heads, head_dim = queries
    _, _, num_kv_heads, block_size, _ = layer.pool.shape
    rows = cuda_sdpa.padded(max_blocks * block_size)
    return (2, num_kv_heads, rows, head_dim), (cuda_sdpa.staging_rows(max_tokens), num_heads, head_dim)


class GatheredAttention:
    """One layer's attention of prompts.

        attention = GatheredAttention(gathering, layer, spec.scale, space, paged)
        attention.attend(query, block_table, query_start, context_len, first, lengths, out)

    Args:
        space: Memory for the longest context and the longest step.
        paged: The native kernel, for prompts that the library does not take.
    """

    def __init__(
        self, gathering: Gathering, layer: CudaKvLayer, scale: float, space: Workspace, paged: Paged
    ) -> None:
        self._gathering, self._layer, self._scale, self._space = gathering, layer, scale, space
        self._paged = paged
        self._is_refused = False

    def attend(
        self, query: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor, first: int,
        lengths: Sequence[tuple[int, int]], out: Tensor,
    ) -> None:  # fmt: skip
        """Attend one sequence at a time, except neighbours that the native kernel computes.

        Args:
            query, out: [n_tokens, num_heads, head_dim].
            block_table: [n_sequences, n_columns] int32.
            query_start, context_len: [n_sequences + 1] and [n_sequences] int32, as the native kernel reads
                them.
            first: Index of the first sequence's first token.
            lengths: (tokens in `query`, tokens in total) of each sequence; both at least 1.
        """
        waiting = 0  # sequences from here on are the native kernel's
        for index, (num_tokens, in_total) in enumerate(lengths):
            if not self._is_refused and self._gathering.takes(num_tokens, in_total):
                self._attend_paged(query, block_table, query_start, context_len, lengths, waiting, index, out)
                found = self._try_gathered(query, block_table[index], first, (num_tokens, in_total), out)
                waiting = index + found
            first += num_tokens
        last = len(lengths)
        self._attend_paged(query, block_table, query_start, context_len, lengths, waiting, last, out)

    def _attend_paged(
        self, query: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor,
        lengths: Sequence[tuple[int, int]], first: int, stop: int, out: Tensor,
    ) -> None:  # fmt: skip
        """Attend some of the sequences by the native kernel."""
        if first < stop:
            longest = max(num_tokens for num_tokens, _ in lengths[first:stop])
            starts, tables = query_start[first : stop + 1], block_table[first:stop]
            self._paged(query, starts, context_len[first:stop], tables, longest, out)

    def _try_gathered(
        self, query: Tensor, row: Tensor, first: int, lengths: tuple[int, int], out: Tensor
    ) -> bool:
        """Attend one sequence; return False, now and for all later prompts, if the library refuses it."""
        try:
            self._attend_gathered(query, row, first, lengths, out)
        except RuntimeError as refusal:  # the trial at load had other lengths
            if is_out_of_memory(refusal):
                raise
            self._is_refused = True
            _warn_of(self._gathering.library, lengths, str(refusal).partition("\n")[0])
        return not self._is_refused

    def _attend_gathered(
        self, query: Tensor, row: Tensor, first: int, lengths: tuple[int, int], out: Tensor
    ) -> None:
        layer, space = self._layer, self._space
        context_len = lengths[1]
        _kernels.attention_gather(layer.pool, row, context_len, cuda_sdpa.padded(context_len), space.kv)
        # Scales of an FP8 cache: the keys' scale is applied to the scores, the values' to the result.
        cuda_sdpa.attend(
            self._gathering.library, query, lengths, space, self._scale * layer.key_scale, layer.value_scale,
            first, out,
        )  # fmt: skip


@functools.cache  # once, not for every layer
def _warn_of(library: Library, lengths: tuple[int, int], refusal: str) -> None:
    num_tokens, in_total = lengths
    logger.warning(
        "prompts use the native kernel from now on: %s refused %d tokens of %d: %s",
        library, num_tokens, in_total, refusal,
    )  # fmt: skip
