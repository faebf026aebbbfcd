"""Attention by torch's own functions over a paged cache, for what no native kernel computes.

A step is cut into pieces that fit a memory limit: some sequences, padded to the longest of them, or some
queries of one. Each piece gathers its keys and values, and attends with a mask. Queries of a KV head's group
lie one behind the other, so that no key is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops.attention_spec import AttentionSpec

_MAX_SCORES = 1 << 26  # of a piece, over all heads: 256 MB in float32
_MAX_GATHERED = 1 << 27  # numbers of a piece's keys and values; those of one sequence may be more

_Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some queries of some sequences.

    Padding of queries repeats the step's first; padding of keys, which nothing sees, a sequence's last: other
    memory may hold what sequences of other clients have left.
    """

    tokens: Tensor  # [n, max_queries] int64, indices in the step
    positions: Tensor  # [n, max_queries] int64
    until: Tensor  # [n, max_queries] int64, the end of what a query sees
    blocks: Tensor  # [n, max_keys] int64, the block of each key
    offsets: Tensor  # [n, max_keys] int64, and where it is in the block
    places: Tensor  # [num_queries] int64, indices of the queries in the flattened `tokens`


class PaddedSteps:
    """A step's sequences.

        step = PaddedSteps(device, query_start, context_len, block_table, visible_until)
        out = step.attend(keys, values, q, spec, sinks, slopes)

    Args:
        query_start: [n_sequences + 1].
        context_len: [n_sequences], the tokens of each sequence including those of this step.
        block_table: [n_sequences, n_columns].
        visible_until: [n_tokens], see `PagedAttention.begin`; None: a token sees none that is later.
    """

    def __init__(
        self, device: torch.device, query_start: _Ints, context_len: _Ints, block_table: _Ints,
        visible_until: _Ints | None,
    ) -> None:  # fmt: skip
        self._device, self._starts, self._contexts = device, query_start, context_len
        self._table, self._until = block_table, visible_until
        self._pieces: dict[tuple[int, ...], list[_Piece]] = {}  # by what they depend on
        self._masks: dict[tuple[object, ...], Tensor] = {}

    def attend(
        self, keys: Tensor, values: Tensor, q: Tensor, spec: AttentionSpec, sinks: Tensor | None,
        slopes: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return the results, [n_tokens, num_heads, value_dim] float32.

        Args:
            keys: [num_blocks, num_kv_heads, block_size, head_dim].
            values: [num_blocks, num_kv_heads, block_size, value_dim].
            q: [n_tokens, num_heads, head_dim].
            sinks, slopes: [num_heads] float32, on the device.
        """
        num_heads, block_size = q.shape[1], int(keys.shape[2])
        each = int(keys.shape[1] * (keys.shape[3] + values.shape[3]))
        kind = (num_heads, block_size, each)
        if kind not in self._pieces:
            self._pieces[kind] = list(self._cut(*kind))
        out = q.new_empty(q.shape[0], num_heads, values.shape[3], dtype=torch.float32)
        for index, piece in enumerate(self._pieces[kind]):
            mask = self._mask((*kind, index), piece, spec)
            rows = _attend(piece, mask, keys, values, q, spec, sinks, slopes)
            tokens = piece.tokens.flatten()[piece.places]
            out[tokens] = rows.flatten(0, 1)[piece.places]
        return out

    def _mask(self, piece: tuple[object, ...], of: _Piece, spec: AttentionSpec) -> Tensor:
        """Return which keys a piece's queries see, [n, max_queries, max_keys]; layers share it."""
        kind = (*piece, spec.window, spec.chunk)
        if kind not in self._masks:
            at = torch.arange(of.blocks.shape[1], device=self._device)
            first = torch.zeros_like(of.positions)
            if spec.window is not None:
                first = of.positions - (spec.window - 1)
            if spec.chunk is not None:
                first = torch.maximum(first, of.positions // spec.chunk * spec.chunk)
            self._masks[kind] = (at < of.until[..., None]) & (at >= first[..., None])
        return self._masks[kind]

    def _cut(self, num_heads: int, block_size: int, each: int) -> Iterator[_Piece]:
        """Yield pieces of at most `_MAX_SCORES` scores, or of one query.

        Args:
            each: Numbers in a token's keys and values.
        """
        lengths = np.diff(self._starts)

        def is_large(rows: list[int]) -> bool:
            longest = int(self._contexts[rows].max())
            num_scores = len(rows) * num_heads * int(lengths[rows].max()) * longest
            return num_scores > _MAX_SCORES or len(rows) * longest * each > _MAX_GATHERED

        waiting: list[int] = []
        for row in np.argsort(self._contexts, kind="stable").tolist():  # similar lengths share a piece
            if not lengths[row]:
                continue
            together = [*waiting, row]
            if waiting and is_large(together):
                yield self._piece(waiting, block_size)
                together = [row]
            if is_large(together):
                step = max(_MAX_SCORES // (num_heads * int(self._contexts[row])), 1)
                for first in range(0, int(lengths[row]), step):
                    yield self._piece([row], block_size, first, min(first + step, int(lengths[row])))
                together = []
            waiting = together
        if waiting:
            yield self._piece(waiting, block_size)

    def _piece(self, rows: list[int], block_size: int, first: int = 0, stop: int | None = None) -> _Piece:
        """Return the queries [first, stop) of each of these sequences; `stop` is None for all."""
        lengths = np.diff(self._starts)[rows]
        lengths = np.minimum(lengths, lengths.max() if stop is None else stop) - first
        num_queries, num_keys = int(lengths.max()), int(self._contexts[rows].max())
        within = np.arange(num_queries)
        is_query = within < lengths[:, None]
        begins = self._contexts[rows] - np.diff(self._starts)[rows]  # position of a sequence's first query
        tokens = np.where(is_query, self._starts[rows][:, None] + first + within, 0).astype(np.int64)
        positions = np.where(is_query, begins[:, None] + first + within, 0).astype(np.int64)
        until = positions + 1
        if self._until is not None:
            until = np.where(is_query, self._until[tokens], 1).astype(np.int64)
        num_columns = -(-num_keys // block_size)
        table = self._moved(self._table[rows][:, :num_columns].astype(np.int64))
        last = self._moved(self._contexts[rows].astype(np.int64) - 1)[:, None]
        at = torch.minimum(torch.arange(num_keys, device=self._device), last)
        blocks = table.gather(1, at // block_size)
        return _Piece(
            self._moved(tokens), self._moved(positions), self._moved(until), blocks, at % block_size,
            self._moved(np.flatnonzero(is_query)),
        )  # fmt: skip

    def _moved(self, array: _Ints) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _attend(
    piece: _Piece, mask: Tensor, keys: Tensor, values: Tensor, q: Tensor, spec: AttentionSpec,
    sinks: Tensor | None, slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return a piece's results, [n, max_queries, num_heads, value_dim] float32."""
    n, num_queries = piece.tokens.shape
    num_kv_heads = keys.shape[1]
    group = q.shape[1] // num_kv_heads
    # [n, num_kv_heads, group * max_queries, head_dim], and [n, num_kv_heads, max_keys, dims].
    query = q[piece.tokens].view(n, num_queries, num_kv_heads, group, -1).permute(0, 2, 3, 1, 4)
    query = query.reshape(n, num_kv_heads, group * num_queries, -1).to(keys.dtype)
    k, v = (part[piece.blocks, :, piece.offsets].transpose(1, 2) for part in (keys, values))
    seen = mask[:, None].repeat(1, 1, group, 1)
    if spec.soft_cap is None and sinks is None and slopes is None:
        rows = torch.nn.functional.scaled_dot_product_attention(
            query, k, v, attn_mask=seen, scale=spec.scale
        ).float()
    else:
        bias = None if slopes is None else _distances(piece, slopes.view(num_kv_heads, group))
        rows = _by_scores(query, k, v, seen, bias, spec, sinks)
    rows = rows.view(n, num_kv_heads, group, num_queries, -1).permute(0, 3, 1, 2, 4)
    return rows.reshape(n, num_queries, num_kv_heads * group, -1)


def _by_scores(
    query: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None, spec: AttentionSpec,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attend with scores that are capped, biased, or have sinks."""
    scores = query.float() @ k.float().transpose(-2, -1) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is None:
        return scores.softmax(-1) @ v.float()
    n, num_kv_heads, num_rows, num_keys = scores.shape
    group = sinks.numel() // num_kv_heads
    last = (
        sinks.view(num_kv_heads, group, 1).expand(-1, -1, num_rows // group).reshape(1, num_kv_heads, -1, 1)
    )
    shares = torch.cat([scores, last.expand(n, -1, -1, 1)], dim=-1).softmax(-1)
    return shares[..., :num_keys] @ v.float()


def _distances(piece: _Piece, slopes: Tensor) -> Tensor:
    """Return ALiBi's biases, [n, num_kv_heads, group * max_queries, max_keys] float32."""
    at = torch.arange(piece.blocks.shape[1], device=slopes.device)
    distance = (at - piece.positions[..., None]).float()  # [n, max_queries, max_keys]
    bias = slopes[None, :, :, None, None] * distance[:, None, None]
    return bias.flatten(2, 3)
