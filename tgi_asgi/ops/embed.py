"""The operators `embed` and `embed_add`: token ids to the residual stream, and to other rows."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.recorder import Kind, RecordedBatch, Value, recorder_of
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


def embed_add(batch: RecordedBatch, table: LinearWeight, rows: Value, factor: float = 1.0) -> Value:
    """Add the rows of `table` at the batch's ids, times a factor, to rows [n_tokens, columns]; return them.

    Gemma 4 has a second embedding for each layer; its table has the columns of all layers.

    Raises:
        ValueError: if `rows` have other columns.
    """
    recorder = recorder_of("embed_add", rows=(rows, Kind.ROWS, table.columns))
    if recorder is not batch.recorder:
        raise TypeError("`embed_add` was given values of two recordings")
    return recorder.note(calls.EmbedAdd(recorder.added(rows), table, rows, factor))
