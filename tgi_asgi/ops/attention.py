"""The operator `attention`: paged, variable-length, causal, the same for prefill and decode."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.kv import Cache, KvLayer, keys_and_values
from tgi_asgi.ops.layout import STRIP
from tgi_asgi.ops.recorder import Kind, Value, recorder_of


def attention(
    q: Value,
    cache: Cache,
    spec: AttentionSpec,
    *,
    gate: Value | None = None,
) -> Value:
    """Attend the queries to the cache.

    `gate` is rows [n_tokens, num_heads * value_dim], or [n_tokens, num_heads] if value_dim is a multiple of
    32; the result is multiplied by their sigmoid.

    Returns an activation [n_tokens, num_heads * value_dim]; from a latent cache, rows for `heads_linear`. A
    row's bits depend only on its own sequence, not on the batch, on how its prompt was split, on block ids or
    on threads. Chunks of 256 positions are reduced separately and merged in order (Dao, FlashAttention,
    section 3.1; flash-decoding).

    Raises:
        ValueError: if the gate has neither the result's columns nor one per head.
        TypeError: if `cache` holds recurrent states.
    """
    cache = keys_and_values("attention", cache)
    head_dim, value_dim = cache.head_dim, cache.value_dim
    recorder = recorder_of("attention", q=(q, Kind.QUERY, None))
    heads = q.columns // head_dim
    columns = heads * value_dim
    if gate is not None:
        is_of_heads = isinstance(gate, Value) and gate.columns == heads and value_dim % STRIP == 0
        wanted = heads if is_of_heads else columns
        recorder = recorder_of("attention", q=(q, Kind.QUERY, None), gate=(gate, Kind.ROWS, wanted))
    kind = Kind.ROWS if isinstance(cache, KvLayer) and cache.is_latent else Kind.ACTIVATION
    out = recorder.value(kind, columns)
    return recorder.note(calls.Attention(out, q, cache, head_dim, value_dim, spec, gate))
