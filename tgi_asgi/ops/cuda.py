"""The step program of a CUDA device: a model's forward pass and head, recorded once as a list of calls.

To record, the model's own code is called with handles in place of tensors, as on the CPU (program.py); here
a call is a launch of our kernels or a product of torch's, on buffers that stay where they are, so that a list
of calls can be captured as a CUDA graph. Imports without CUDA; the operators exist where the extension was
built with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tgi_asgi.ops.attention import AttentionTables
from tgi_asgi.ops.cuda_linear import CudaLinear, PlainLinear, QuantLinear, Room
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.program import ProgramInputs
from tgi_asgi.ops.recorded import Recorded
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.weights import GateUpWeight, LinearWeight, QkvWeight

_Call = Callable[["CudaBatch"], None]
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

    @property
    def num_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.context_len.shape[0])


@dataclass(slots=True)
class CudaKvLayer:
    """One layer's keys and values; what `models` passes through as a `KvLayer`.

    The pool may be replaced by one of more blocks until the first graph is captured.
    """

    pool: Tensor  # [num_blocks, 2 (key, value), num_kv_heads, block_size, head_dim]
    key_scale: float = 1.0  # keys and values are stored divided by these
    value_scale: float = 1.0


def make_cuda_pools(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Make the pools of all layers, of zeros: a block that was never written must not hold NaN."""
    shape = (num_blocks, 2, num_kv_heads, block_size, head_dim)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]


