"""Recording of a model: its own code is called once with `Value`s, and its operator calls are listed.

The list is independent of the device. `CpuProgram` and `CudaProgram` make their steps from it.
"""

from __future__ import annotations

from tgi_asgi.ops.calls import Call
from tgi_asgi.ops.values import Kind, Value


class RecordedBatch:
    """A placeholder for a step's tokens, which `embed` starts from."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder


class Recorder:
    """Collects the operators' calls.

        recorder = Recorder()
        x = model.forward(recorder.batch, pool.layers)
        model.logits(x)
        program = CpuProgram(recorder, ...)

    Attributes:
        calls: The calls, in the order in which a step computes them.
    """

    def __init__(self) -> None:
        self.batch = RecordedBatch(self)
        self.calls: list[Call] = []

    def value(self, kind: Kind, columns: int) -> Value:
        """Make a value for a call's result."""
        return Value(self, kind, columns)

    def added(self, x: Value) -> Value:
        """Make the residual that replaces x; x cannot be used any more."""
        x.is_replaced = True
        return Value(self, Kind.RESIDUAL, x.columns, storage=x.root)

    def note(self, call: Call) -> Value:
        """Record a call; return its result."""
        self.calls.append(call)
        return call.out
