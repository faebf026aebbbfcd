"""The operator `attention`: paged, variable-length, causal; one for prefill and decode."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi._C import FlatRows
from tgi_asgi.ops import calls
from tgi_asgi.ops.at_once import at_once
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.values import Kind, Operand, recorder_of


def attention(
    q: Operand,
    cache: Cache,
    scale: float,
    *,
    window: int | None = None,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    rotary_dim: int | None = None,
    batch: FlatRows | None = None,
) -> Operand:
    """Attend the queries to the cache; `AttentionSpec` says what the numbers are.

    At once q is a tensor [n_tokens, num_heads * head_dim] float32, rotated already, and `rotary_dim` that of
    the keys (None: whole heads): the cache keeps dims in the order in which they turn.

    Returns an activation [n_tokens, num_heads * value_dim]. A row's bits depend on its own sequence only:
    not on the batch, on how its prompt was cut, on block ids or on threads. Chunks of 256 positions are
    reduced alone and merged in order (Dao, FlashAttention, section 3.1; flash-decoding).

    Raises:
        ValueError: lengths do not fit together, a block id is not in the pool, or as `AttentionSpec`.
    """
    spec = AttentionSpec(scale, window=window, chunk=chunk, soft_cap=soft_cap, sinks=sinks, slopes=slopes)
    return _attend(q, cache, spec, rotary_dim, batch)


def _attend(
    q: Operand, cache: Cache, spec: AttentionSpec, rotary_dim: int | None, batch: FlatRows | None
) -> Operand:
    if isinstance(q, Tensor):
        return at_once(lambda _, q: _attend(q, cache, spec, rotary_dim, None), (q, Kind.QUERY), batch=batch)
    recorder = recorder_of("attention", q=(q, Kind.QUERY, None))
    head_dim, value_dim = cache.head_dim, cache.value_dim
    out = recorder.value(Kind.ACTIVATION, q.columns // head_dim * value_dim)
    return recorder.note(calls.Attention(out, q, cache, head_dim, value_dim, rotary_dim, spec))
