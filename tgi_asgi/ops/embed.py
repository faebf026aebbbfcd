"""The operator `embed`: token ids to the residual stream."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from tgi_asgi._C import FlatRows
from tgi_asgi.ops import calls
from tgi_asgi.ops.at_once import at_once
from tgi_asgi.ops.recorder import RecordedBatch
from tgi_asgi.ops.values import Kind, Value
from tgi_asgi.ops.weights import LinearWeight


@overload
def embed(batch: RecordedBatch, table: LinearWeight, factor: float = 1.0) -> Value: ...
@overload
def embed(batch: FlatRows, table: LinearWeight, factor: float = 1.0) -> Tensor: ...
def embed(batch: RecordedBatch | FlatRows, table: LinearWeight, factor: float = 1.0) -> Value | Tensor:
    """Gather the rows of `table` at the batch's ids, times a factor: the residual [n_tokens, hidden] float32.

    Raises:
        ValueError: an id is not a row of the table; at once, or when the step runs.
    """
    if isinstance(batch, FlatRows):
        return at_once(lambda recorder: embed(recorder.batch, table, factor), batch=batch)
    recorder = batch.recorder
    return recorder.note(calls.Embed(recorder.value(Kind.RESIDUAL, table.columns), table, factor))
