"""Latent attention (MLA): all heads' keys and values are made of one latent a token, which the cache keeps.

What makes keys of latents is multiplied into the queries, what makes values into the results, so that neither
is ever made. Plain Python over the operators, as `layers.py`.
Source: DeepSeek-AI, DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.latent_spec import LatentSpec

Rows = npt.NDArray[np.int64]


class LatentSource(Protocol):
    """A layer's weights, as `layers.LayerWeights` has them."""

    config: ModelConfig
    arithmetic: ops.Arithmetic

    def has(self, name: str) -> bool: ...
    def get(self, name: str, *shape: int) -> ops.WeightSource: ...
    def norm(self, name: str, *shape: int) -> ops.NormWeight: ...
    def linear(self, name: str, rows: int, columns: int, *, has_bias: bool) -> ops.LinearWeight: ...


class LatentAttention:
    """Everything between the norm before attention and the product behind it.

    Attributes:
        targets: its products by the names of their modules, as adapters have them.
    """

    def __init__(self, weights: LatentSource, spec: LatentSpec) -> None:
        config = weights.config
        hidden, heads = config.hidden_size, config.num_heads
        self._plain_columns = heads * spec.plain_dim
        queries, query_rows = heads * (spec.plain_dim + spec.rotary_dim), _query_rows(spec, heads)
        self.targets: dict[str, ops.Target] = {}
        self._inner: tuple[ops.LinearWeight, ops.NormWeight] | None = None
        name, columns = "self_attn.q_proj", hidden
        if spec.query_rank is not None:
            name, columns = "self_attn.q_b_proj", spec.query_rank
            inner = weights.linear("self_attn.q_a_proj", columns, hidden, has_bias=spec.has_bias)
            self._inner = inner, weights.norm("self_attn.q_a_layernorm", columns)
            self.targets["self_attn.q_a_proj"] = ops.Target(inner, 0, columns)
        self._query = _in_rows(weights, name, query_rows, columns, has_bias=False)
        self.targets[name] = ops.Target(self._query, 0, queries, query_rows)
        name, rows = "self_attn.kv_a_proj_with_mqa", _latent_rows(spec)
        self._latent = _in_rows(weights, name, rows, hidden, has_bias=spec.has_bias)
        self.targets[name] = ops.Target(self._latent, 0, len(rows), rows)
        self._norm = weights.norm("self_attn.kv_a_layernorm", spec.rank)
        self._to_latent, self._from_latent = _read_ups(weights, spec)

    def attend(self, a: ops.Value, cache: ops.Cache, rope: ops.RopeTable | None, scale: float) -> ops.Value:
        """Return what the heads make of the activation a, as the input of the product behind them."""
        assert rope is not None  # as the configuration is checked
        latents, inner = ops.linear(a, self._latent), a
        if self._inner is not None:
            inner = ops.norm(ops.linear(a, self._inner[0]), self._inner[1])
        queries = ops.linear(inner, self._query)  # of all heads the plain dims, then those that turn
        absorbed = ops.heads_linear(ops.activation(queries, self._plain_columns), self._to_latent)
        q = ops.latent_qkv(
            absorbed, queries, latents, self._norm, rope, cache, turning_column=self._plain_columns
        )
        found = ops.attention(q, cache, scale)
        return ops.activation(ops.heads_linear(ops.activation(found), self._from_latent))


def _in_rows(
    weights: LatentSource, name: str, rows: Rows, columns: int, *, has_bias: bool
) -> ops.LinearWeight:
    """Make the weight of a product whose rows are those of the file in another order."""
    source = weights.get(f"{name}.weight", len(rows), columns).in_rows(rows)
    bias = weights.get(f"{name}.bias", len(rows)).in_rows(rows) if has_bias else None
    return ops.linear_weight(source, weights.arithmetic, bias=bias)


def _turning(spec: LatentSpec) -> Rows:
    """Return the dims that turn, so that the two of a pair are half of them apart."""
    dims = np.arange(spec.rotary_dim)
    return np.concatenate([dims[::2], dims[1::2]]) if spec.is_interleaved else dims


def _query_rows(spec: LatentSpec, num_heads: int) -> Rows:
    """Return where rows of queries lie in the file: of all heads the plain ones, then those that turn."""
    starts = np.arange(num_heads)[:, None] * (spec.plain_dim + spec.rotary_dim)
    plain, turning = starts + np.arange(spec.plain_dim), starts + spec.plain_dim + _turning(spec)
    return np.concatenate([plain.reshape(-1), turning.reshape(-1)])


def _latent_rows(spec: LatentSpec) -> Rows:
    return np.concatenate([np.arange(spec.rank), spec.rank + _turning(spec)])


def _read_ups(weights: LatentSource, spec: LatentSpec) -> tuple[ops.HeadsWeight, ops.HeadsWeight]:
    """Read what makes keys of latents, transposed, and what makes values of them.

    As checkpoints have it, each head's keys and values lie together; newer GGUF files have them apart, the
    keys' transposed.
    """
    heads, arithmetic = weights.config.num_heads, weights.arithmetic
    plain, values, rank = spec.plain_dim, spec.value_dim, spec.rank
    apart = [f"self_attn.{name}_b_proj.weight" for name in ("k", "v")]
    if any(weights.has(name) for name in apart):
        keys = weights.get(apart[0], heads, rank, plain)
        return (
            ops.heads_weight(keys, arithmetic, num_heads=heads),
            ops.heads_weight(weights.get(apart[1], heads, values, rank), arithmetic, num_heads=heads),
        )
    both = weights.get("self_attn.kv_b_proj.weight", heads * (plain + values), rank)
    rows = np.arange(heads * (plain + values)).reshape(heads, -1)
    keys, ups = (both.in_rows(part.reshape(-1)) for part in (rows[:, :plain], rows[:, plain:]))
    return (
        ops.heads_weight(keys, arithmetic, num_heads=heads, is_transposed=True),
        ops.heads_weight(ups, arithmetic, num_heads=heads),
    )