def copy_cuda_blocks(layers: Sequence[CudaKvLayer], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks (from, to) in every layer, as if all at once: no block is both."""
    if not pairs:
        return
    host = torch.tensor(pairs, dtype=torch.int64)  # [num_pairs, 2]
    table = host.to(layers[0].pool.device, non_blocking=True)  # CUDA has its copy when the call returns
    for layer in layers:
        pool = layer.pool.view(torch.uint8)  # torch does not index floats of eight bits
        pool[table[:, 1]] = pool[table[:, 0]]


class _Value(Recorded):
    """A handle that knows the buffer its value will be in."""

    __slots__ = ("buffer",)

    def __init__(self, program: CudaProgram, kind: str, buffer: Tensor) -> None:
        super().__init__(cast(Any, program), kind)
        self.buffer = buffer


class CudaProgram:
    """Records a model, then runs its steps on a device.

        program = CudaProgram(max_tokens=4224, max_rows=128, max_sequences=128, max_blocks=512, ...)
        x = model.forward(program.batch, kv)
        model.logits(x, program.inputs.rows)
        program.forward(batch)
        program.head(rows)
        program.logits[: len(rows)]

    Args:
        max_tokens, max_sequences, max_rows: of a step, and of logits at a time.
        max_blocks: columns of the block tables.
        dtype: of activations and weights, bfloat16 or float16; the residual and logits are float32.
        is_batch_invariant: a token's results are the same bits whatever else is in the step.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_sequences: int,
        max_rows: int,
        max_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        is_batch_invariant: bool = False,
    ) -> None:
        self._max_tokens, self._max_sequences, self._max_rows = max_tokens, max_sequences, max_rows
        self._max_blocks = max_blocks
        self._dtype, self._device = dtype, device
        self._is_batch_invariant = is_batch_invariant
        self._calls: list[_Call] = []
        self._head: Callable[[Tensor], None] | None = None
        self._logits = torch.empty(0)
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the host's tensor, the device's
        self._moved_codes: dict[int, tuple[CudaQuantMatrix, CudaQuantMatrix]] = {}
        self._room = Room(dtype, device)
        self._planned: tuple[int, int] | None = None  # block size and window
        self._x = torch.empty(0)
        handle = cast(Tensor, Recorded(cast(Any, self), "input"))
        self.inputs = ProgramInputs(handle, handle, handle, AttentionTables(handle, handle, handle), handle)

    @property
    def logits(self) -> Tensor:
        """The buffer [max_rows, vocab] float32 that `head` writes."""
        return self._logits

    @property
    def num_calls(self) -> int:
        """How many calls a forward pass is."""
        return len(self._calls)

    def forward(self, batch: CudaBatch) -> None:
        """Compute the residual of all tokens, and write their keys and values."""
        for call in self._calls:
            call(batch)

    def head(self, rows: Tensor) -> None:
        """Compute the logits of rows [n_rows] int32 of the last batch: the first of `logits`."""
        assert self._head is not None, "nothing was recorded"
        self._head(rows)

    # What the operators call when they are given a handle.

    def record_embed(self, weight: LinearWeight) -> Tensor:
        """Record `embed`."""
        table = self._dense(weight)
        self._x = self._buffer("x", (self._max_tokens, weight.columns), torch.float32)
        self._calls.append(lambda batch: _kernels.embed(batch.ids, table, self._x[: batch.num_tokens]))
        return cast(Tensor, _Value(self, "residual", self._x))

    def record_norm(self, weight: Tensor, eps: float) -> Tensor:
        """Record `norm`."""
        scale = self._move(weight, torch.float32)
        out = self._buffer("norm", (self._max_tokens, weight.numel()), self._dtype)

        def call(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.rms_norm(self._x[:n], scale, eps, None, out[:n])

        return self._append(call, "activation", out)

    def record_qkv(self, a: Tensor, weight: QkvWeight, kv: KvLayer, rope: RopeTable) -> Tensor:
        """Record `qkv`: the product, then rotation and the write in one kernel."""
        layer = cast(CudaKvLayer, kv)
        product = self._product(a, weight.linear, "qkv")
        cos, sin = self._move(rope.cos, torch.float32), self._move(rope.sin, torch.float32)
        q = self._buffer("q", (self._max_tokens, weight.num_heads, weight.head_dim), self._dtype)
        q_norm = k_norm = None
        eps = 0.0
        if weight.norms is not None:
            q_norm, k_norm = (
                self._move(norm, torch.float32) for norm in (weight.norms.query, weight.norms.key)
            )
            eps = weight.norms.eps

        def call(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.rope_kv_write(
                product[:n], batch.positions, batch.slots, cos, sin, q_norm, k_norm, eps, layer.key_scale,
                layer.value_scale, q[:n], layer.pool,
            )  # fmt: skip

        return self._append(call, "query", q)

    def record_attention(self, q: Tensor, kv: KvLayer, scale: float, window: int | None) -> Tensor:
        """Record `attention`: sequences of one token by one kernel, the others by another."""
        layer, query = cast(CudaKvLayer, kv), _buffer_of(q)
        block_size = int(layer.pool.shape[3])
        heads, head_dim = int(query.shape[1]), int(query.shape[2])
        out = self._buffer("attention", tuple(query.shape), self._dtype)
        num_bytes = _kernels.attention_workspace_bytes(
            self._max_sequences, self._max_blocks, block_size, heads, head_dim
        )
        workspace = self._buffer("workspace", (num_bytes,), torch.uint8)
        seen = window or 0  # as the kernels have it, 0 is all
        if self._planned is None:  # the first layer's plan serves all
            self._planned = (block_size, seen)
            self._calls.append(lambda batch: _plan(batch, block_size, seen, workspace))
        if self._planned != (block_size, seen):
            raise ValueError("all layers of a program must have one block size and one window")

        def call(batch: CudaBatch) -> None:
            d, n = batch.num_decodes, batch.num_tokens
            scales = (scale, layer.key_scale, layer.value_scale)
            if d > 0:
                _kernels.attention_decode(
                    query[:d], layer.pool, batch.context_len[:d], batch.block_table[:d], seen, *scales,
                    workspace, out[:d],
                )  # fmt: skip
            if d < batch.num_sequences:
                _kernels.attention_prefill(
                    query[:n], layer.pool, batch.query_start[d:], batch.context_len[d:],
                    batch.block_table[d:], batch.max_query_len, seen, *scales, out[:n],
                )  # fmt: skip

        return self._append(call, "activation", out.view(self._max_tokens, heads * head_dim))

    def record_linear_add(self, a: Tensor, weight: LinearWeight, x: Tensor) -> Tensor:
        """Record `linear_add`: the sum in float32."""
        source, linear = _buffer_of(a), self._linear(weight)
        product = self._buffer("linear_add", (self._max_tokens, weight.rows), self._dtype)

        def call(batch: CudaBatch) -> None:
            n = batch.num_tokens
            linear.add(source[:n], self._x[:n], product[:n])

        self._calls.append(call)
        return x

    def record_gate_up(self, a: Tensor, weight: GateUpWeight, activation: str) -> Tensor:
        """Record `gate_up`."""
        product = self._product(a, weight.linear, "gate_up product")
        out = self._buffer("gate_up", (self._max_tokens, weight.intermediate_size), self._dtype)

        def call(batch: CudaBatch) -> None:
            n = batch.num_tokens
            _kernels.act_mul(product[:n], activation, out[:n])

        return self._append(call, "activation", out)

    def record_head(self, norm_weight: Tensor, eps: float, weight: LinearWeight) -> Tensor:
        """Record `head`."""
        scale = self._move(norm_weight, torch.float32)
        linear = self._linear(weight)
        normed = self._buffer("head", (self._max_rows, weight.columns), self._dtype)
        self._logits = self._buffer("logits", (self._max_rows, weight.rows), torch.float32)

        def call(rows: Tensor) -> None:
            n = rows.shape[0]
            _kernels.rms_norm(self._x, scale, eps, rows, normed[:n])
            linear.multiply(normed[:n], self._logits[:n])

        self._head = call
        return cast(Tensor, _Value(self, "logits", self._logits))

    def _product(self, a: Tensor, weight: LinearWeight, name: str) -> Tensor:
        """Record `a @ W.T (+ bias)`; return the buffer it comes to."""
        source, out = _buffer_of(a), self._buffer(name, (self._max_tokens, weight.rows), self._dtype)
        linear = self._linear(weight)

        def call(batch: CudaBatch) -> None:
            n = batch.num_tokens
            linear.multiply(source[:n], out[:n])

        self._calls.append(call)
        return out

    def _linear(self, weight: LinearWeight) -> CudaLinear:
        """Return the product with this weight, which is moved to the device."""
        bias = None if weight.bias is None else self._move(weight.bias, torch.float32)
        if isinstance(weight.matrix, CudaQuantMatrix):
            return QuantLinear(
                self._move_codes(weight.matrix), bias, self._room, is_batch_invariant=self._is_batch_invariant
            )
        return PlainLinear(self._move(weight.matrix), bias, is_batch_invariant=self._is_batch_invariant)

    def _dense(self, weight: LinearWeight) -> Tensor:
        """Return a matrix on the device with its weights side by side, as `embed` gathers them."""
        if not isinstance(weight.matrix, CudaQuantMatrix):
            return self._move(weight.matrix)
        return self._move_codes(weight.matrix).plain(self._dtype)

    def _move_codes(self, matrix: CudaQuantMatrix) -> CudaQuantMatrix:
        """Return the matrix on the device; the same matrix is moved once."""
        kept = self._moved_codes.get(id(matrix))
        if kept is None:
            self._moved_codes[id(matrix)] = kept = (matrix, matrix.to(self._device))
        return kept[1]

    def _append(self, call: _Call, kind: str, buffer: Tensor) -> Tensor:
        self._calls.append(call)
        return cast(Tensor, _Value(self, kind, buffer))

    def _move(self, tensor: object, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor on the device; the same tensor is moved once."""
        if not isinstance(tensor, Tensor):
            raise TypeError("a CUDA step is recorded with plain weights: make them with a dtype")
        kept = self._moved.get(id(tensor))
        if kept is None:
            moved = tensor.to(self._device, dtype or self._dtype).contiguous()
            self._moved[id(tensor)] = kept = (tensor, moved)
        return kept[1]

    def release_host_weights(self) -> None:
        """Forget the host's tensors once all is recorded: the model's own references are what is left."""
        self._moved.clear()
        self._moved_codes.clear()

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the buffer of that name: layers share theirs, as they run one after the other."""
        key = (name, shape, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._buffers[key]


def _buffer_of(handle: Tensor) -> Tensor:
    value: object = handle
    if not isinstance(value, _Value):
        raise TypeError(f"{handle!r} cannot be used here")
    return value.buffer


def _plan(batch: CudaBatch, block_size: int, window: int, workspace: Tensor) -> None:
    if batch.num_decodes > 0:
        d = batch.num_decodes
        _kernels.attention_plan(batch.context_len[:d], batch.block_table[:d], block_size, window, workspace)
