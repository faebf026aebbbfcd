"""A program with values that tests set and read: one operator, without the embedding and head of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.support.kv import cached_dims
from tgi_asgi import _C, ops
from tgi_asgi.ops import Value, calls, layout
from tgi_asgi.ops.adapters import AdapterLayout
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.buffers import CpuBuffers
from tgi_asgi.ops.cpu_calls import CpuCalls
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.qkv_heads import QkvHeads
from tgi_asgi.ops.recorder import Call, Kind, Recorder
from tgi_asgi.ops.shards import Shard
from tgi_asgi.ops.sources import WeightSource, decode


class OpenProgram(ops.CpuProgram):
    """A `CpuProgram` that takes and returns values.

    Args:
        inputs: Values that no call computes; `write` sets them.
        outputs: Values that `read` can return.
        rotary_dim: How many dims of a head are rotated, in keys and in queries that are inputs, because the
            cache stores dims in the order of their rotation pairs; None: whole heads.
    """

    def __init__(
        self,
        recorder: Recorder,
        limits: ops.StepLimits,
        *,
        inputs: Sequence[Value] = (),
        outputs: Sequence[Value] = (),
        rotary_dim: int | None = None,
    ) -> None:
        self._inputs, self._outputs, self._rotary_dim = inputs, outputs, rotary_dim
        super().__init__(recorder, limits)

    def _lower(self, adapters: AdapterLayout | None, shard: Shard | None) -> CpuCalls:
        return _OpenCalls(self.native, self._recorded, self._inputs, self._outputs, self._rotary_dim)

    @property
    def buffers(self) -> CpuBuffers:
        """The buffers of the program's values."""
        return self._calls.buffers

    def write(self, value: Value, rows: Floats) -> None:
        """Set an input's rows [n_tokens, columns] float32."""
        array = self.buffers.rows_of(value).array()
        if value.kind is Kind.QUERY:
            order = layout.qkv_orders(_heads_of(value, self._recorded, self._rotary_dim))[0]
            rows = np.where(order >= 0, rows[:, order], np.float32(0))  # padding rows are zero
        array[: rows.shape[0], : rows.shape[1]] = rows

    def read(self, value: Value, num_tokens: int) -> Floats:
        """Return an output [n_tokens, columns] float32, a copy."""
        if value.kind is Kind.QUERY:
            return self._read_query(value, num_tokens)
        if value.kind is Kind.ACTIVATION:
            read = self.buffers.activation_of(value, "float32").array()
        else:
            read = self.buffers.rows_of(value).array()
        found: Floats = read[:num_tokens, : value.columns].copy()
        return found

    def _read_query(self, value: Value, num_tokens: int) -> Floats:
        heads = _heads_of(value, self._recorded, self._rotary_dim)
        array = np.ascontiguousarray(self.buffers.query_of(value).array()[:num_tokens])
        shape = (num_tokens, heads.rows[0])
        name = {4: "F32", 2: "BF16"}.get(array.shape[1] // shape[1])
        if name is None or array.shape[1] % shape[1]:
            raise ValueError("queries for an int8 cache are integers: use a float cache")
        dims = cached_dims(
            heads.head_dim, heads.rotary_dim, is_paired=name == "BF16", is_interleaved=heads.is_interleaved,
            is_proportional=heads.is_proportional,
        )  # fmt: skip
        out = np.empty((num_tokens, heads.num_heads, heads.head_dim), np.float32)
        out[..., dims] = decode(WeightSource(array.reshape(-1), name, shape)).reshape(out.shape)
        return out.reshape(shape)


class _OpenCalls(CpuCalls):
    """Calls whose inputs have rows, and whose outputs outlive the last call."""

    def __init__(
        self,
        native: _C.Program,
        recorded: Sequence[Call],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        rotary_dim: int | None,
    ) -> None:
        super().__init__(native, recorded)
        self._inputs, self._rotary_dim, alive = inputs, rotary_dim, self._liveness
        for value in (*inputs, *outputs):
            alive._touch(value, len(recorded))
        for value in inputs:
            alive._spans[value.root] = (-1, len(recorded))
        for value in outputs:
            if value.kind is Kind.ACTIVATION:
                alive._want(value, ["float32"])

    def emit_all(self) -> None:
        """Emit what converts the inputs from rows, then all calls."""
        for value in self._inputs:
            if value.kind is Kind.QUERY:
                self._take_query(value)
            else:
                rows = self.buffers.assign_rows(value, value.columns)
                if value.kind is Kind.ACTIVATION:
                    self._pack(rows, value)
                    self._reorder(value)
        super().emit_all()

    def _take_query(self, value: Value) -> None:
        """Convert queries, whose heads are padded to whole strips, to the layout of a pool."""
        heads = _heads_of(value, self._recorded, self._rotary_dim)
        rows = self.buffers.assign_rows(value, heads.num_heads * layout.round_up(heads.head_dim))
        call = next(each for each in self._recorded if isinstance(each, calls.Attention) and each.q is value)
        layer = call.cache
        assert isinstance(layer, KvLayer)
        shape = _C.Heads(
            pool=layer.pool.native, layer=layer.index, num_heads=heads.num_heads, true_dim=heads.head_dim,
            scale=call.spec.scale,
        )  # fmt: skip
        query = self.buffers.assign_query(value, layer, heads.num_heads)
        self._native.head_rows(rows=rows, heads=shape, has_keys=False, out=query)


def _heads_of(value: Value, recorded: Sequence[Call], rotary_dim: int | None) -> QkvHeads:
    """Return the heads of a query; of keys and values it says nothing."""
    for call in recorded:
        if isinstance(call, calls.Qkv) and call.out is value:
            return call.weight.heads
        if isinstance(call, calls.Attention) and call.q is value:
            dim = call.head_dim
            return QkvHeads(value.columns // dim, 1, dim, rotary_dim or dim, has_keys=False)
    raise ValueError("no call uses this query")
