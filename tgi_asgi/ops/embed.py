"""The operator `embed`: token ids to the residual stream."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.recorder import Kind, RecordedBatch, Value
from tgi_asgi.ops.weights import LinearWeight


def embed(
    batch: RecordedBatch, table: LinearWeight, factor: float = 1.0, positions: Floats | None = None
) -> Value:
    """Gather the rows of `table` at the batch's ids, times a factor: the residual [n_tokens, hidden] float32.

    A step with an id or position outside its table is refused when it runs.

    Args:
        positions: float32 [positions, hidden], position embeddings to add (GPT-2).

    Raises:
        ValueError: if `positions` has another width.
    """
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != table.columns):
        raise ValueError(f"`positions` must be [n, {table.columns}], got {positions.shape}")
    recorder = batch.recorder
    return recorder.note(calls.Embed(recorder.value(Kind.RESIDUAL, table.columns), table, factor, positions))
