"""The operator `qkv`: projections, head norms, rotary embedding, and the write into the KV cache."""

from __future__ import annotations

import math

from tgi_asgi.ops import calls
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.kv import Cache, keys_and_values
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.weights import QkvWeight


def qkv(
    a: Value,
    weight: QkvWeight,
    cache: Cache,
    rope: RopeTable | None,
    clip: float | None = None,
    query_scales: Floats | None = None,
) -> Value:
    """Project the activation a [n_tokens, hidden], rotate queries and keys, write keys and values to `cache`.

    If the weight has norms, queries and keys are normalised before or after the rotation. Without a rotary
    table they are not rotated. A weight without keys (`QkvHeads.has_keys`) only reads the shape of the cache,
    which another layer writes. Returns the queries, for `attention` with the same cache.

    Args:
        clip: Bound to which queries, keys and values are first clamped, [-clip, clip] (OLMo 1, MPT).
        query_scales: float32 [positions], factors applied to the queries last (Ministral 3).

    Raises:
        ValueError: if `clip` is not positive, or the weight has norms over all heads.
        TypeError: if `cache` holds recurrent states.
    """
    cache = keys_and_values("qkv", cache)
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"`clip` must be positive, got {clip}")
    if clip is not None and weight.norms is not None and weight.norms.is_whole:
        raise ValueError("`clip` is not computed with norms over all heads")
    recorder = recorder_of("qkv", a=(a, Kind.ACTIVATION, weight.columns))
    out = recorder.value(Kind.QUERY, weight.heads.rows[0])
    return recorder.note(calls.Qkv(out, a, weight, cache, rope, clip, query_scales))
