"""The operator `qkv`: projections, norms of heads, rotary embedding, and the write into the KV cache."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi._C import FlatRows
from tgi_asgi.ops import calls
from tgi_asgi.ops.at_once import at_once
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.values import Kind, Operand, recorder_of
from tgi_asgi.ops.weights import QkvWeight


def qkv(
    a: Operand, weight: QkvWeight, cache: Cache, rope: RopeTable | None, batch: FlatRows | None = None
) -> Operand:
    """Project the activation a [n_tokens, hidden], rotate queries and keys, write keys and values to `cache`.

    Where the weight has norms, queries and keys are normalised before they are rotated; without a rotary
    table they are not rotated. Returns the queries, for `attention` with the same cache.

    Raises:
        ValueError: a position or slot is out of range; nothing is written then.
    """
    if isinstance(a, Tensor):
        return at_once(lambda _, a: qkv(a, weight, cache, rope), (a, Kind.ACTIVATION), batch=batch)
    recorder = recorder_of("qkv", a=(a, Kind.ACTIVATION, weight.columns))
    out = recorder.value(Kind.QUERY, weight.num_heads * weight.head_dim)
    return recorder.note(calls.Qkv(out, a, weight, cache, rope))
