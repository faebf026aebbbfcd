"""The operator `embed`: token ids to the residual stream."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.recorder import RecordedBatch
from tgi_asgi.ops.values import Kind, Value
from tgi_asgi.ops.weights import LinearWeight


def embed(batch: RecordedBatch, table: LinearWeight, factor: float = 1.0) -> Value:
    """Gather the rows of `table` at the batch's ids, times a factor: the residual [n_tokens, hidden] float32.

    A step with an id that is not a row of the table is refused when it runs.
    """
    recorder = batch.recorder
    return recorder.note(calls.Embed(recorder.value(Kind.RESIDUAL, table.columns), table, factor))
