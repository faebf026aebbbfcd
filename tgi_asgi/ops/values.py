"""The symbolic values that operators exchange while a step is recorded, with their kind, size and recorder.

Each operator accepts certain kinds; any other raises a TypeError that names both.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tgi_asgi.ops.recorder import Recorder


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
        storage: The value whose memory this one shares: for a residual, the first one, which later ones
            replace.
        is_replaced: Whether this is a residual that was added to; only the result of the addition can be
            used.
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
            raise TypeError(f"`{operator}` was given as `{name}` a residual that has been added to since")
        if found is not None and value.recorder is not found:
            raise TypeError(f"`{operator}` was given values of two recordings")
        if columns is not None and value.columns != columns:
            raise ValueError(f"`{operator}` takes {columns} columns as `{name}`, not {value.columns}")
        found = value.recorder
    assert found is not None
    return found
