"""Attention of one prompt over contiguous keys and values, by torch's fused kernels.

These are cuDNN's, and those of FlashAttention-2 (Dao, 2023).

cuDNN makes a plan for each new shape. That takes the host tens of milliseconds, and torch keeps the plan for
the life of the thread. Shapes are therefore rounded to few, and the parts of the keys are merged:

    keys     | prefix: pieces of 2^n rows, all seen | lead | chunk | zeros |
    queries                                         | lead | chunk | any   |

The mask of cuDNN, as torch calls it, begins at the first query and the first key. The causal part therefore
has the lead's queries too, whose results are not used; so is what the padding of queries computes. Keys of
the padding are seen by its queries only. With chunks of 4,096 tokens at most, and contexts of 131,072, there
are at most 36 causal plans (of 1 to 20 tiles, with sums if there is a prefix) and 36 of pieces (of 1 to 4
tiles of queries and 2^0 to 2^8 of keys).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.ops.cuda_errors import is_out_of_memory
from tgi_asgi.ops.layout import round_up

logger = logging.getLogger(__name__)

TILE = 256  # rows that shapes are rounded to
# Queries of a piece's plan: bounds the plans, and the memory of parts to merge. On an H200 these are two
# blocks per SM of a model with 32 heads.
_MAX_QUERIES = 1024
# Error of a trial: results and weights are rounded to bfloat16, 2^-9 each.
_TOLERANCE = 0.02

_aten: Any = torch.ops.aten
_kernels: Any = torch.ops.tgi_cuda


class Library(StrEnum):
    """Libraries in torch, the preferred first (8,192 tokens on an H200, copies included: 0.95 and 1.8 ms)."""

    CUDNN = "cuDNN"
    FLASH = "FlashAttention-2"


@dataclass(frozen=True, slots=True)
class Split:
    """The parts of a prompt's keys."""

    pieces: tuple[tuple[int, int], ...]  # (first key, number of keys) that all queries see
    first: int  # first key of the causal part
    lead: int  # its keys before the first query's own
    rows: int  # its number of keys and queries, a multiple of TILE


def split(num_tokens: int, context_len: int) -> Split:
    """Split the keys of a prompt whose last `num_tokens` are queries.

    A lead costs half its square, so it may be up to a quarter of the chunk before a smaller piece pays.
    """
    step = _max_lead(num_tokens)
    whole = (context_len - num_tokens) // step * step
    pieces, first = [], 0
    while first < whole:
        size = 1 << ((whole - first).bit_length() - 1)
        pieces.append((first, size))
        first += size
    return Split(tuple(pieces), whole, context_len - num_tokens - whole, padded(context_len - whole))


