"""The operator `latent_qkv`: queries against latents, and the write of latents into the cache.

A token's latent is what all heads' keys and values are made of, and one key that turns, which all share.
Queries are multiplied by what makes keys of latents, so that keys need not be made.
Source: DeepSeek-AI, DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache, latents
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.values import Kind, Value, recorder_of


def latent_qkv(
    absorbed: Value,
    turning: Value,
    rows: Value,
    norm: NormWeight,
    rope: RopeTable,
    cache: Cache,
    *,
    turning_column: int = 0,
) -> Value:
    """Write the latents of rows to `cache`; return the queries, for `attention` with the same cache.

    Args:
        absorbed: rows [n_tokens, num_heads * value_dim], of each head what meets the latents' values.
        turning: rows whose columns from `turning_column` on are [num_heads * rotary_dim], what is rotated.
        rows: [n_tokens, value_dim + rotary_dim], the latents: values before their norm, the key that turns.
        norm: RMSNorm of the values.

    Raises:
        TypeError: `cache` is not of latents.
        ValueError: a number of columns does not fit, or the norm is none of RMSNorm.
    """
    layer = latents("latent_qkv", cache)
    rotary_dim = layer.head_dim - layer.value_dim
    if norm.columns != layer.value_dim or norm.bias is not None:
        raise ValueError(f"`norm` must be an RMSNorm of {layer.value_dim} columns, got {norm.columns}")
    if rope.rotary_dim != rotary_dim:
        raise ValueError(f"the rotary table must turn {rotary_dim} dims, it turns {rope.rotary_dim}")
    recorder = recorder_of(
        "latent_qkv", absorbed=(absorbed, Kind.ROWS, None), turning=(turning, Kind.ROWS, None),
        rows=(rows, Kind.ROWS, layer.head_dim),
    )  # fmt: skip
    num_heads = absorbed.columns // layer.value_dim
    if num_heads < 1 or absorbed.columns % layer.value_dim:
        raise ValueError(f"`absorbed` must have {layer.value_dim} columns a head, got {absorbed.columns}")
    end = turning_column + num_heads * rotary_dim
    if turning_column < 0 or end > turning.columns:
        raise ValueError(
            f"`latent_qkv` takes columns {turning_column} to {end} of `turning`, which has {turning.columns}"
        )
    out = recorder.value(Kind.QUERY, num_heads * layer.head_dim)
    return recorder.note(calls.LatentQkv(out, absorbed, turning, turning_column, rows, norm, rope, layer))
