"""Weights whose columns are in another order than their input's, and the form in which they read it.

GPTQ's act-order assigns columns to groups by the size of their inputs. Sorted by group, the columns fit the
blocks of 32 that kernels multiply, if the input is given in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ColumnOrder:
    """The input column that each column of a packed matrix multiplies; equal orders are equal and hashable.

    order = ColumnOrder.of(source.order)
    matrix = plain[:, order.indices]
    """

    data: bytes = field(repr=False)

    @classmethod
    def of(cls, indices: npt.NDArray[np.int64]) -> ColumnOrder:
        """Wrap [columns] indices."""
        return cls(indices.astype(np.int32).tobytes())

    @property
    def indices(self) -> npt.NDArray[np.int32]:
        """The indices [columns]: a view."""
        return np.frombuffer(self.data, np.int32)


@dataclass(frozen=True, slots=True)
class OrderedForm:
    """An activation in a precision, with its columns in another order."""

    precision: str
    order: ColumnOrder


# A form in which a product reads its input: a precision, or a precision and an order of columns.
Form = str | OrderedForm
