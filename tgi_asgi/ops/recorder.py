"""Records a model: calls its own code once with values, and keeps the list of what it did.

The list knows no device. `CpuProgram` and `CudaProgram` make their steps of it.
"""

from __future__ import annotations

from tgi_asgi.ops.calls import Call
from tgi_asgi.ops.values import Kind, Value


class RecordedBatch:
    """Stands for a step's tokens: `embed` begins with it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder


class Recorder:
    """What operators note their calls in.

        recorder = Recorder()
        x = model.forward(recorder.batch, pool.layers)
        model.logits(x)
        program = CpuProgram(recorder, pool, ...)

    Attributes:
        calls: in the order in which a step computes them.
    """

    def __init__(self) -> None:
        self.batch = RecordedBatch(self)
        self.calls: list[Call] = []

    def value(self, kind: Kind, columns: int) -> Value:
        """Make a value that a call is about to write."""
        return Value(self, kind, columns)

    def added(self, x: Value) -> Value:
        """Make the residual that takes the place of x, which cannot be used any more."""
        x.is_replaced = True
        return Value(self, Kind.RESIDUAL, x.columns, storage=x.root)

    def note(self, call: Call) -> Value:
        """Note a call; return what it makes."""
        self.calls.append(call)
        return call.out
