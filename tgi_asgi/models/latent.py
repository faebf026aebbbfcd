"""Latent attention (MLA): all heads' keys and values derive from one latent per token, which is cached.

The matrices that expand latents to keys and to values are absorbed into the queries and the results, so keys
and values are never computed. Plain Python over the operators, like `layers.py`. Source: DeepSeek-AI,
DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.models.latent_spec import LatentSpec
from tgi_asgi.models.layer_tensors import LayerTensors

Rows = npt.NDArray[np.int64]
# Of both inner norms in the code of DeepSeek and of those that followed it, whatever `rms_norm_eps` says.
_EPS = 1e-6


class LatentAttention:
    """Everything between the norm before attention and the output product after it.

    Attributes:
        targets: Its products by module name, for adapters.
    """

    def __init__(self, weights: LayerTensors, spec: LatentSpec) -> None:
        config = weights.config
        hidden = config.hidden_size
        heads = range(config.num_heads) if config.cut is None else config.cut.heads
        self._plain_columns = len(heads) * spec.plain_dim
        query_rows = _query_rows(spec, heads)
        self.targets: dict[str, ops.Target] = {}
        self._inner: tuple[ops.LinearWeight, ops.NormWeight] | None = None
        name, columns = "self_attn.q_proj", hidden
        if spec.query_rank is not None:
            name, columns = "self_attn.q_b_proj", spec.query_rank
            inner = weights.linear("self_attn.q_a_proj", columns, hidden, has_bias=spec.has_bias)
            self._inner = inner, weights.norm("self_attn.q_a_layernorm", columns, eps=_EPS)
            self.targets["self_attn.q_a_proj"] = ops.Target(inner, 0, columns)
        num_queries = config.num_heads * (spec.plain_dim + spec.rotary_dim)
        queries = weights.get(f"{name}.weight", num_queries, columns).in_rows(query_rows)
        self._query = ops.linear_weight(queries, weights.arithmetic)
        whole = (num_queries, columns)
        self.targets[name] = ops.Target(self._query, 0, len(query_rows), query_rows, uncut=whole)
        name, rows = "self_attn.kv_a_proj_with_mqa", _latent_rows(spec)
        latent = weights.get(f"{name}.weight", len(rows), hidden).in_rows(rows)
        bias = weights.get(f"{name}.bias", len(rows)).in_rows(rows) if spec.has_bias else None
        self._latent = ops.linear_weight(latent, weights.arithmetic, bias=bias)
        self.targets[name] = ops.Target(self._latent, 0, len(rows), rows)
        self._norm = weights.norm("self_attn.kv_a_layernorm", spec.rank, eps=_EPS)
        self._to_latent, self._from_latent = _read_ups(weights, spec, heads)

    def attend(self, a: ops.Value, cache: ops.Cache, rope: ops.RopeTable | None, scale: float) -> ops.Value:
        """Return the heads' results for the activation a, as input of the output product."""
        assert rope is not None  # the configuration check requires it
        latents, inner = ops.linear(a, self._latent), a
        if self._inner is not None:
            inner = ops.norm(ops.linear(a, self._inner[0]), self._inner[1])
        queries = ops.linear(inner, self._query)  # the plain dims of all heads, then the rotated ones
        absorbed = ops.heads_linear(ops.activation(queries, self._plain_columns), self._to_latent)
        q = ops.latent_qkv(
            absorbed, queries, latents, self._norm, rope, cache, rotary_column=self._plain_columns
        )
        found = ops.attention(q, cache, ops.AttentionSpec(scale))
        return ops.activation(ops.heads_linear(ops.activation(found), self._from_latent))


def _rotary_dims(spec: LatentSpec) -> Rows:
    """Return the rotated dims, ordered so that the two of a pair are half of them apart."""
    dims = np.arange(spec.rotary_dim)
    return np.concatenate([dims[::2], dims[1::2]]) if spec.is_interleaved else dims


def _query_rows(spec: LatentSpec, heads: range) -> Rows:
    """Return the file's rows of these heads' queries: all plain dims, then the rotated ones."""
    starts = np.array(heads)[:, None] * (spec.plain_dim + spec.rotary_dim)
    plain, rotary = starts + np.arange(spec.plain_dim), starts + spec.plain_dim + _rotary_dims(spec)
    return np.concatenate([plain.reshape(-1), rotary.reshape(-1)])


def _latent_rows(spec: LatentSpec) -> Rows:
    return np.concatenate([np.arange(spec.rank), spec.rank + _rotary_dims(spec)])


def _read_ups(
    weights: LayerTensors, spec: LatentSpec, heads: range
) -> tuple[ops.HeadsWeight, ops.HeadsWeight]:
    """Read the matrices of these heads that expand latents to keys (transposed) and to values.

    In checkpoints each head's keys and values are adjacent. Newer GGUF files store them separately, the keys'
    transposed.
    """
    all_heads, arithmetic = weights.config.num_heads, weights.arithmetic
    plain, values, rank = spec.plain_dim, spec.value_dim, spec.rank
    apart = [f"self_attn.{name}_b_proj.weight" for name in ("k", "v")]
    is_apart = any(weights.has(name) for name in apart)
    if is_apart:
        part = slice(heads.start, heads.stop)
        keys = weights.get(apart[0], all_heads, rank, plain, part=part)
        ups = weights.get(apart[1], all_heads, values, rank, part=part)
    else:
        both = weights.get("self_attn.kv_b_proj.weight", all_heads * (plain + values), rank)
        rows = np.arange(all_heads * (plain + values)).reshape(all_heads, -1)[heads.start : heads.stop]
        keys, ups = (both.in_rows(part.reshape(-1)) for part in (rows[:, :plain], rows[:, plain:]))
    return (
        ops.heads_weight(keys, arithmetic, num_heads=len(heads), is_transposed=not is_apart),
        ops.heads_weight(ups, arithmetic, num_heads=len(heads)),
    )
