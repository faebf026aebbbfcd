"""The operator `attention`: paged, variable-length, causal; one for prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.recorded import Recorded


@dataclass(frozen=True, slots=True)
class AttentionTables:
    """Which queries belong to which sequence, and where its keys and values lie.

    A sequence's queries are its last tokens: query i of n attends to the first `context_len - n + i + 1`
    positions.
    """

    query_start: Tensor  # [n_sequences + 1] int32, ascending from 0 to n_tokens
    context_len: Tensor  # [n_sequences] int32, the step's own tokens included
    block_table: Tensor  # [n_sequences, max_blocks] int32; entries past a context are not read


def attention(
    q: Tensor, kv: KvLayer, tables: AttentionTables, scale: float, window: int | None = None
) -> Tensor:
    """Attend q [n_tokens, num_heads, head_dim] float32 to the cache; scores are multiplied by `scale`.

    With a window, a query sees only so many positions, its own the last. The CPU's kernels have none: they
    take contexts within it, where there is no difference.

    Returns an activation [n_tokens, num_heads * head_dim]. A row's bits depend on its own sequence only:
    not on the batch, on how its prompt was cut, on block ids or on threads. Chunks of 256 positions are
    reduced alone and merged in order (Dao, FlashAttention, section 3.1; flash-decoding).

    Raises:
        RuntimeError: lengths do not fit together, or a block id is not in the pool.
        ValueError: a context goes beyond the window, on a CPU.
    """
    if isinstance(q, Recorded):
        return q.program.record_attention(q, kv, scale, window)
    if window is not None and tables.context_len.numel() > 0:
        check_window(window, int(tables.context_len.max()))
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=torch.float32)
    torch.ops.tgi.attention(
        q, kv.pool, tables.query_start, tables.context_len, tables.block_table, kv.block_size, scale, out
    )  # fmt: skip
    return out


def check_window(window: int | None, longest: int) -> None:
    """Refuse contexts beyond a window that is not computed."""
    if window is not None and longest > window:
        raise ValueError(f"contexts of {longest} tokens are beyond the window of {window}")


@meta_of("attention")
def _attention_meta(
    q: Tensor,
    kv: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    block_size: int,
    scale: float,
    out: Tensor,
) -> None:
    require(out.shape == (q.shape[0], q.shape[1] * q.shape[2]))
