"""The operator `attention`: paged, variable-length, causal; one for prefill and decode."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.kv import Cache, KvLayer, keys_and_values
from tgi_asgi.ops.values import Kind, Value, recorder_of


def attention(
    q: Value,
    cache: Cache,
    scale: float,
    *,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    rotary_dim: int | None = None,
    gate: Value | None = None,
) -> Value:
    """Attend the queries to the cache; `AttentionSpec` says what the numbers are.

    `rotary_dim` is that of the keys, for queries that are an input of the program (None: whole heads): the
    cache keeps dims in the order in which they turn. `gate` is rows [n_tokens, num_heads * value_dim]: the
    result is multiplied by their sigmoid.

    Returns an activation [n_tokens, num_heads * value_dim]; from latents rows, which `heads_linear` goes on
    with. A row's bits depend on its own sequence only: not on the batch, on how its prompt was cut, on block
    ids or on threads. Chunks of 256 positions are reduced alone and merged in order (Dao, FlashAttention,
    section 3.1; flash-decoding).

    Raises:
        ValueError: as `AttentionSpec`, or the gate does not have the result's columns.
        TypeError: `cache` is of states.
    """
    cache = keys_and_values("attention", cache)
    spec = AttentionSpec(scale, window=window, chunk=chunk, soft_cap=soft_cap, sinks=sinks, slopes=slopes)
    head_dim, value_dim = cache.head_dim, cache.value_dim
    recorder = recorder_of("attention", q=(q, Kind.QUERY, None))
    columns = q.columns // head_dim * value_dim
    if gate is not None:
        recorder = recorder_of("attention", q=(q, Kind.QUERY, None), gate=(gate, Kind.ROWS, columns))
    kind = Kind.ROWS if isinstance(cache, KvLayer) and cache.is_latent else Kind.ACTIVATION
    out = recorder.value(kind, columns)
    return recorder.note(calls.Attention(out, q, cache, head_dim, value_dim, rotary_dim, spec, gate))
