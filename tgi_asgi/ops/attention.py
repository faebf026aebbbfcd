"""The operator `attention`: paged, variable-length, causal; one for prefill and decode."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi._C import FlatRows
from tgi_asgi.ops import calls
from tgi_asgi.ops.at_once import at_once
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.values import Kind, Operand, recorder_of


def attention(
    q: Operand,
    cache: Cache,
    scale: float,
    *,
    window: int | None = None,
    rotary_dim: int | None = None,
    batch: FlatRows | None = None,
) -> Operand:
    """Attend the queries to the cache; scores are multiplied by `scale`.

    With a window, a query sees only so many positions, its own the last. At once q is a tensor [n_tokens,
    num_heads * head_dim] float32, rotated already, and `rotary_dim` that of the keys (None: whole heads): the
    cache keeps dims in the order in which they turn.

    Returns an activation [n_tokens, num_heads * head_dim]. A row's bits depend on its own sequence only:
    not on the batch, on how its prompt was cut, on block ids or on threads. Chunks of 256 positions are
    reduced alone and merged in order (Dao, FlashAttention, section 3.1; flash-decoding).

    Raises:
        ValueError: lengths do not fit together, a block id is not in the pool, or the window is not positive.
    """
    if window is not None and window < 1:
        raise ValueError(f"`window` must be positive, got {window}")
    if isinstance(q, Tensor):
        return at_once(
            lambda _, q: attention(q, cache, scale, window=window, rotary_dim=rotary_dim), (q, Kind.QUERY),
            batch=batch,
        )  # fmt: skip
    recorder = recorder_of("attention", q=(q, Kind.QUERY, None))
    out = recorder.value(Kind.ACTIVATION, q.columns)
    return recorder.note(calls.Attention(out, q, cache, cache.head_dim, rotary_dim, scale, window))
