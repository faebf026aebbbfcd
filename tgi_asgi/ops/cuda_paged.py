"""Attention over a cache on a CUDA device for models that compute in torch: the counterpart of `paged.py`.

The native kernels attend where they support the heads. Otherwise, and where a token sees later tokens, torch
does (`cuda_padded.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Bools, Floats, Ints
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_kv import HEAD_DIMS, MAX_GROUP
from tgi_asgi.ops.cuda_padded import PaddedSteps
from tgi_asgi.ops.kv import HeadShape

_kernels: Any = torch.ops.tgi_cuda


@dataclass(frozen=True, slots=True)
class DeviceKvLayer:
    """One layer's keys and values, of heads whose values may be narrower than their keys."""

    keys: Tensor  # [num_blocks, num_kv_heads, block_size, head_dim]
    values: Tensor  # [num_blocks, num_kv_heads, block_size, value_dim]
    pool: Tensor | None  # both in the kernels' layout; None if these cannot read them

    @property
    def head_dim(self) -> int:
        """Number of dims of a head of keys."""
        return int(self.keys.shape[3])

    @property
    def value_dim(self) -> int:
        """Number of dims of a head of values."""
        return int(self.values.shape[3])

    def write(self, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Write tokens' keys and values, [n_tokens, num_kv_heads, dims], to these blocks and offsets."""
        self.keys[blocks, :, offsets] = k.to(self.keys.dtype)
        self.values[blocks, :, offsets] = v.to(self.values.dtype)


class DeviceKvPool:
    """The keys and values of all layers on a device; the counterpart of `KvPool`, with one group.

    Memory is filled with zeros: a block that was never written must not hold NaN.

    Args:
        shapes: The layers' shapes.
        dtype: Type of keys and values: float32, or one that the kernels read.
    """

    def __init__(
        self, shapes: Sequence[HeadShape], *, num_blocks: int, block_size: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.layers = [_make_layer(each, num_blocks, block_size, dtype, device) for each in shapes]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in every layer, as if simultaneously: no block is both."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self.layers[0].keys.device).T
        for layer in self.layers:
            for part in (layer.keys, layer.values):
                part[targets] = part[sources]

    def stop_supply(self) -> None:
        """Do nothing: all memory is there from the start."""


def _make_layer(
    shape: HeadShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> DeviceKvLayer:
    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(num_blocks, *sizes, dtype=dtype, device=device)

    heads, head_dim = shape.num_kv_heads, shape.head_dim
    if head_dim != shape.value_dim:
        keys = zeros(heads, block_size, head_dim)
        return DeviceKvLayer(keys, zeros(heads, block_size, shape.value_dim), None)
    pool = zeros(2, heads, block_size, head_dim)
    is_known = head_dim in HEAD_DIMS and dtype in (torch.bfloat16, torch.float16)
    return DeviceKvLayer(pool[:, 0], pool[:, 1], pool if is_known else None)


class _Rows(NamedTuple):
    """The rows of a step that one kernel computes."""

    tokens: Tensor | None  # indices of their tokens; None: all of the step's
    query_start: Tensor
    context_len: Tensor
    block_table: Tensor
    max_query_len: int


class CudaPagedAttention:
    """Writes a step's keys and values and attends; the counterpart of `PagedAttention`.

        attention = CudaPagedAttention(device)
        attention.begin(batch)                                   # once per step
        out = attention.run(pool.layers[i], q, k, v, spec)       # once per layer

    A row's bits may depend on the other rows of its step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._vectors: dict[int, tuple[Floats, Tensor]] = {}  # sinks and slopes on the device, by id

    def begin(self, batch: _C.FlatRows, visible_until: Tensor | None = None) -> None:
        """Set the step for the following calls of `run`; see `PagedAttention.begin`."""
        (table,) = batch.block_tables  # layers with windows share it, too
        starts, contexts = batch.query_start, batch.context_len
        self._slots, self._num_tokens = self._moved(batch.slots), int(starts[-1])
        self._places: dict[int, tuple[Tensor, Tensor]] = {}  # blocks and offsets of slots, by block size
        until = None if visible_until is None else visible_until.numpy()
        self._padded = PaddedSteps(self._device, starts, contexts, table, until)
        lengths = np.diff(starts)
        self._has_lookahead = until is not None and bool(np.any(until > batch.positions + 1))
        is_decoding = lengths == 1
        self._decodes = self._rows_where(is_decoding, table, starts, contexts)
        self._prompts = self._rows_where(~is_decoding, table, starts, contexts)
        self._plans: dict[tuple[int, int], Tensor] = {}  # by block size and window
        self._workspaces: dict[tuple[int, ...], Tensor] = {}  # by what their size depends on

    def run(
        self, layer: DeviceKvLayer, q: Tensor, k: Tensor | None, v: Tensor | None, spec: AttentionSpec
    ) -> Tensor:
        """Write k and v to the step's slots, and attend; see `PagedAttention.run`.

        Raises:
            ValueError: if a shape does not fit.
        """
        shape = (self._num_tokens, q.shape[1], layer.head_dim)
        if tuple(q.shape) != shape:
            raise ValueError(f"`q` must be {list(shape)}, got {list(q.shape)}")
        block_size = int(layer.keys.shape[2])
        if k is not None and v is not None:
            if block_size not in self._places:
                self._places[block_size] = (self._slots // block_size, self._slots % block_size)
            layer.write(*self._places[block_size], k, v)
        num_kv_heads = layer.keys.shape[1]
        if layer.pool is None or not self._have_kernels(spec, q.shape[1] // num_kv_heads):
            return self._padded.attend(
                layer.keys, layer.values, q, spec, self._vector(spec.sinks), self._vector(spec.slopes)
            )
        query = q.to(layer.pool.dtype).contiguous()
        out = torch.empty_like(query)
        for rows, kernel in ((self._decodes, self._decode), (self._prompts, self._prefill)):
            if rows is None:
                continue
            if rows.tokens is None:
                kernel(rows, query, layer.pool, spec, out)
            else:
                mine = query[rows.tokens]
                found = torch.empty_like(mine)
                kernel(rows, mine, layer.pool, spec, found)
                out[rows.tokens] = found
        return out.float()

    def _have_kernels(self, spec: AttentionSpec, group: int) -> bool:
        return spec.chunk is None and not self._has_lookahead and group <= MAX_GROUP

    def _decode(self, rows: _Rows, q: Tensor, pool: Tensor, spec: AttentionSpec, out: Tensor) -> None:
        window, block_size = spec.window or 0, int(pool.shape[3])  # the kernels use 0 for no window
        plan = self._plans.get((block_size, window))
        if plan is None:
            plan = torch.zeros(len(rows.context_len) + 1, dtype=torch.int32, device=self._device)
            _kernels.attention_plan(rows.context_len, rows.block_table, block_size, window, plan)
            self._plans[block_size, window] = plan
        sizes = (len(q), rows.block_table.shape[1], block_size, q.shape[1], q.shape[2])
        space = self._workspaces.get(sizes)
        if space is None:
            num_bytes = _kernels.attention_workspace_bytes(*sizes)
            space = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            self._workspaces[sizes] = space
        kind = self._kind(spec)
        _kernels.attention_decode(q, pool, rows.context_len, rows.block_table, *kind, plan, space, out)

    def _prefill(self, rows: _Rows, q: Tensor, pool: Tensor, spec: AttentionSpec, out: Tensor) -> None:
        _kernels.attention_prefill(
            q, pool, rows.query_start, rows.context_len, rows.block_table, rows.max_query_len,
            *self._kind(spec), out,
        )  # fmt: skip

    def _kind(self, spec: AttentionSpec) -> tuple[object, ...]:
        sinks, slopes = self._vector(spec.sinks), self._vector(spec.slopes)
        return spec.window or 0, spec.scale, spec.soft_cap or 0.0, sinks, slopes, 1.0, 1.0

    def _vector(self, values: Floats | None) -> Tensor | None:
        """Return sinks or slopes on the device; they are moved once."""
        if values is None:
            return None
        if id(values) not in self._vectors:
            self._vectors[id(values)] = (values, self._moved(values))
        return self._vectors[id(values)][1]

    def _rows_where(self, is_chosen: Bools, table: Ints, starts: Ints, contexts: Ints) -> _Rows | None:
        """Return the chosen rows of a step; None if there are none."""
        chosen = np.flatnonzero(is_chosen)
        if not len(chosen):
            return None
        lengths = np.diff(starts)[chosen]
        tokens = None
        if len(chosen) < len(contexts):
            places = [np.arange(starts[row], starts[row + 1]) for row in chosen]
            tokens = self._moved(np.concatenate(places).astype(np.int64))
        return _Rows(
            tokens,
            self._moved(np.cumsum([0, *lengths]).astype(np.int32)),
            self._moved(contexts[chosen].astype(np.int32)),
            self._moved(np.ascontiguousarray(table[chosen]).astype(np.int32)),
            int(lengths.max()),
        )

    def _moved(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
