"""Recording of a model: its own code is called once with `Value`s, and its operator calls are listed.

Values are symbolic: they have a kind, a size and their recorder. Each operator accepts certain kinds; any
other raises a TypeError that names both. The list is independent of the device: `CpuProgram` and
`CudaProgram` make their steps from it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields


class Kind(enum.Enum):
    """The kind of a value, as error messages name it."""

    RESIDUAL = "a residual"  # float32, shared by all layers; operators add to it in place
    ACTIVATION = "an activation"  # input of products, in the precision that each needs
    ROWS = "rows"  # float32, the result of a product
    QUERY = "a query"  # rotated heads; their keys and values are in the cache
    ROUTING = "a routing of experts"
    LOGITS = "logits"


@dataclass(eq=False, slots=True)
class Value:
    """A value of a step being recorded; it holds no data and is not a tensor.

    Attributes:
        columns: Columns of each token's row.
        storage: The value whose memory this one shares: for a residual, or rows that were added to, the
            first one, which later ones replace.
        is_replaced: Whether this is a residual, or rows, that were added to; only the result of the addition
            can be used.
    """

    recorder: Recorder = field(repr=False)
    kind: Kind
    columns: int
    storage: Value | None = field(default=None, repr=False)
    is_replaced: bool = False

    @property
    def root(self) -> Value:
        """The value that owns this value's memory."""
        return self if self.storage is None else self.storage


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """One operator call; `out` is its result."""

    out: Value

    @property
    def inputs(self) -> list[Value]:
        """The values that the call reads."""
        found = (getattr(self, field.name) for field in fields(self) if field.name != "out")
        return [value for value in found if isinstance(value, Value)]


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
        """Make the residual, or rows, that replace x; x cannot be used any more."""
        x.is_replaced = True
        return Value(self, x.kind, x.columns, storage=x.root)

    def note(self, call: Call) -> Value:
        """Record a call; return its result."""
        self.calls.append(call)
        return call.out


def recorder_of(operator: str, **given: tuple[object, Kind, int | None]) -> Recorder:
    """Check an operator's values, given by name with kind and columns (None: any); return their recorder.

    Raises:
        TypeError: if one is not a value, is of another kind or another recording, or is a replaced residual.
        ValueError: if one has another number of columns.
    """
    found: Recorder | None = None
    for name, (value, kind, columns) in given.items():
        if not isinstance(value, Value):
            raise TypeError(f"`{operator}` takes {kind.value} as `{name}`, not {type(value).__name__}")
        if value.kind is not kind:
            raise TypeError(f"`{operator}` takes {kind.value} as `{name}`, not {value.kind.value}")
        if value.is_replaced:
            raise TypeError(
                f"`{operator}` was given as `{name}` {value.kind.value} that changed in place since"
            )
        if found is not None and value.recorder is not found:
            raise TypeError(f"`{operator}` was given values of two recordings")
        if columns is not None and value.columns != columns:
            raise ValueError(f"`{operator}` takes {columns} columns as `{name}`, not {value.columns}")
        found = value.recorder
    assert found is not None
    return found
