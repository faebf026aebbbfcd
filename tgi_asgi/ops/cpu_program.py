"""A recorder's list as a program of the CPU's kernels: buffers are chosen, calls noted in C++, and run there.

Calls are noted in the list's order. An activation is written once for each precision that its takers want;
buffers are used again as soon as no later call reads what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops import calls, layout
from tgi_asgi.ops.buffers import CpuBuffers, Uses
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.packing import PackedGateUp, PackedLinear, PackedQkv
from tgi_asgi.ops.recorder import Recorder
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.sample import SampleResult
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.ops.values import Kind, Value

_Made = TypeVar("_Made")


class CpuProgram:
    """Steps of a recorded model on the team of threads.

        program = CpuProgram(recorder, max_tokens=4224, max_sequences=128, max_rows=128, max_context=8192)
        result = program.draw(batch, rows, slots, state)

    For the set of kernels in use and at most the team's present number of threads.

    Args:
        max_tokens, max_sequences, max_rows: of a step, and of logits at a time.
        max_context: tokens of a sequence.
        inputs: values that no call makes: `write` gives them.
        outputs: values that `read` returns, beside the residual.

    Attributes:
        native: what `StepQueue` runs without Python.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        max_tokens: int,
        max_sequences: int,
        max_rows: int,
        max_context: int,
        inputs: Sequence[Value] = (),
        outputs: Sequence[Value] = (),
    ) -> None:
        self.native = _C.Program(
            max_tokens=max_tokens, max_sequences=max_sequences, max_rows=max_rows, max_context=max_context
        )
        self._calls = recorder.calls
        self._uses = Uses(recorder.calls, inputs, outputs, _precisions_of)
        self._buffers = CpuBuffers(self.native)
        self._tables: dict[int, tuple[RopeTable, layout.Floats, layout.Floats]] = {}
        self._residual: Any = None
        for value in inputs:
            self._take_input(value)
        last_write = max((i for i, call in enumerate(self._calls) if isinstance(call, calls.Qkv)), default=-1)
        for index, call in enumerate(self._calls):
            _EMITTERS[type(call)](self, index, call)
            if index == last_write:
                self._end_cache_writes(index)
            self._buffers.free(self._uses.ending_at(index))

    @property
    def num_calls(self) -> int:
        """How many kernel calls a step is."""
        return self.native.num_operators

    @property
    def residual(self) -> npt.NDArray[np.float32]:
        """The residual [max_tokens, padded columns] that the last step left; overwritten by the next."""
        found: npt.NDArray[np.float32] = self._residual.array()
        return found

    def run(self, batch: _C.FlatRows, rows: Iterable[int]) -> Tensor:
        """Compute a step: the forward pass, and the logits of `rows`, indices of tokens.

        Returns:
            [n_rows, vocab] float32, a view of the program's buffer: valid until the next call.

        Raises:
            ValueError: a size, id, slot or block is out of range; nothing has been computed.
        """
        return torch.from_numpy(self.native.run(batch, list(rows)))

    def draw(
        self,
        batch: _C.FlatRows,
        rows: Sequence[int],
        slots: Sequence[int],
        state: SampleState,
        mask: npt.NDArray[np.int32] | None = None,
    ) -> SampleResult:
        """Compute a step and draw a token after each of `rows`, for a slot each: `run` and `sample` in one.

        Nothing of Python lies between them. `mask` is that of `sample`. Of the last layer only what rows need
        is computed, beside keys and values, so that `run_head` is not possible afterwards.

        Raises:
            ValueError: as `run` and `sample`; nothing has been computed.
        """
        return SampleResult.of(self.native.draw(batch, rows, slots, state.arrays, mask))

    def profile(self, batch: _C.FlatRows, rows: Sequence[int]) -> list[float]:
        """Compute a step as `draw` does; return the seconds that each kernel call took."""
        return self.native.profile(batch, rows)

    def run_head(self, rows: Sequence[int]) -> Tensor:
        """Compute the logits of other rows of the last step, which `run` computed; as it."""
        return torch.from_numpy(self.native.run_head(rows))

    def write(self, value: Value, rows: Tensor) -> None:
        """Give an input its rows [n_tokens, columns] float32."""
        array = self._buffers.of(value, "rows").array()
        if value.kind is Kind.QUERY:
            rows = _packed_heads(rows, *self._query_shape(value))
        array[: rows.shape[0], : rows.shape[1]] = rows.numpy()

    def read(self, value: Value, num_tokens: int) -> Tensor:
        """Return an output [n_tokens, columns] float32, a copy."""
        if value.kind is Kind.LOGITS:
            return torch.from_numpy(self.native.run_head(range(num_tokens)).copy())
        if value.kind is Kind.QUERY:
            return self._read_query(value, num_tokens)
        if value.kind is Kind.ACTIVATION:
            read = self._buffers.of(value, "float32").array()
        else:
            read = self._buffers.of(value, "rows").array()
        return torch.from_numpy(read[:num_tokens, : value.columns].copy())

    # What each operator becomes.

    def _embed(self, index: int, call: calls.Embed) -> None:
        made: PackedLinear = call.table.made
        out = self._buffers.rows(call.out, call.out.columns)
        self._residual = out
        self.native.embed(table=made.matrix, factor=call.factor, out=out)

    def _activation(self, index: int, call: calls.Activation) -> None:
        self._pack(self._buffers.of(call.x, "rows"), call.out)

    def _norm(self, index: int, call: calls.Norm) -> None:
        # Few tokens are normed by each member for itself, without a barrier: only if the call behind the
        # norms does not write to what others may still be reading.
        behind = next((c for c in self._calls[index + 1 :] if not isinstance(c, calls.Norm)), None)
        for precision in self._uses.precisions(call.out):
            self.native.norm(
                x=self._buffers.of(call.x, "rows"),
                weight=layout.padded(call.weight),
                width=call.weight.numel(),
                eps=call.eps,
                for_logits=False,
                is_private=not isinstance(behind, (calls.LinearAdd, calls.NormAdd, type(None))),
                out=self._buffers.activation(call.out, precision),
            )

    def _norm_add(self, index: int, call: calls.NormAdd) -> None:
        self.native.norm_add(
            rows=self._buffers.of(call.rows, "rows"),
            weight=layout.padded(call.weight),
            width=call.weight.numel(),
            eps=call.eps,
            factor=call.factor,
            x=self._buffers.of(call.x, "rows"),
        )

    def _qkv(self, index: int, call: calls.Qkv) -> None:
        weight, made = call.weight, _made(call.weight.made, PackedQkv)
        layer = _layer_of(call.cache)
        out = self._buffers.query(call.out, layer.pool, weight.num_heads)
        scale = self._uses.query_scale(call.out)
        cosines, sines = self._table(call.rope, weight.head_dim, weight.rotary_dim)
        norms = weight.norms
        heads = _C.Heads(
            pool=layer.pool.native, layer=layer.index, num_heads=weight.num_heads, true_dim=weight.head_dim,
            scale=scale, eps=0.0 if norms is None else norms.eps, cosines=cosines, sines=sines,
            q_norm=made.q_norm, k_norm=made.k_norm,
        )  # fmt: skip
        products = [self._product(call.a, part) for part in made.parts]
        if norms is None or not norms.is_whole:
            self.native.qkv(products=products, heads=heads, out=out)
            return
        widths = [part.matrix.num_stored_rows for part in made.parts]
        if len(made.parts) > 1:
            raise ValueError("a norm over all heads needs q, k and v of one format")
        rows = self._buffers.scratch(sum(widths))
        self.native.linear(product=products[0], out=rows)
        self.native.head_rows(rows=rows, heads=heads, has_keys=True, is_whole_norm=True, out=out)
        self._buffers.give_back(rows)

    def _attention(self, index: int, call: calls.Attention) -> None:
        layer = _layer_of(call.cache)
        shape: dict[str, Any] = {
            "q": self._query_of(call, layer), "pool": layer.pool.native, "layer": layer.index,
            "true_dim": call.head_dim, "window": call.window,
        }  # fmt: skip
        precisions = self._uses.precisions(call.out)
        if call.head_dim % layout.STRIP == 0 and len(precisions) == 1:
            out = self._buffers.activation(call.out, precisions[0])
            self.native.attention(**shape, out=out)
            return
        rows = self._buffers.scratch(call.out.columns)
        self.native.attention(**shape, rows=rows)
        self._pack(rows, call.out)
        self._buffers.give_back(rows)

    def _linear(self, index: int, call: calls.Linear) -> None:
        made = _made(call.weight.made, PackedLinear)
        out = self._buffers.rows(call.out, call.out.columns)
        self.native.linear(product=self._product(call.a, made), out=out)

    def _linear_add(self, index: int, call: calls.LinearAdd) -> None:
        made = _made(call.weight.made, PackedLinear)
        product = self._product(call.a, made)
        self.native.linear_add(product=product, factor=call.factor, x=self._buffers.of(call.x, "rows"))

    def _gate_up(self, index: int, call: calls.GateUp) -> None:
        parts = _made(call.weight.made, PackedGateUp).parts
        precisions = self._uses.precisions(call.out)
        if len(parts) == 1 and len(precisions) == 1:
            out = self._buffers.activation(call.out, precisions[0])
            product = self._product(call.a, parts[0])
            self.native.gate_up(product=product, activation=call.activation, out=out)
            return
        if len(parts) == 1:
            raise ValueError("the result of `gate_up` can be taken in one precision only")
        rows = [self._buffers.scratch(call.out.columns) for _ in parts]
        for part, each in zip(parts, rows, strict=True):
            self.native.linear(product=self._product(call.a, part), out=each)
        for precision in precisions:
            out = self._buffers.activation(call.out, precision)
            self.native.act_mul(gate=rows[0], up=rows[1], activation=call.activation, out=out)
        for each in rows:
            self._buffers.give_back(each)

    def _head(self, index: int, call: calls.Head) -> None:
        made = _made(call.weight.made, PackedLinear)
        source = self.native.activation(made.matrix.num_columns, made.precision, for_logits=True)
        self.native.norm(
            x=self._buffers.of(call.x, "rows"), weight=layout.padded(call.norm), width=call.norm.numel(),
            eps=call.eps, for_logits=True, is_private=True, out=source,
        )  # fmt: skip
        product = _C.Product(weight=made.matrix, source=source, bias=made.bias)
        self.native.logits(product=product, vocab_size=call.weight.rows, scale=call.scale, cap=call.cap)

    def _pack(self, rows: Any, value: Value) -> None:
        for precision in self._uses.precisions(value):
            self.native.pack(rows=rows, out=self._buffers.activation(value, precision))

    def _product(self, a: Value, part: PackedLinear) -> Any:
        source = self._buffers.of(a, part.precision)
        return _C.Product(weight=part.matrix, source=source, bias=part.bias)

    def _query_of(self, call: calls.Attention, layer: KvLayer) -> Any:
        """Return the attention's queries; those that were given as rows are brought into their layout."""
        found = self._buffers.of(call.q, "query")
        if found is not None:
            return found
        heads = call.q.columns // call.head_dim
        query = self._buffers.query(call.q, layer.pool, heads)
        shape = _C.Heads(
            pool=layer.pool.native,
            layer=layer.index,
            num_heads=heads,
            true_dim=call.head_dim,
            scale=call.scale,
        )
        rows = self._buffers.of(call.q, "rows")
        self.native.head_rows(rows=rows, heads=shape, has_keys=False, is_whole_norm=False, out=query)
        return query

    def _end_cache_writes(self, index: int) -> None:
        """Say what the rest of a step reads of its tokens, so that it can go on with those drawn after."""
        alive = self._uses.alive_behind(index)
        can_gather = all(value.kind is not Kind.ACTIVATION for value in alive)
        rows = [self._buffers.of(v, "rows") for v in alive if v.kind in (Kind.RESIDUAL, Kind.ROWS)]
        queries = [self._buffers.of(v, "query") for v in alive if v.kind is Kind.QUERY]
        self.native.end_cache_writes(
            can_gather=can_gather and len(queries) <= 1, rows=rows, query=queries[0] if queries else None
        )

    def _take_input(self, value: Value) -> None:
        if value.kind is not Kind.ACTIVATION:
            width = value.columns
            if value.kind is Kind.QUERY:
                heads, head_dim, _ = self._query_shape(value)
                width = heads * -(-head_dim // layout.STRIP) * layout.STRIP
            self._buffers.rows(value, width)
            return
        rows = self._buffers.rows(value, value.columns)
        self._pack(rows, value)

    def _query_shape(self, value: Value) -> tuple[int, int, int]:
        """Return heads, their size and how many dims turn, of a query."""
        for call in self._calls:
            if isinstance(call, calls.Qkv) and call.out is value:
                return call.weight.num_heads, call.weight.head_dim, call.weight.rotary_dim
            if isinstance(call, calls.Attention) and call.q is value:
                return value.columns // call.head_dim, call.head_dim, call.rotary_dim or call.head_dim
        raise ValueError("nothing takes this query")

    def _read_query(self, value: Value, num_tokens: int) -> Tensor:
        heads, head_dim, rotary = self._query_shape(value)
        array = torch.from_numpy(self._buffers.of(value, "query").array()[:num_tokens])
        dtype = {4: torch.float32, 2: torch.bfloat16}.get(array.shape[1] // (heads * head_dim))
        if dtype is None or array.shape[1] != heads * head_dim * dtype.itemsize:
            raise ValueError("queries for an int8 cache are integers: at once, take a cache of floats")
        dims = layout.kept_dims(head_dim, rotary, is_paired=dtype is torch.bfloat16)
        out = torch.empty(num_tokens, heads, head_dim)
        out[..., torch.from_numpy(dims)] = (
            array.contiguous().view(dtype).view(num_tokens, heads, head_dim).float()
        )
        return out.view(num_tokens, -1)

    def _table(
        self, rope: RopeTable | None, head_dim: int, rotary_dim: int
    ) -> tuple[layout.Floats | None, layout.Floats | None]:
        """Return cosines and sines of all pairs of a packed head; those that do not turn have 1 and 0."""
        if rope is None:
            return None, None
        if rope.rotary_dim != rotary_dim:
            raise ValueError(f"the rotary table turns {rope.rotary_dim} dims, the weight {rotary_dim}")
        if id(rope) not in self._tables:
            pairs = -(-head_dim // layout.STRIP) * layout.PANEL
            missing = (0, pairs - rotary_dim // 2)
            cosines, sines = rope.cos, rope.sin
            if missing[1]:  # else they would be copied: 64 MiB for 131,072 positions of Llama 3
                pad = torch.nn.functional.pad
                cosines, sines = pad(cosines, missing, value=1.0), pad(sines, missing)
            self._tables[id(rope)] = (rope, cosines.contiguous().numpy(), sines.contiguous().numpy())
        return self._tables[id(rope)][1:]


_EMITTERS: dict[type[calls.Call], Callable[[CpuProgram, int, Any], None]] = {
    calls.Embed: CpuProgram._embed,
    calls.Activation: CpuProgram._activation,
    calls.Norm: CpuProgram._norm,
    calls.NormAdd: CpuProgram._norm_add,
    calls.Qkv: CpuProgram._qkv,
    calls.Attention: CpuProgram._attention,
    calls.Linear: CpuProgram._linear,
    calls.LinearAdd: CpuProgram._linear_add,
    calls.GateUp: CpuProgram._gate_up,
    calls.Head: CpuProgram._head,
}


def _precisions_of(call: calls.Call) -> list[str]:
    """Return the precisions in which a call's weights are multiplied."""
    made = (
        call.weight.made
        if isinstance(call, (calls.Qkv, calls.GateUp, calls.Linear, calls.LinearAdd))
        else None
    )
    parts = made.parts if isinstance(made, (PackedQkv, PackedGateUp)) else [made]
    return [part.precision for part in parts if isinstance(part, PackedLinear)]


def _made(made: object, kind: type[_Made]) -> _Made:
    if not isinstance(made, kind):
        raise TypeError("a CPU's step is recorded with packed weights: make them with a `Packing`")
    return made


def _layer_of(cache: object) -> KvLayer:
    if not isinstance(cache, KvLayer):
        raise TypeError("a CPU's step is recorded with the layers of a `KvPool`")
    return cache


def _packed_heads(rows: Tensor, num_heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Bring queries [n_tokens, num_heads * head_dim] into the order of packed rows, zeros where these are."""
    order = torch.from_numpy(layout.head_order(num_heads, head_dim, rotary_dim))
    return torch.where(order >= 0, rows[:, order.clamp(min=0)], torch.zeros(()))
