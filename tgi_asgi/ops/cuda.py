"""A recorder's list as a program of a CUDA device, as `cpu_program.py` makes one of a CPU.

A call is a launch of our kernels or a product of torch's, on buffers that stay where they are, so that a list
of calls can be captured as a CUDA graph. Imports without CUDA; the kernels exist where tgi_asgi._cuda was
built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.buffers import Buffers, Uses
from tgi_asgi.ops.cuda_attention import GatheredAttention, can_gather
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_linear import CudaLinear, PlainLinear, QuantLinear, Room
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, DeviceMatrix, joined_halves
from tgi_asgi.ops.cuda_shards import CudaShard, WholeLogits
from tgi_asgi.ops.norm_weight import HeadNorms, NormWeight
from tgi_asgi.ops.recorder import Recorder
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.values import Value
from tgi_asgi.ops.weights import LinearWeight, QkvWeight

_Launch = Callable[["CudaBatch"], None]
_kernels: Any = torch.ops.tgi_cuda


@dataclass(frozen=True, slots=True)
class CudaBatch:
    """The tokens of one step on the device, sequence after sequence: first those of one token each.

    A padding sequence has the context length 0, and its token the slot -1.
    """

    ids: Tensor  # [n_tokens] int32
    positions: Tensor  # [n_tokens] int32
    slots: Tensor  # [n_tokens] int64
    query_start: Tensor  # [n_sequences + 1] int32
    context_len: Tensor  # [n_sequences] int32
    block_table: Tensor  # [n_sequences, max_blocks] int32
    num_decodes: int  # sequences of one token, which come first
    max_query_len: int  # of the others
    # Tokens here and in all of each of the others, which a step that is no graph may know on the host.
    prompt_lens: Sequence[tuple[int, int]] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.context_len.shape[0])


class CudaProgram:
    """Steps of a recorded model on a device.

        program = CudaProgram(recorder, max_tokens=4224, max_rows=128, max_sequences=128, max_blocks=512, ...)
        program.forward(batch)
        program.head(rows)
        program.logits[: len(rows)]

    Args:
        max_tokens, max_sequences, max_rows: of a step, and of logits at a time.
        max_blocks: columns of the block tables.
        dtype: of activations and weights, bfloat16 or float16; the residual and logits are float32.
        is_batch_invariant: a token's results are the same bits whatever else is in the step.
        gathers_prompts: prompts attend by torch over gathered keys and values where that can be.
        shard: which of several devices it is that compute the same steps, each with its part of the weights.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        max_tokens: int,
        max_sequences: int,
        max_rows: int,
        max_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        is_batch_invariant: bool = False,
        gathers_prompts: bool = False,
        shard: CudaShard | None = None,
    ) -> None:
        self._shard = shard
        self._max_tokens, self._max_sequences, self._max_rows = max_tokens, max_sequences, max_rows
        self._max_blocks = max_blocks
        self._dtype, self._device = dtype, device
        self._is_batch_invariant, self._gathers_prompts = is_batch_invariant, gathers_prompts
        self._launches: list[_Launch] = []
        self._head: Callable[[Tensor], None] | None = None
        self._logits = torch.empty(0)
        self._buffers: dict[tuple[object, ...], Tensor] = {}  # of what is done with when its call is
        self._values = Buffers()
        self._moved: dict[int, tuple[object, Any]] = {}  # by id: the host's, and the device's
        self._room = Room(dtype, device)
        self._plans: dict[int, Tensor] = {}  # of decode attention, by window
        uses = Uses(recorder.calls, (), (), lambda call: [])
        for index, call in enumerate(recorder.calls):
            _EMITTERS[type(call)](self, call)
            self._values.free(uses.ending_at(index))
        self._moved.clear()  # the host's own references are all that is left of what was moved

    @property
    def logits(self) -> Tensor:
        """The buffer [max_rows, vocab] float32 that `head` writes."""
        return self._logits

    @property
    def num_calls(self) -> int:
        """How many launches a forward pass is."""
        return len(self._launches)

    def forward(self, batch: CudaBatch) -> None:
        """Compute the residual of all tokens, and write their keys and values."""
        for launch in self._launches:
            launch(batch)

    def head(self, rows: Tensor) -> None:
        """Compute the logits of rows [n_rows] int32 of the last batch: the first of `logits`."""
        assert self._head is not None, "nothing was recorded"
        self._head(rows)

    # What each operator becomes.

    def _embed(self, call: calls.Embed) -> None:
        table = self._dense(call.table.made)
        x = self._make(call.out, torch.float32)
        added, shard = self._floats(call.positions), self._shard

        def launch(batch: CudaBatch) -> None:
            out = x[: batch.num_tokens]
            if shard is None:
                _kernels.embed(batch.ids, table, out)
            else:
                shard.embed(batch.ids, table, out)
            if call.factor != 1.0:
                out.mul_(call.factor)
            if added is not None:
                out.add_(added[batch.positions])

        self._launches.append(launch)

    def _activation(self, call: calls.Activation) -> None:
        x, out = self._in(call.x), self._make(call.out, self._dtype)

        def launch(batch: CudaBatch) -> None:
            out[: batch.num_tokens].copy_(x[: batch.num_tokens])

        self._launches.append(launch)

    def _norm(self, call: calls.Norm) -> None:
        x, out, norm = self._in(call.x), self._make(call.out, self._dtype), self._norm_of(call.weight)

        def launch(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.norm(x[:n], *norm, None, out[:n])

        self._launches.append(launch)

    def _norm_add(self, call: calls.NormAdd) -> None:
        rows, x, norm = self._in(call.rows), self._in(call.x), self._norm_of(call.weight)

        def launch(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.norm_add(rows[:n], *norm, call.factor, x[:n])

        self._launches.append(launch)

    def _norm_residual(self, call: calls.NormResidual) -> None:
        x, norm = self._in(call.x), self._norm_of(call.weight)

        def launch(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.norm(x[:n], *norm, None, x[:n])

        self._launches.append(launch)

    def _norm_of(self, weight: NormWeight) -> tuple[Tensor, Tensor | None, float]:
        """Return a norm's weight and bias on the device, and what keeps it finite."""
        return self._move(weight.weight, torch.float32), self._floats(weight.bias), weight.eps

    def _qkv(self, call: calls.Qkv) -> None:
        layer, weight = _layer_of(call.cache), call.weight
        made: DeviceMatrix = weight.made
        rows = (weight.num_heads + 2 * weight.num_kv_heads) * weight.head_dim
        product = self._product(call.a, made, rows, "qkv")
        clip = call.clip
        if clip is not None:
            self._launches.append(lambda batch: _clamp(product[: batch.num_tokens], clip))
        norms = weight.norms
        if norms is not None and norms.is_whole:
            self._launches.append(self._whole_norms(product, weight, norms))
        cos, sin = self._table(call.rope)
        q = self._make(call.out, self._dtype).view(self._max_tokens, weight.num_heads, weight.head_dim)
        parts: list[Tensor | None] = [None] * 4
        eps, is_last = 0.0, False
        if norms is not None and not norms.is_whole:
            query, key = norms.query, norms.key
            parts = [
                None if part is None else self._head_norm(part, weight)
                for part in (query.weight, key.weight, query.bias, key.bias)
            ]
            eps, is_last = query.eps, norms.is_last

        def launch(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.rope_kv_write(
                product[:n], batch.positions, batch.slots, cos, sin, *parts, is_last, eps,
                layer.key_scale, layer.value_scale, q[:n], layer.pool,
            )  # fmt: skip

        self._launches.append(launch)

    def _whole_norms(self, product: Tensor, weight: QkvWeight, norms: HeadNorms) -> _Launch:
        """Normalise all heads of queries together, and all of keys, in place."""
        scales = [self._head_norm(norm.weight, weight) for norm in (norms.query, norms.key)]
        middle, end = scales[0].numel(), scales[0].numel() + scales[1].numel()
        parts = ((0, middle, scales[0]), (middle, end, scales[1]))

        def launch(batch: CudaBatch) -> None:
            for first, stop, scale in parts:
                part = product[: batch.num_tokens, first:stop]
                wide = part.float()
                mean = wide.square().mean(-1, keepdim=True)
                part.copy_(wide * (mean + norms.query.eps).rsqrt() * scale)

        return launch

    def _head_norm(self, norm: Tensor, weight: QkvWeight) -> Tensor:
        """Return weights or biases of heads' norms on the device, in the order of their rows there."""
        if weight.is_interleaved:
            norm = norm[joined_halves(weight, norm.numel() // weight.head_dim)]
        return self._move(norm, torch.float32)

    def _table(self, rope: RopeTable | None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines on the device; without rotation those of no dims."""
        if rope is not None:
            return self._move(rope.cos, torch.float32), self._move(rope.sin, torch.float32)
        none = self._buffer("no angles", (1, 0), torch.float32)
        return none, none

    def _attention(self, call: calls.Attention) -> None:
        """Sequences of one token by one kernel, the others by another."""
        layer, spec = _layer_of(call.cache), call.spec
        if spec.chunk is not None:
            raise ValueError("attention with `chunk` is not among the CUDA kernels")
        if call.gate is not None:
            raise ValueError("attention with `gate` is not among the CUDA kernels")
        block_size, head_dim = int(layer.pool.shape[3]), call.head_dim
        heads = call.q.columns // head_dim
        query = self._in(call.q).view(self._max_tokens, heads, head_dim)
        out = self._make(call.out, self._dtype).view(self._max_tokens, heads, head_dim)
        num_bytes = _kernels.attention_workspace_bytes(
            self._max_sequences, self._max_blocks, block_size, heads, head_dim
        )
        workspace = self._buffer("workspace", (num_bytes,), torch.uint8)
        seen = spec.window or 0  # as the kernels have it, 0 is all
        plan = self._plan(block_size, seen)
        sinks, slopes = self._floats(spec.sinks), self._floats(spec.slopes)
        gathered = self._gathered(layer, spec)

        def launch(batch: CudaBatch) -> None:
            d, n = batch.num_decodes, batch.num_tokens
            kind = (spec.scale, spec.soft_cap or 0.0, sinks, slopes, layer.key_scale, layer.value_scale)
            if d > 0:
                _kernels.attention_decode(
                    query[:d], layer.pool, batch.context_len[:d], batch.block_table[:d], seen, *kind,
                    plan, workspace, out[:d],
                )  # fmt: skip
            if gathered is not None and batch.prompt_lens:
                gathered.attend(query, batch.block_table[d:], d, batch.prompt_lens, out)
            elif d < batch.num_sequences:
                _kernels.attention_prefill(
                    query[:n], layer.pool, batch.query_start[d:], batch.context_len[d:],
                    batch.block_table[d:], batch.max_query_len, seen, *kind, out[:n],
                )  # fmt: skip

        self._launches.append(launch)

    def _gathered(self, layer: CudaKvLayer, spec: AttentionSpec) -> GatheredAttention | None:
        """Return what prompts attend by in the place of our kernel, if anything."""
        if not self._gathers_prompts or not can_gather(spec):
            return None
        size = self._max_blocks * layer.pool[0].numel()
        kept = self._buffer("gathered", (size,), layer.pool.dtype)
        is_plain = layer.pool.dtype is self._dtype
        room = kept if is_plain else self._buffer("gathered", (size,), self._dtype)
        return GatheredAttention(layer, spec.scale, kept, room)

    def _plan(self, block_size: int, window: int) -> Tensor:
        """Return the plan [max_sequences + 1] of layers with this window, which the first of them makes."""
        if window in self._plans:
            return self._plans[window]
        plan = torch.zeros(self._max_sequences + 1, dtype=torch.int32, device=self._device)
        self._plans[window] = plan

        def launch(batch: CudaBatch) -> None:
            if d := batch.num_decodes:
                _kernels.attention_plan(
                    batch.context_len[:d], batch.block_table[:d], block_size, window, plan
                )

        self._launches.append(launch)
        return plan

    def _linear(self, call: calls.Linear) -> None:
        source, linear = self._in(call.a), self._product_of(call.weight.made)
        out = self._make(call.out, torch.float32)
        add_up = self._add_up(call.weight, torch.float32)

        def launch(batch: CudaBatch) -> None:
            linear.multiply(source[: batch.num_tokens], out[: batch.num_tokens])
            if add_up is not None:
                add_up(out[: batch.num_tokens])

        self._launches.append(launch)

    def _linear_add(self, call: calls.LinearAdd) -> None:
        """The sum in float32."""
        source, x, linear = self._in(call.a), self._in(call.x), self._product_of(call.weight.made)
        product = self._buffer("linear_add", (self._max_tokens, call.weight.rows), self._dtype)
        add_up = self._add_up(call.weight, self._dtype)

        def launch(batch: CudaBatch) -> None:
            n = batch.num_tokens
            if call.factor == 1.0 and add_up is None:
                linear.add(source[:n], x[:n], product[:n])
                return
            linear.multiply(source[:n], product[:n])
            if add_up is not None:
                add_up(product[:n])
            x[:n].add_(product[:n], alpha=call.factor)

        self._launches.append(launch)

    def _add_up(self, weight: LinearWeight, dtype: torch.dtype) -> Callable[[Tensor], None] | None:
        """Return what makes a product of some columns [n_tokens, rows] that of all; None: it has all."""
        shard = self._shard
        if not weight.is_partial or shard is None:
            return None
        parts = None
        if self._is_batch_invariant:
            parts = self._buffer("parts", (shard.group.count * self._max_tokens * weight.rows,), dtype)
        return lambda product: shard.add(product, parts)

    def _up(self, call: calls.Up) -> None:
        product = self._product(call.a, call.weight.made, call.weight.rows, "up product")
        out = self._make(call.out, self._dtype)
        above, below = call.alphas

        def launch(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.activate(product[:n], call.activation, above, below, out[:n])

        self._launches.append(launch)

    def _gate_up(self, call: calls.GateUp) -> None:
        product = self._product(
            call.a, call.weight.made, 2 * call.weight.intermediate_size, "gate_up product"
        )
        out = self._make(call.out, self._dtype)

        def launch(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.gate(product[:n], call.activation, out[:n])

        self._launches.append(launch)

    def _refuse(self, call: calls.Call) -> None:
        raise TypeError(f"{type(call).__name__} is computed on CPUs only, not on CUDA")

    def _make_head(self, call: calls.Head) -> None:
        x, norm = self._in(call.x), self._norm_of(call.norm)
        linear = self._product_of(call.weight.made)
        normed = self._buffer("head", (self._max_rows, call.weight.columns), self._dtype)
        logits = self._buffer("logits", (self._max_rows, call.weight.rows), torch.float32)
        whole = None if self._shard is None else WholeLogits(self._shard, self._max_rows, self._device)
        self._logits = logits if whole is None else whole.logits

        def launch(rows: Tensor) -> None:
            n = rows.shape[0]
            out = logits[:n]
            _kernels.norm(x, *norm, rows, normed[:n])
            linear.multiply(normed[:n], out)
            if call.scale != 1.0:
                out.mul_(call.scale)
            if call.cap != 0.0:
                out.div_(call.cap).tanh_().mul_(call.cap)
            if whole is not None:
                whole.join(out)

        self._head = launch

    def _product(self, a: Value, made: DeviceMatrix, rows: int, name: str) -> Tensor:
        """Launch `a @ W.T (+ bias)`; return the buffer it comes to."""
        source, out = self._in(a), self._buffer(name, (self._max_tokens, rows), self._dtype)
        linear = self._product_of(made)

        def launch(batch: CudaBatch) -> None:
            linear.multiply(source[: batch.num_tokens], out[: batch.num_tokens])

        self._launches.append(launch)
        return out

    def _product_of(self, made: DeviceMatrix) -> CudaLinear:
        """Return the product with this weight, which is moved to the device."""
        if not isinstance(made, DeviceMatrix):
            raise TypeError("a CUDA step is recorded with a device's weights: make them with a `Repacking`")
        bias = self._floats(made.bias)
        if isinstance(made.matrix, CudaQuantMatrix):
            codes = self._move_codes(made.matrix)
            return QuantLinear(codes, bias, self._room, is_batch_invariant=self._is_batch_invariant)
        return PlainLinear(self._move(made.matrix), bias, is_batch_invariant=self._is_batch_invariant)

    def _dense(self, made: DeviceMatrix) -> Tensor:
        """Return a matrix on the device with its weights side by side, as `embed` gathers them."""
        if not isinstance(made.matrix, CudaQuantMatrix):
            return self._move(made.matrix)
        return self._move_codes(made.matrix).plain(self._dtype)

    def _move_codes(self, matrix: CudaQuantMatrix) -> CudaQuantMatrix:
        """Return the matrix on the device; the same matrix is moved once."""
        kept = self._moved.setdefault(id(matrix), (matrix, None))
        if kept[1] is None:
            self._moved[id(matrix)] = kept = (matrix, matrix.to(self._device))
        found: CudaQuantMatrix = kept[1]
        return found

    def _move(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor on the device; the same tensor is moved once."""
        kept = self._moved.get(id(tensor))
        if kept is None:
            moved = tensor.to(self._device, dtype or self._dtype).contiguous()
            self._moved[id(tensor)] = kept = (tensor, moved)
        found: Tensor = kept[1]
        return found

    def _floats(self, tensor: Tensor | None) -> Tensor | None:
        """Return the tensor on the device in float32, if there is one."""
        return None if tensor is None else self._move(tensor, torch.float32)

    def _make(self, value: Value, dtype: torch.dtype) -> Tensor:
        """Give a value its buffer [max_tokens, columns]."""
        shape = (self._max_tokens, value.columns)
        made: Tensor = self._values.hold(
            value, "rows", (shape, dtype), lambda: torch.zeros(shape, dtype=dtype, device=self._device)
        )
        return made

    def _in(self, value: Value) -> Tensor:
        """Return the buffer of a value."""
        found: Tensor = self._values.of(value, "rows")
        return found

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the buffer of that name, which calls share: each is done with it when the next runs."""
        key = (name, shape, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._buffers[key]


_CPU_ALONE = (
    calls.Route, calls.ExpertsAdd, calls.GatedAdd, calls.GatedNorm, calls.ShortConv, calls.SelectiveScan,
    calls.DeltaRule, calls.LatentQkv, calls.HeadsLinear,
)  # fmt: skip
_EMITTERS: dict[type[calls.Call], Callable[[CudaProgram, Any], None]] = {
    calls.Embed: CudaProgram._embed,
    calls.Activation: CudaProgram._activation,
    calls.Norm: CudaProgram._norm,
    calls.NormAdd: CudaProgram._norm_add,
    calls.NormResidual: CudaProgram._norm_residual,
    calls.Qkv: CudaProgram._qkv,
    calls.Attention: CudaProgram._attention,
    calls.Linear: CudaProgram._linear,
    calls.LinearAdd: CudaProgram._linear_add,
    calls.Up: CudaProgram._up,
    calls.GateUp: CudaProgram._gate_up,
    calls.Head: CudaProgram._make_head,
    **dict.fromkeys(_CPU_ALONE, CudaProgram._refuse),
}


def _clamp(product: Tensor, most: float) -> None:
    product.clamp_(-most, most)


def _layer_of(cache: object) -> CudaKvLayer:
    if not isinstance(cache, CudaKvLayer):
        raise TypeError("a CUDA step is recorded with `CudaKvLayer`s")
    return cache
