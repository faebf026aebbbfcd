"""The operator `latent_qkv`: queries against latents, and the write of latents into the cache.

A token's latent is a vector from which all heads' keys and values are computed, and one rotated key that all
heads share. The matrices that compute keys from latents are multiplied into the queries, so that the keys
themselves are never computed. Source: DeepSeek-AI, DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache, latents
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.rope import RopeTable


def latent_qkv(
    absorbed: Value,
    rotary: Value,
    rows: Value,
    norm: NormWeight,
    rope: RopeTable,
    cache: Cache,
    *,
    rotary_column: int = 0,
) -> Value:
    """Write the latents of rows to `cache`; return the queries, for `attention` with the same cache.

    Args:
        absorbed: Rows [n_tokens, num_heads * value_dim], each head's query against the latents' values.
        rotary: Rows whose columns from `rotary_column` on are [num_heads * rotary_dim], the part to be
            rotated.
        rows: [n_tokens, value_dim + rotary_dim], the latents: values before their norm, then the key to be
            rotated.
        norm: RMSNorm of the values.

    Raises:
        TypeError: if `cache` is not a latent cache.
        ValueError: if a number of columns does not fit, or the norm is not an RMSNorm.
    """
    layer = latents("latent_qkv", cache)
    rotary_dim = layer.head_dim - layer.value_dim
    if norm.columns != layer.value_dim or norm.bias is not None:
        raise ValueError(f"`norm` must be an RMSNorm of {layer.value_dim} columns, got {norm.columns}")
    if rope.rotary_dim != rotary_dim:
        raise ValueError(f"the rotary table must rotate {rotary_dim} dims, it rotates {rope.rotary_dim}")
    recorder = recorder_of(
        "latent_qkv", absorbed=(absorbed, Kind.ROWS, None), rotary=(rotary, Kind.ROWS, None),
        rows=(rows, Kind.ROWS, layer.head_dim),
    )  # fmt: skip
    num_heads = absorbed.columns // layer.value_dim
    if num_heads < 1 or absorbed.columns % layer.value_dim:
        raise ValueError(f"`absorbed` must have {layer.value_dim} columns a head, got {absorbed.columns}")
    end = rotary_column + num_heads * rotary_dim
    if rotary_column < 0 or end > rotary.columns:
        raise ValueError(
            f"`latent_qkv` takes columns {rotary_column} to {end} of `rotary`, which has {rotary.columns}"
        )
    out = recorder.value(Kind.QUERY, num_heads * layer.head_dim)
    return recorder.note(calls.LatentQkv(out, absorbed, rotary, rotary_column, rows, norm, rope, layer))
