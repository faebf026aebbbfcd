"""What passes between operators while a step is recorded: values that know their kind, size and recorder.

An operator says which kinds it takes; anything else is a TypeError that names both.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tgi_asgi.ops.recorder import Recorder


class Kind(enum.Enum):
    """What a value is, in the words of messages."""

    RESIDUAL = "a residual"  # float32, one for all layers, which operators add to in place
    ACTIVATION = "an activation"  # input of products, in the precision that each wants
    ROWS = "rows"  # float32, the result of a product
    QUERY = "a query"  # heads, rotated; their keys and values are in the cache
    CHOICE = "a choice of experts"
    LOGITS = "logits"


@dataclass(eq=False, slots=True)
class Value:
    """A value of a step that is being recorded: no data, and nothing that torch would take.

    Attributes:
        columns: of each token's row.
        storage: the value whose memory this one is: of a residual the first, which all later ones replace.
        is_replaced: a residual that was added to; only what came of it can be used.
    """

    recorder: Recorder = field(repr=False)
    kind: Kind
    columns: int
    storage: Value | None = field(default=None, repr=False)
    is_replaced: bool = False

    @property
    def root(self) -> Value:
        """The value whose memory this one has."""
        return self if self.storage is None else self.storage


def recorder_of(operator: str, **given: tuple[object, Kind, int | None]) -> Recorder:
    """Check an operator's values, each given by name with its kind and columns (None: any).

    Raises:
        TypeError: one is no value, of another kind, of another recording, or a residual that was replaced.
        ValueError: one has another number of columns.
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