def num_calls(library: Library, num_tokens: int, context_len: int) -> int:
    """Return the number of the library's calls for a prompt."""
    if library is Library.FLASH:
        return 1
    return 1 + len(split(num_tokens, context_len).pieces) * -(-num_tokens // _MAX_QUERIES)


def padded(num_rows: int) -> int:
    """Return the number of rows, rounded up to whole tiles."""
    return round_up(num_rows, TILE)


def staging_rows(max_tokens: int) -> int:
    """Return the number of rows that queries need in `Workspace.queries`."""
    return padded(_max_lead(max_tokens) + max_tokens) + TILE


def _max_lead(num_tokens: int) -> int:
    """Return a bound of the lead, a power of two of at least TILE."""
    return max(TILE, 1 << (num_tokens.bit_length() - 1) >> 2)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory that layers share."""

    kv: Tensor  # [2 (key, value), num_kv_heads, capacity, head_dim], a multiple of TILE rows
    queries: Tensor  # [staging_rows, num_heads, head_dim]


def attend(
    library: Library, query: Tensor, lengths: tuple[int, int], space: Workspace, scale: float,
    value_scale: float, first: int, out: Tensor,
) -> None:  # fmt: skip
    """Attend the last tokens of a sequence, whose keys and values are in `space.kv`, padded with zeros.

    Args:
        query, out: [n_tokens, num_heads, head_dim]; the sequence's rows begin at `first`.
        lengths: Tokens in `query`, and tokens in total.
        scale: Factor of the scores.
        value_scale: Factor of the result.
    """
    num_tokens, context_len = lengths
    rows = out[first : first + num_tokens]
    if library is Library.FLASH:
        keys, values = space.kv[:, None, :, :context_len]
        # Its causal mask ends at the last query and the last key, unlike that of the function of
        # torch.nn.functional.
        attended = _aten._scaled_dot_product_flash_attention(
            _heads_first(query[first : first + num_tokens]), keys, values, 0.0, True, False, scale=scale
        )
        torch.mul(_rows_first(attended[0]), value_scale, out=rows)
        return
    parts = split(num_tokens, context_len)
    needed = max(parts.rows, parts.lead + padded(num_tokens))
    if parts.lead > 0 or first + needed > query.shape[0]:
        space.queries[parts.lead : parts.lead + num_tokens].copy_(query[first : first + num_tokens])
        query, first = space.queries, 0
    causal = (parts.first, parts.rows)
    has_pieces = bool(parts.pieces)
    whole, sums = _cudnn(query[first : first + parts.rows], space.kv, causal, scale, True, has_pieces)
    whole = whole[parts.lead : parts.lead + num_tokens]
    if not has_pieces:
        torch.mul(whole, value_scale, out=rows)
        return
    sums, first = sums[:, parts.lead : parts.lead + num_tokens], first + parts.lead
    for start in range(0, num_tokens, _MAX_QUERIES):
        count = min(_MAX_QUERIES, num_tokens - start)
        asking = query[first + start : first + start + padded(count)]
        found = [_cudnn(asking, space.kv, piece, scale, False, True) for piece in parts.pieces]
        _kernels.attention_merge(
            [whole[start : start + count], *(of_piece[:count] for of_piece, _ in found)],
            [sums[:, start : start + count], *(of_piece[:, :count] for _, of_piece in found)],
            value_scale, rows[start : start + count],
        )  # fmt: skip


def _cudnn(
    query: Tensor, kv: Tensor, keys: tuple[int, int], scale: float, is_causal: bool, has_sums: bool
) -> tuple[Tensor, Tensor]:
    """Return attention [rows, num_heads, head_dim] over some keys, and the logarithms of its sums.

    The latter are [num_heads, rows] float32, and empty unless `has_sums`. Strides depend on no length: they
    are part of the plan's key.
    """
    first, count = keys
    some_keys, values = kv[:, None, :, first : first + count]
    attended, sums, *_ = _aten._scaled_dot_product_cudnn_attention(
        _heads_first(query), some_keys, values, None, has_sums, 0.0, is_causal, False, scale=scale
    )
    return _rows_first(attended).contiguous(), sums.view(query.shape[1], -1) if has_sums else sums


def _heads_first(rows: Tensor) -> Tensor:
    """Return [rows, heads, dim] as torch's [1, heads, rows, dim]."""
    return rows.transpose(0, 1)[None]


def _rows_first(attended: Tensor) -> Tensor:
    return attended[0].transpose(0, 1)


def choose_library(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Library | None:
    """Return the first library that computes prompts of these shapes rightly here; None: none does."""
    for library in Library:
        why_not = _try(library, num_heads, num_kv_heads, head_dim, dtype, device)
        if why_not is None:
            logger.info("prompts may use torch's attention by %s", library)
            return library
        logger.info("prompts do not use torch's attention by %s: %s", library, why_not)
    return None


def _try(
    library: Library, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    device: torch.device,
) -> str | None:  # fmt: skip
    """Compute a prompt after a prefix and one without; return what is wrong."""
    num_tokens, generator = 300, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, kv = draw(3 * TILE, num_heads, head_dim), draw(2, num_kv_heads, 4 * TILE, head_dim)
    space = Workspace(kv, draw(staging_rows(num_tokens), num_heads, head_dim))
    out = torch.empty_like(query)
    for context_len, first in ((900, 10), (num_tokens, 0)):
        kv[:, :, context_len:] = 0
        try:
            attend(library, query, (num_tokens, context_len), space, head_dim**-0.5, 2.0, first, out)
            found = out[first : first + num_tokens].float()
            wanted = _expected(query[first : first + num_tokens], kv[:, :, :context_len])
            error = float((found - 2 * wanted).norm() / (2 * wanted).norm())
        except RuntimeError as refusal:
            if is_out_of_memory(refusal):
                raise
            return str(refusal).partition("\n")[0].partition(". ")[0]
        if not error < _TOLERANCE:  # NaN neither
            return f"its results are wrong by {error:.2g}"
    return None


def _expected(query: Tensor, kv: Tensor) -> Tensor:
    """Compute attention in float32, by its definition."""
    num_tokens, num_heads, head_dim = query.shape
    keys, values = kv.float().repeat_interleave(num_heads // kv.shape[1], 1)
    scores = torch.einsum("qhd,hkd->hqk", query.float(), keys) * head_dim**-0.5
    context_len = keys.shape[1]
    seen = torch.ones(num_tokens, context_len, dtype=torch.bool, device=query.device)
    hidden = ~seen.tril(context_len - num_tokens)
    return torch.einsum("hqk,hkd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
