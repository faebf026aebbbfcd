"""Lowering of recorded calls to CPU kernels: chooses buffers and appends calls to a C++ program.

`cpu_program.py` goes through the list once. An activation is written once per form that its consumers need: a
precision, and an order of columns. A buffer is reused as soon as no later call reads its contents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from tgi_asgi import _C
from tgi_asgi.ops import calls, layout
from tgi_asgi.ops.adapters import AdapterLayout
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.buffers import CpuBuffers, Liveness
from tgi_asgi.ops.column_order import Form
from tgi_asgi.ops.cpu_state_calls import StateCalls
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.packing import PackedExperts, PackedGateUp, PackedLinear, PackedQkv
from tgi_asgi.ops.recorder import Call, Kind, Value
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.shards import Shard

_Made = TypeVar("_Made")
# Calls that change the residual, or rows, in place.
_IN_PLACE = (
    calls.LinearAdd, calls.NormAdd, calls.NormInPlace, calls.EmbedAdd, calls.ExpertsAdd, calls.GatedAdd,
    calls.ImageRows,
)  # fmt: skip
_PRODUCTS = (calls.Qkv, calls.Up, calls.GateUp, calls.Linear, calls.LinearAdd, calls.HeadsLinear)
# Calls that write what later steps read, besides `Qkv` with keys.
_CACHE_WRITERS = (
    calls.LatentQkv, calls.ShortConv, calls.SelectiveScan, calls.ChannelScan, calls.DeltaRule,
)  # fmt: skip


class CpuCalls(StateCalls):
    """Lowers recorded calls to those of an extension program.

    Args:
        native: Program to append to.
        recorded: The recorded calls.
        adapters: Adapters that may change the program's products.
        shard: The program's shard; None: the model is not split.

    Attributes:
        buffers: The values' buffers.
        residual: The rows of the residual; None before it exists.
    """

    def __init__(
        self,
        native: _C.Program,
        recorded: Sequence[Call],
        adapters: AdapterLayout | None = None,
        shard: Shard | None = None,
    ) -> None:
        self._adapters, self._shard = adapters, shard
        self.buffers = CpuBuffers(native)
        self.residual: _C.Rows | None = None
        self._native, self._recorded = native, recorded
        self._index = 0  # of the call that is being emitted
        self._liveness = Liveness(recorded, _forms_of)
        self._tables: dict[int, tuple[RopeTable, Floats, Floats]] = {}

    def emit_all(self) -> None:
        """Emit all calls; once no call needs all tokens, declare what the remaining calls read."""
        last = max((index for index, call in enumerate(self._recorded) if _writes_cache(call)), default=-1)
        if last >= 0:  # these are for all tokens, too
            of_ids = (calls.EmbedAdd, calls.ImageRows)
            adding = (index for index, call in enumerate(self._recorded) if isinstance(call, of_ids))
            last = max(last, *adding, -1)
        for index, call in enumerate(self._recorded):
            self._index = index
            _EMITTERS[type(call)](self, call)
            self._reorder(call.out)
            if index == last:
                self._end_cache_writes(index)
            self.buffers.free(self._liveness.ending_at(index))

    def _embed(self, call: calls.Embed) -> None:
        made = _in_order(call.table.made)
        out = self.buffers.assign_rows(call.out, call.out.columns)
        self.residual = out
        positions = None
        if call.positions is not None and (self._shard is None or self._shard.group.rank == 0):
            positions = layout.padded(call.positions)
        to = out if self._shard is None else self._native.partial_sum()
        self._native.embed(table=made.matrix, factor=call.factor, positions=positions, out=to)
        if self._shard is not None:
            self._native.sum_shards(partial_sum=to, factor=1.0, adds=False, x=out)

    def _embed_add(self, call: calls.EmbedAdd) -> None:
        made = _in_order(call.table.made)
        rows = self.buffers.rows_of(call.rows)
        self._native.embed_add(table=made.matrix, factor=call.factor, rows=rows)

    def _image_rows(self, call: calls.ImageRows) -> None:
        x = self.buffers.rows_of(call.x)
        self._native.image_rows(x=x, level=call.level, adds=call.level > 0)

    def _activation(self, call: calls.Activation) -> None:
        columns = call.out.columns if call.out.columns < call.x.columns else None
        self._pack(self.buffers.rows_of(call.x), call.out, columns)

    def _norm(self, call: calls.Norm) -> None:
        # For few tokens, each team member computes the norm for itself, without a barrier. That is safe only
        # if the call after the norms does not write what other members may still be reading: neither the
        # residual, nor a buffer of x that is reused because x ends here. `linear_add` cannot read a private
        # activation.
        following = next(
            (c for c in self._recorded[self._index + 1 :] if not isinstance(c, calls.Norm)), None
        )
        is_private = (
            not isinstance(following, (*_IN_PLACE, type(None)))
            and not any(isinstance(c, calls.LinearAdd) and c.a is call.out for c in self._recorded)
            and call.x.root not in self._liveness.ending_at(self._index)
        )
        for precision in self._liveness.precisions(call.out):
            self._native.norm(
                x=self.buffers.rows_of(call.x),
                norm=_norm_of(call.weight),
                for_logits=False,
                is_private=is_private,
                out=self.buffers.assign_activation(call.out, precision),
            )

    def _norm_add(self, call: calls.NormAdd) -> None:
        self._native.norm_add(
            rows=self.buffers.rows_of(call.rows),
            norm=_norm_of(call.weight),
            factor=call.factor,
            scale=call.scale,
            x=self.buffers.rows_of(call.x),
        )

    def _norm_in_place(self, call: calls.NormInPlace) -> None:
        self._native.norm_in_place(
            norm=_norm_of(call.weight), x=self.buffers.rows_of(call.x), first_column=call.first_column
        )

    def _qkv(self, call: calls.Qkv) -> None:
        weight, made = call.weight, _made(call.weight.made, PackedQkv)
        layer = _layer_of(call.cache)
        heads = weight.heads
        out = self.buffers.assign_query(call.out, layer, heads.num_heads)
        scale = self._liveness.query_scale(call.out)
        cosines, sines = self._table(call.rope, heads.rotary_dim)
        norms = weight.norms
        native = _C.Heads(
            pool=layer.pool.native, layer=layer.index, num_heads=heads.num_heads, true_dim=heads.head_dim,
            scale=scale, cosines=cosines, sines=sines, norms=made.norms, clip=call.clip or 0.0,
            query_scales=call.query_scales,
        )  # fmt: skip
        products = [self._product(call.a, part) for part in made.parts]
        if norms is None or not norms.is_whole:
            self._native.qkv(products=products, heads=native, has_keys=heads.has_keys, out=out)
            return
        widths = [part.matrix.num_stored_rows for part in made.parts]
        rows = self.buffers.scratch(sum(widths))
        for part, product in enumerate(products):
            self._native.linear(product=product, out=rows, first_column=sum(widths[:part]))
        self._native.head_rows(rows=rows, heads=native, has_keys=heads.has_keys, out=out)
        self.buffers.release(rows)

    def _latent_qkv(self, call: calls.LatentQkv) -> None:
        layer = call.cache
        num_heads = call.out.columns // layer.head_dim
        scale, norm = self._liveness.query_scale(call.out), call.norm
        heads = _C.LatentHeads(
            pool=layer.pool.native, layer=layer.index, num_heads=num_heads,
            scale=1.0 if scale is None else scale, norm=norm.weight, eps=norm.eps,
            cosines=call.rope.cos, sines=call.rope.sin, rotary_column=call.rotary_column,
        )  # fmt: skip
        absorbed, rotary, latents = (
            self.buffers.rows_of(value) for value in (call.absorbed, call.rotary, call.latents)
        )
        out = self.buffers.assign_query(call.out, layer, num_heads)
        self._native.latent_qkv(absorbed=absorbed, rotary=rotary, latents=latents, heads=heads, out=out)

    def _heads_linear(self, call: calls.HeadsLinear) -> None:
        made = _in_order(call.weight.made)
        out = self.buffers.assign_rows(call.out, call.out.columns)
        product = _C.Product(weight=made.matrix, source=self.buffers.activation_of(call.a, made.precision))
        self._native.heads_linear(product=product, num_heads=call.weight.num_heads, out=out)

    def _attention(self, call: calls.Attention) -> None:
        layer = _layer_of(call.cache)
        shape: dict[str, Any] = {
            "q": self.buffers.query_of(call.q), "pool": layer.pool.native, "layer": layer.index,
            "true_dim": call.value_dim, "spec": call.spec.native,
        }  # fmt: skip
        if call.out.kind is Kind.ROWS:
            self._native.attention(**shape, rows=self.buffers.assign_rows(call.out, call.out.columns))
            return
        precisions = self._liveness.precisions(call.out)
        if call.gate is None and call.value_dim % layout.STRIP == 0 and len(precisions) == 1:
            out = self.buffers.assign_activation(call.out, precisions[0])
            self._native.attention(**shape, out=out)
            return
        rows = self.buffers.head_rows(call.out.columns)
        self._native.attention(**shape, rows=rows)
        if call.gate is None:
            self._pack(rows, call.out)
        else:
            self._pack_gated(rows, call.gate, call.out)
        self.buffers.release(rows)

    def _pack_gated(self, rows: _C.Rows, gate: Value, out: Value) -> None:
        norm = _C.GatedNorm(
            width=out.columns, group_width=out.columns, eps=0.0, weight=None, is_gate_first=False,
            is_sigmoid=True, gate_scale=1.0, gate_width=out.columns // gate.columns,
        )  # fmt: skip
        gated = self.buffers.scratch(out.columns)
        self._native.gated_norm(rows=rows, gate=self.buffers.rows_of(gate), norm=norm, out=gated)
        self._pack(gated, out)
        self.buffers.release(gated)

    def _linear(self, call: calls.Linear) -> None:
        made = _made(call.weight.made, PackedLinear)
        out = self.buffers.assign_rows(call.out, call.out.columns)
        product = self._product(call.a, made)
        if call.weight.is_partial:
            self._sum(product, 1.0, adds=False, x=out)
        else:
            self._native.linear(product=product, out=out)

    def _linear_add(self, call: calls.LinearAdd) -> None:
        made = _made(call.weight.made, PackedLinear)
        product, x = self._product(call.a, made), self.buffers.rows_of(call.x)
        if call.weight.is_partial:
            self._sum(product, call.factor, adds=True, x=x)
        else:
            self._native.linear_add(product=product, factor=call.factor, x=x)

    def _sum(self, product: _C.Product, factor: float, *, adds: bool, x: _C.Rows) -> None:
        """Emit a product whose partial sums the shards compute, and the addition of these."""
        partial_sum = self._native.partial_sum()
        self._native.linear(product=product, out=partial_sum)
        self._native.sum_shards(partial_sum=partial_sum, factor=factor, adds=adds, x=x)

    def _up(self, call: calls.Up) -> None:
        made = _made(call.weight.made, PackedLinear)
        for precision in self._liveness.precisions(call.out):  # one, unless consumers have several formats
            out = self.buffers.assign_activation(call.out, precision)
            product = self._product(call.a, made)
            self._native.up(product=product, activation=call.activation, alphas=call.alphas, out=out)

    def _gate_up(self, call: calls.GateUp) -> None:
        parts = _made(call.weight.made, PackedGateUp).parts
        precisions = self._liveness.precisions(call.out)
        if len(parts) == 1:
            for precision in precisions:  # one, unless the consumers' weights have several formats
                out = self.buffers.assign_activation(call.out, precision)
                product = self._product(call.a, parts[0])
                self._native.gate_up(product=product, activation=call.activation, out=out)
            return
        rows = [self.buffers.scratch(call.out.columns) for _ in parts]
        for part, each in zip(parts, rows, strict=True):
            self._native.linear(product=self._product(call.a, part), out=each)
        for precision in precisions:
            out = self.buffers.assign_activation(call.out, precision)
            self._native.act_mul(
                gate=rows[0], up=rows[1], first_column=0, activation=call.activation, out=out
            )
        for each in rows:
            self.buffers.release(each)

    def _act_mul(self, call: calls.ActMul) -> None:
        gate, rows = self.buffers.rows_of(call.gate), self.buffers.rows_of(call.rows)
        for precision in self._liveness.precisions(call.out):
            self._native.act_mul(
                gate=gate, up=rows, first_column=call.first_column, activation=call.activation,
                out=self.buffers.assign_activation(call.out, precision),
            )  # fmt: skip

    def _route(self, call: calls.Route) -> None:
        spec = call.spec
        out = self.buffers.assign_routing(call.out, spec.num_experts, spec.top_k)
        self._native.route(logits=self.buffers.rows_of(call.logits), spec=spec.native, out=out)

    def _experts(self, call: calls.Experts) -> None:
        out = self.buffers.assign_rows(call.out, call.out.columns)
        self._sum_experts(call, 1.0, adds=False, out=out)

    def _experts_add(self, call: calls.ExpertsAdd) -> None:
        self._sum_experts(call, call.factor, adds=True, out=self.buffers.rows_of(call.x))

    def _sum_experts(
        self, call: calls.Experts | calls.ExpertsAdd, factor: float, *, adds: bool, out: _C.Rows
    ) -> None:
        if not call.weight.is_partial:
            self._emit_experts(call, factor, adds=adds, out=out)
            return
        partial_sum = self._native.partial_sum()
        self._emit_experts(call, 1.0, adds=False, out=partial_sum)
        self._native.sum_shards(partial_sum=partial_sum, factor=factor, adds=adds, x=out)

    def _emit_experts(
        self, call: calls.Experts | calls.ExpertsAdd, factor: float, *, adds: bool, out: _C.Rows
    ) -> None:
        made, weight = _made(call.weight.made, PackedExperts), call.weight
        clamped = {} if call.clamped is None else asdict(call.clamped)
        mlps = _C.ExpertMlps(
            gate_up=made.gate_up, down=made.down, activation=call.activation, is_gated=weight.is_gated,
            **clamped,
        )  # fmt: skip
        room = [
            self.buffers.expert_rows(columns, precision, weight.num_experts)
            for columns, precision in (
                (weight.columns, made.precision),
                (weight.intermediate_size, made.inner_precision),
            )
        ]
        self._native.experts(
            source=self.buffers.activation_of(call.a, made.precision),
            routing=self.buffers.routing_of(call.routing), mlps=mlps, gathered=room[0], inner=room[1],
            factor=factor, adds=adds, out=out,
        )  # fmt: skip
        for each in room:
            self.buffers.release(each)

    def _gated_add(self, call: calls.GatedAdd) -> None:
        rows, gate, x = (self.buffers.rows_of(value) for value in (call.rows, call.gate, call.x))
        self._native.gated_add(rows=rows, gate=gate, factor=call.factor, x=x)

    def _head(self, call: calls.Head) -> None:
        if self._index != len(self._recorded) - 1:
            raise ValueError("`head` must be the last operator: it reads the final residual")
        made = _in_order(call.weight.made)
        source = self._native.activation(made.matrix.num_columns, made.precision, for_logits=True)
        self._native.norm(
            x=self.buffers.rows_of(call.x), norm=_norm_of(call.norm), for_logits=True, is_private=True,
            out=source,
        )  # fmt: skip
        product = _C.Product(weight=made.matrix, source=source, bias=made.bias)
        self._native.logits(product=product, vocab_size=call.weight.rows, scale=call.scale, cap=call.cap)

    def _pack(self, rows: _C.Rows, value: Value, columns: int | None = None) -> None:
        for precision in self._liveness.precisions(value):
            out = self.buffers.assign_activation(value, precision)
            self._native.pack(rows=rows, out=out, columns=columns)

    def _reorder(self, value: Value) -> None:
        """Write an activation's forms with an order of columns: one for all products that share it."""
        for form in self._liveness.ordered_forms(value):
            self._native.reorder(
                source=self.buffers.activation_of(value, "float32"),
                order=form.order.indices,
                out=self.buffers.assign_activation(value, form),
            )

    def _product(self, a: Value, part: PackedLinear) -> _C.Product:
        source = self.buffers.activation_of(a, part.form)
        number = None if self._adapters is None else self._adapters.product(part)
        return _C.Product(weight=part.matrix, source=source, bias=part.bias, adapter=number)

    def _end_cache_writes(self, index: int) -> None:
        """Declare what the rest of a step reads, so that only tokens that need logits continue."""
        alive = self._liveness.alive_after(index)
        can_gather = all(value.kind not in (Kind.ACTIVATION, Kind.ROUTING) for value in alive)
        queries = [self.buffers.query_of(value) for value in alive if value.kind is Kind.QUERY]
        found = [self.buffers.find_rows(value) for value in alive]
        rows = [each for each in found if each is not None]
        self._native.end_cache_writes(
            can_gather=can_gather and len(queries) <= 1, rows=rows, query=queries[0] if queries else None
        )

    def _table(self, rope: RopeTable | None, rotary_dim: int) -> tuple[Floats | None, Floats | None]:
        """Return cosines and sines of a packed head's first strips, whose last pairs may not be rotated."""
        if rope is None:
            return None, None
        if rope.rotary_dim != rotary_dim:
            raise ValueError(f"the rotary table turns {rope.rotary_dim} dims, the weight {rotary_dim}")
        if id(rope) not in self._tables:
            # If 0, nothing is copied: a table of 131,072 positions has 64 MiB.
            missing = -(rotary_dim // 2) % layout.PANEL
            cosines = layout.pad_columns(rope.cos, missing, 1.0)
            self._tables[id(rope)] = (rope, cosines, layout.pad_columns(rope.sin, missing))
        return self._tables[id(rope)][1:]


_EMITTERS: dict[type[Call], Callable[[CpuCalls, Any], None]] = {
    calls.Embed: CpuCalls._embed,
    calls.EmbedAdd: CpuCalls._embed_add,
    calls.ImageRows: CpuCalls._image_rows,
    calls.Activation: CpuCalls._activation,
    calls.Norm: CpuCalls._norm,
    calls.NormAdd: CpuCalls._norm_add,
    calls.NormInPlace: CpuCalls._norm_in_place,
    calls.Qkv: CpuCalls._qkv,
    calls.LatentQkv: CpuCalls._latent_qkv,
    calls.HeadsLinear: CpuCalls._heads_linear,
    calls.Attention: CpuCalls._attention,
    calls.Linear: CpuCalls._linear,
    calls.LinearAdd: CpuCalls._linear_add,
    calls.Up: CpuCalls._up,
    calls.GateUp: CpuCalls._gate_up,
    calls.ActMul: CpuCalls._act_mul,
    calls.Route: CpuCalls._route,
    calls.Experts: CpuCalls._experts,
    calls.ExpertsAdd: CpuCalls._experts_add,
    calls.GatedAdd: CpuCalls._gated_add,
    calls.ShortConv: CpuCalls._short_conv,
    calls.SelectiveScan: CpuCalls._selective_scan,
    calls.ChannelScan: CpuCalls._channel_scan,
    calls.DeltaRule: CpuCalls._delta_rule,
    calls.GatedNorm: CpuCalls._gated_norm,
    calls.Head: CpuCalls._head,
}


def _writes_cache(call: Call) -> bool:
    if isinstance(call, calls.Qkv):
        return call.weight.heads.has_keys
    return isinstance(call, _CACHE_WRITERS)


def _forms_of(call: Call) -> list[Form]:
    """Return the forms in which a call's products read its activation."""
    if isinstance(call, (calls.Experts, calls.ExpertsAdd)):
        return [_made(call.weight.made, PackedExperts).precision]
    made = call.weight.made if isinstance(call, _PRODUCTS) else None
    parts = made.parts if isinstance(made, (PackedQkv, PackedGateUp)) else [made]
    return [part.form for part in parts if isinstance(part, PackedLinear)]


def _norm_of(norm: NormWeight) -> _C.Norm:
    bias = None if norm.bias is None else layout.padded(norm.bias)
    return _C.Norm(weight=layout.padded(norm.weight), bias=bias, width=norm.columns, eps=norm.eps)


def _made(made: object, kind: type[_Made]) -> _Made:
    if not isinstance(made, kind):
        raise TypeError("a CPU's step is recorded with packed weights: make them with a `Packing`")
    return made


def _in_order(made: object) -> PackedLinear:
    """Return the packed matrix of a call whose input is never reordered."""
    found = _made(made, PackedLinear)
    if found.order is not None:
        raise ValueError("an embedding, a head and heads' matrices must have their columns in order")
    return found


def _layer_of(cache: object) -> KvLayer:
    if not isinstance(cache, KvLayer):
        raise TypeError("a CPU's step is recorded with the layers of a `KvPool`")
    return cache
