"""A recorded model as a program of CPU kernels, which a team of threads runs without Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.ops import calls
from tgi_asgi.ops.adapters import AdapterLayout
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.cpu_calls import CpuCalls
from tgi_asgi.ops.recorder import Recorder
from tgi_asgi.ops.sample import SampleResult
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.ops.shards import Shard
from tgi_asgi.ops.step_limits import StepLimits
from tgi_asgi.ops.text_program import TextProgram


class CpuProgram(TextProgram):
    """Runs steps of a recorded model on the team of threads.

        program = CpuProgram(recorder, limits)
        result = program.run_and_sample(batch, rows, slots, state)

    It is built for the kernel set in use and at most the team's current number of threads.

    Args:
        adapters: Adapters that rows of a step may use.
        shard: The shard that it computes, if the model is split.

    Attributes:
        native: The extension's program, which `StepQueue` runs without Python.
    """

    def __init__(
        self,
        recorder: Recorder,
        limits: StepLimits,
        *,
        adapters: AdapterLayout | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.native = _C.Program(
            max_tokens=limits.max_tokens, max_sequences=limits.max_sequences, max_rows=limits.max_rows,
            max_context=limits.max_context,
        )  # fmt: skip
        if adapters is not None:
            self.native.set_adapters(adapters.native)
        if shard is not None:
            self.native.set_shards(shard.group, shard.first_vocab_id)
        self._recorded = recorder.calls
        self._calls = self._lower(adapters, shard)
        self._calls.emit_all()

    def _lower(self, adapters: AdapterLayout | None, shard: Shard | None) -> CpuCalls:
        return CpuCalls(self.native, self._recorded, adapters, shard)

    @property
    def num_steps(self) -> int:
        """Number of steps that have been computed, including the last one's states."""
        return self.native.num_steps

    def roll_back_to(self, num_steps: int) -> None:
        """Discard the states of a step that was computed after the first `num_steps` and then failed."""
        self.native.roll_back_to(num_steps)

    def discard_states(self, slot: int, num_tokens: int) -> None:
        """Discard the states of a slot after more than `num_tokens` tokens."""
        self.native.discard_states(slot, num_tokens)

    @property
    def residual(self) -> Floats:
        """The residual [max_tokens, padded columns] after the last step; the next step overwrites it."""
        residual = self._calls.residual
        assert residual is not None, "a model embeds its tokens"
        return residual.array()

    def run(self, batch: _C.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step: the forward pass, and the logits of `rows`, indices of tokens.

        Returns:
            [n_rows, vocab] float32, a view of the program's buffer: valid until the next call.

        Raises:
            ValueError: if a size, id, slot or block is out of range. Nothing has been computed then.
        """
        return self.native.run(batch, list(rows))

    def run_and_sample(
        self,
        batch: _C.FlatRows,
        rows: Sequence[int],
        slots: Sequence[int],
        state: SampleState,
        mask: npt.NDArray[np.int32] | None = None,
        drafts: Sequence[int] = (),
    ) -> SampleResult:
        """Compute a step and sample a token after each of `rows`, in its slot: `run` and `sample` in one.

        No Python runs between them. `mask` and `drafts` are those of `sample`. The last layer computes only
        keys, values and what `rows` need, so `run_head` cannot be called afterwards.

        Raises:
            ValueError: as for `run` and `sample`. Nothing has been computed then.
        """
        return SampleResult(*self.native.run_and_sample(batch, rows, slots, state.arrays, mask, drafts))

    def profile(self, batch: _C.FlatRows, rows: Sequence[int]) -> list[float]:
        """Compute a step as `run_and_sample` does; return the seconds that each kernel call took."""
        return self.native.profile(batch, rows)

    def run_head(self, rows: Sequence[int]) -> Floats:
        """Compute the logits of other rows of the last step, which `run` must have computed; see `run`."""
        return self.native.run_head(rows)

    def hidden(self, start: int, stop: int) -> Floats:
        """Return the states [n_tokens, hidden] after the last norm, of tokens of a step that `run` computed.

        A token's bits do not depend on the rest of the step.
        """
        head = next(call for call in reversed(self._recorded) if isinstance(call, calls.Head))
        x = self.residual[start:stop, : head.norm.columns].astype(np.float64)
        return head.norm.apply(x).astype(np.float32)
