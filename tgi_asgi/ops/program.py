"""The step program: a model's forward pass and head recorded once as a list of kernel calls, replayed in C++.

To record, the model's own code is called with handles in place of tensors; the operators of this package see
them and note their call here. A handle is no tensor: any other use of it fails with a TypeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.attention import AttentionTables, check_window
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.packed import PackedMatrix, head_order
from tgi_asgi.ops.recorded import Recorded
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.sample import SampleResult
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.ops.weights import GateUpWeight, LinearWeight, QkvWeight


@dataclass(frozen=True, slots=True)
class ProgramInputs:
    """The handles that a model is recorded with: of a batch, and of the rows whose logits are wanted."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    tables: AttentionTables
    rows: Tensor


class StepProgram:
    """Records a model, then runs its steps on the team of threads.

        program = StepProgram(max_tokens=4224, max_sequences=128, max_rows=128, max_context=8192)
        inputs = program.inputs
        x = model.forward(Batch(inputs.ids, inputs.positions, inputs.slots, inputs.tables), kv)
        model.logits(x, inputs.rows)
        logits = program.run(ids, positions, slots, tables, rows)

    Recorded for the instruction set in use and at most the team's present number of threads.

    Args:
        max_tokens, max_sequences, max_rows: of a step, and of logits at a time.
        max_context: tokens of a sequence.

    Attributes:
        native: the program that is recorded into; `_C.StepQueue` runs it without Python.
    """

    def __init__(self, *, max_tokens: int, max_sequences: int, max_rows: int, max_context: int) -> None:
        self.native = _C.StepProgram(max_tokens, max_sequences, max_rows)
        self._max_tokens, self._max_rows, self._max_context = max_tokens, max_rows, max_context
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._x = torch.empty(0)
        self._logits = torch.empty(0)
        handle = cast(Tensor, Recorded(self, "input"))
        tables = AttentionTables(handle, handle, handle)
        self.inputs = ProgramInputs(handle, handle, handle, tables, handle)

    @property
    def residual(self) -> Tensor:
        """The residual [max_tokens, hidden] float32 that the last step left; overwritten by the next."""
        return self._x

    @property
    def num_operators(self) -> int:
        """How many kernel calls were recorded."""
        return int(self.native.num_operators())

    def run(
        self, ids: Tensor, positions: Tensor, slots: Tensor, tables: AttentionTables, rows: Tensor
    ) -> Tensor:
        """Compute a step: the forward pass, and the logits of rows [n_rows] int32.

        Returns:
            [n_rows, vocab] float32, a view of the program's buffer: valid until the next call.

        Raises:
            RuntimeError: a size, id, slot or block is out of range; nothing has been computed.
        """
        self.native.run(
            ids, positions, slots, tables.query_start, tables.context_len, tables.block_table, rows
        )
        return self._logits[: rows.shape[0]]

    def draw(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        tables: AttentionTables,
        rows: Tensor,
        row_slots: Tensor,
        state: SampleState,
        mask: Tensor | None = None,
    ) -> SampleResult:
        """Compute a step and draw a token after each of rows [n_rows] int32: `run` and `sample` in one.

        Nothing of Python lies between them. `mask` is that of `sample`. Of the last layer only what rows need
        is computed, beside keys and values, so neither `residual` nor `run_head` is there afterwards.

        Raises:
            RuntimeError: as `run` and `sample`; nothing has been computed.
        """
        result = SampleResult.allocate(rows.shape[0], state.max_top(row_slots))
        self.native.draw(
            ids, positions, slots, tables.query_start, tables.context_len, tables.block_table, rows,
            row_slots, *state.tensors, mask,
            state.scratch(_C.num_threads()), result.token_ids, result.is_finite, result.logprobs,
            result.top_ids, result.top_logprobs, result.num_top,
        )  # fmt: skip
        return result

    def profile(
        self, ids: Tensor, positions: Tensor, slots: Tensor, tables: AttentionTables, rows: Tensor
    ) -> Tensor:
        """Compute a step as `draw` does; return each operator's seconds [num_operators] float64."""
        times: Tensor = self.native.profile(
            ids, positions, slots, tables.query_start, tables.context_len, tables.block_table, rows
        )
        return times

    def run_head(self, rows: Tensor) -> Tensor:
        """Compute the logits of other rows of the last step, which `run` computed; as it."""
        self.native.run_head(rows)
        return self._logits[: rows.shape[0]]

    # What the operators call when they are given a handle. An activation is computed when a product takes it:
    # only the product's weight knows the precision it wants.

    def record_embed(self, weight: LinearWeight) -> Tensor:
        """Record `embed`."""
        matrix = _packed(weight)
        self._x = self._buffer("x", (self._max_tokens, matrix.shape[1]), torch.float32)
        self.native.embed(matrix.parts[0], matrix.formats[0], matrix.shape[1], matrix.shape[0], 1.0, self._x)
        return cast(Tensor, Recorded(self, "residual"))

    def record_norm(self, weight: Tensor, eps: float) -> Tensor:
        """Record `norm`, to be computed by the product that takes its result."""

        def emit(precision: str) -> Tensor:
            out = self._activation("norm", self._max_tokens, weight.numel(), precision)
            self.native.norm(self._x, weight, eps, False, out, precision)
            return out

        return self._later(emit)

    def record_qkv(self, a: Tensor, weight: QkvWeight, kv: KvLayer, rope: RopeTable) -> Tensor:
        """Record `qkv`, to be computed by the attention that takes its result and knows the scale."""
        matrix = _packed(weight.linear)
        norms, eps = _ordered_norms(weight)

        def emit(scale: float) -> Tensor:
            q = self._buffer("q", (self._max_tokens, weight.num_heads * self._query_bytes(kv)), torch.uint8)
            source = _emit(a, matrix.precision)
            self.native.qkv(
                source, matrix.precision, list(matrix.parts), list(matrix.formats), matrix.shape[1],
                weight.linear.bias, weight.num_heads, rope.cos, rope.sin, norms, eps, scale, kv.pool,
                kv.block_size, kv.head_dim, q,
            )  # fmt: skip
            return q

        return cast(Tensor, Recorded(self, "query", emit))

    def record_attention(self, q: Tensor, kv: KvLayer, scale: float, window: int | None) -> Tensor:
        """Record `attention`."""
        check_window(window, self._max_context)

        def emit(precision: str) -> Tensor:
            query = _emit(q, scale)
            width = query.shape[1] // self._query_bytes(kv) * kv.head_dim
            out = self._activation("attention", self._max_tokens, width, precision)
            self.native.attention(
                query, kv.pool, kv.block_size, kv.head_dim, self._max_context, out, precision
            )
            return out

        return self._later(emit)

    def record_linear_add(self, a: Tensor, weight: LinearWeight, x: Tensor) -> Tensor:
        """Record `linear_add`."""
        matrix = _packed(weight)
        source = _emit(a, matrix.precision)
        self.native.linear_add(
            source,
            matrix.precision,
            matrix.parts[0],
            matrix.formats[0],
            matrix.shape[1],
            weight.bias,
            self._x,
        )
        return x

    def record_gate_up(self, a: Tensor, weight: GateUpWeight, activation: str) -> Tensor:
        """Record `gate_up`."""
        matrix = _packed(weight.linear)

        def emit(precision: str) -> Tensor:
            source = _emit(a, matrix.precision)
            out = self._activation("gate_up", self._max_tokens, weight.intermediate_size, precision)
            self.native.gate_up(
                source, matrix.precision, matrix.parts[0], matrix.formats[0], matrix.shape[1],
                weight.linear.bias, activation, out, precision,
            )  # fmt: skip
            return out

        return self._later(emit)

    def record_head(self, norm_weight: Tensor, eps: float, weight: LinearWeight) -> Tensor:
        """Record `head`."""
        matrix = _packed(weight)
        vocab_size, columns = matrix.shape
        source = self._activation("head", self._max_rows, columns, matrix.precision)
        self._logits = self._buffer("logits", (self._max_rows, vocab_size), torch.float32)
        self.native.norm(self._x, norm_weight, eps, True, source, matrix.precision)
        self.native.logits(
            source, matrix.precision, matrix.parts[0], matrix.formats[0], columns, weight.bias, 0.0,
            self._logits,
        )  # fmt: skip
        return cast(Tensor, Recorded(self, "logits"))

    def _query_bytes(self, kv: KvLayer) -> int:
        """Return what a head of a query takes: as many bits as the products with this cache want."""
        return int(self.native.query_bytes(kv.pool, kv.block_size, kv.head_dim, 1))

    def _later(self, emit: Callable[[str], Tensor]) -> Tensor:
        return cast(Tensor, Recorded(self, "activation", emit))

    def _activation(self, name: str, tokens: int, columns: int, precision: str) -> Tensor:
        size = self.native.activation_bytes(tokens, columns, precision)
        return self._buffer(f"{name} {columns} {precision}", (size,), torch.uint8)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the buffer of that name: layers share theirs, as they run one after the other."""
        key = (name, shape, dtype)
        if key not in self._buffers:
            buffer = torch.empty(shape, dtype=dtype)
            torch.ops.tgi.advise_huge_pages(buffer)
            self._buffers[key] = buffer
        return self._buffers[key]


def _packed(weight: LinearWeight) -> PackedMatrix:
    if not isinstance(weight.matrix, PackedMatrix):
        raise TypeError("a step is recorded with packed weights: make them with a `Packing`")
    return weight.matrix


def _ordered_norms(weight: QkvWeight) -> tuple[list[Tensor], float]:
    """Return the norms of queries and keys in the order in which the packed rows of a head lie."""
    if weight.norms is None:
        return [], 0.0
    order = torch.from_numpy(head_order(1, 0, weight.head_dim))
    return [weight.norms.query[order], weight.norms.key[order]], weight.norms.eps


def _emit(handle: Tensor, argument: Any) -> Tensor:
    """Record the call behind a handle that is taken; a handle can be taken once."""
    recorded = cast(Recorded, handle)
    if recorded.emit is None:
        raise TypeError(f"a {recorded.kind} cannot be used here, or was used before")
    emit, recorded.emit = recorded.emit, None
    return cast(Tensor, emit(argument))
