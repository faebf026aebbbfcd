"""A recorder's list as a program of the CPU's kernels, which a team of threads runs without Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops import calls, layout
from tgi_asgi.ops.adapters import AdapterLayout
from tgi_asgi.ops.cpu_calls import CpuCalls
from tgi_asgi.ops.recorder import Recorder
from tgi_asgi.ops.sample import SampleResult
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.ops.shards import Shard
from tgi_asgi.ops.values import Kind, Value


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
        adapters: what rows of a step may have.
        shard: which of several shards it is, where the model's weights are one's.

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
        adapters: AdapterLayout | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.native = _C.Program(
            max_tokens=max_tokens, max_sequences=max_sequences, max_rows=max_rows, max_context=max_context
        )
        if adapters is not None:
            self.native.use_adapters(adapters.native)
        if shard is not None:
            self.native.use_shards(shard.group, shard.first_word)
        self._recorded = recorder.calls
        self._calls = CpuCalls(self.native, recorder.calls, inputs, outputs, adapters, shard)
        for value in inputs:
            self._calls.take_input(value, self._columns(value))
        self._calls.emit_all()

    @property
    def num_calls(self) -> int:
        """How many kernel calls a step is."""
        return self.native.num_operators

    @property
    def num_steps(self) -> int:
        """How many steps have been computed, to the last one's states."""
        return self.native.num_steps

    def forget_since(self, num_steps: int) -> None:
        """Take back the states of a step that was computed after so many, and then failed."""
        self.native.forget_since(num_steps)

    @property
    def residual(self) -> npt.NDArray[np.float32]:
        """The residual [max_tokens, padded columns] that the last step left; overwritten by the next."""
        found: npt.NDArray[np.float32] = self._calls.residual.array()
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
        drafts: Sequence[int] = (),
    ) -> SampleResult:
        """Compute a step and draw a token after each of `rows`, for a slot each: `run` and `sample` in one.

        Nothing of Python lies between them. `mask` and `drafts` are those of `sample`. Of the last layer only
        what rows need is computed, beside keys and values, so that `run_head` is not possible afterwards.

        Raises:
            ValueError: as `run` and `sample`; nothing has been computed.
        """
        return SampleResult.of(self.native.draw(batch, rows, slots, state.arrays, mask, drafts))

    def profile(self, batch: _C.FlatRows, rows: Sequence[int]) -> list[float]:
        """Compute a step as `draw` does; return the seconds that each kernel call took."""
        return self.native.profile(batch, rows)

    def run_head(self, rows: Sequence[int]) -> Tensor:
        """Compute the logits of other rows of the last step, which `run` computed; as it."""
        return torch.from_numpy(self.native.run_head(rows))

    def hidden(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return the states [n_tokens, hidden] behind the last norm of tokens of a step that `run` computed.

        A token's bits depend on nothing else in the step.
        """
        head = next(call for call in reversed(self._recorded) if isinstance(call, calls.Head))
        x = torch.from_numpy(self.residual[start:stop, : head.norm.columns]).double()
        states: npt.NDArray[np.float32] = head.norm.apply(x).float().numpy()
        return states

    def write(self, value: Value, rows: Tensor) -> None:
        """Give an input its rows [n_tokens, columns] float32."""
        array = self._calls.buffers.of(value, "rows").array()
        if value.kind is Kind.QUERY:
            rows = _packed_heads(rows, *self._query_shape(value)[:3])
        array[: rows.shape[0], : rows.shape[1]] = rows.numpy()

    def read(self, value: Value, num_tokens: int) -> Tensor:
        """Return an output [n_tokens, columns] float32, a copy."""
        if value.kind is Kind.QUERY:
            return self._read_query(value, num_tokens)
        if value.kind is Kind.ACTIVATION:
            read = self._calls.buffers.of(value, "float32").array()
        else:
            read = self._calls.buffers.of(value, "rows").array()
        return torch.from_numpy(read[:num_tokens, : value.columns].copy())

    def _query_shape(self, value: Value) -> tuple[int, int, int, bool]:
        """Return heads, their size, how many dims turn, and whether with their neighbours, of a query."""
        for call in self._recorded:
            if isinstance(call, calls.Qkv) and call.out is value:
                weight = call.weight
                return weight.num_heads, weight.head_dim, weight.rotary_dim, weight.is_interleaved
            if isinstance(call, calls.Attention) and call.q is value:
                return value.columns // call.head_dim, call.head_dim, call.rotary_dim or call.head_dim, False
        raise ValueError("nothing takes this query")

    def _read_query(self, value: Value, num_tokens: int) -> Tensor:
        heads, head_dim, rotary, is_interleaved = self._query_shape(value)
        array = torch.from_numpy(self._calls.buffers.of(value, "query").array()[:num_tokens])
        dtype = {4: torch.float32, 2: torch.bfloat16}.get(array.shape[1] // (heads * head_dim))
        if dtype is None or array.shape[1] != heads * head_dim * dtype.itemsize:
            raise ValueError("queries for an int8 cache are integers: take a cache of floats")
        dims = layout.kept_dims(
            head_dim, rotary, is_paired=dtype is torch.bfloat16, is_interleaved=is_interleaved
        )
        out = torch.empty(num_tokens, heads, head_dim)
        out[..., torch.from_numpy(dims)] = (
            array.contiguous().view(dtype).view(num_tokens, heads, head_dim).float()
        )
        return out.flatten(1)

    def _columns(self, value: Value) -> int:
        """Return what an input has as rows: of queries whole strips a head."""
        if value.kind is not Kind.QUERY:
            return value.columns
        heads, head_dim, *_ = self._query_shape(value)
        return heads * -(-head_dim // layout.STRIP) * layout.STRIP


def _packed_heads(rows: Tensor, num_heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Bring queries [n_tokens, num_heads * head_dim] into the order of packed rows, zeros where these are."""
    order = torch.from_numpy(layout.head_order(num_heads, head_dim, rotary_dim))
    return torch.where(order >= 0, rows[:, order.clamp(min=0)], torch.zeros(()))
