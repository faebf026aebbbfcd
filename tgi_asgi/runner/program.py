"""How a runner computes a step: through a model's own code, or by a program that was recorded from it.

Both give the same: the residual of all tokens, the logits of those asked for, and more logits afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.batch import Batch
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.llama import Llama


class Step(Protocol):
    """Computes batches against one KV cache."""

    def run(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a batch: what `logits` takes, and the logits of rows [n_rows] int32 (there may be none).

        Both are valid until the next call.
        """

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return fresh logits [n_rows, vocab] float32 of rows of the last batch."""

    def draw(
        self, batch: Batch, rows: Tensor, slots: Tensor, state: ops.SampleState, mask: Tensor | None
    ) -> ops.SampleResult:
        """Compute a batch and draw after its rows, each for its sampling slot; there is at least one.

        `mask` is that of `ops.sample`.
        """


class EagerStep:
    """Calls the model for every batch."""

    def __init__(self, model: Llama, kv: Sequence[ops.KvLayer]) -> None:
        self._model, self._kv = model, kv

    def run(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a batch, as `Step.run` says."""
        x = self._model.forward(batch, self._kv)
        return x, self._model.logits(x, rows)

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute more logits, as `Step.logits` says."""
        return self._model.logits(x, rows)

    def draw(
        self, batch: Batch, rows: Tensor, slots: Tensor, state: ops.SampleState, mask: Tensor | None
    ) -> ops.SampleResult:
        """Compute a batch and draw, as `Step.draw` says."""
        _, logits = self.run(batch, rows)
        return ops.sample(logits, state, slots, mask=mask)


class RecordedStep:
    """Calls the model once, with handles for tensors, and replays what it did: `program`."""

    def __init__(
        self, model: Llama, kv: Sequence[ops.KvLayer], *, max_tokens: int, max_rows: int, max_context: int
    ) -> None:
        self.program = ops.StepProgram(
            max_tokens=max_tokens, max_sequences=max_rows, max_rows=max_rows, max_context=max_context
        )
        inputs = self.program.inputs
        x = model.forward(Batch(inputs.ids, inputs.positions, inputs.slots, inputs.tables), kv)
        model.logits(x, inputs.rows)

    def run(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a batch, as `Step.run` says."""
        logits = self.program.run(batch.ids, batch.positions, batch.slots, batch.tables, rows)
        return self.program.residual, logits

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Compute more logits, as `Step.logits` says."""
        return self.program.run_head(rows).clone()

    def draw(
        self, batch: Batch, rows: Tensor, slots: Tensor, state: ops.SampleState, mask: Tensor | None
    ) -> ops.SampleResult:
        """Compute a batch and draw, as `Step.draw` says."""
        return self.program.draw(
            batch.ids, batch.positions, batch.slots, batch.tables, rows, slots, state, mask
        )


def make_step(
    model: Llama, kv: Sequence[ops.KvLayer], *, max_tokens: int, max_rows: int, max_context: int
) -> Step:
    """Record the model if its weights are packed for it."""
    if model.head.is_packed:
        return RecordedStep(model, kv, max_tokens=max_tokens, max_rows=max_rows, max_context=max_context)
    return EagerStep(model, kv)


def can_record(config: ModelConfig) -> bool:
    """Tell whether the recorded step's kernels have this model's shapes: whole strips and blocks of 32."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    return all(size % 32 == 0 for size in sizes) and config.head_dim <= 256
