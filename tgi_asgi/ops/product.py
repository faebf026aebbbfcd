"""A product of arrays, for what is computed while a model is loaded."""

from __future__ import annotations

import numpy as np

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.packing import PackedLinear, Packing
from tgi_asgi.ops.sources import from_floats


class Product:
    """Multiplies rows by one matrix, in float32.

        product = Product(matrix)       # [columns, inner]
        product.of(rows)                # rows @ matrix.T, [n, columns], of rows [n, inner]

    A row's bits depend neither on the other rows nor on the number of threads, unlike those of numpy's.
    """

    def __init__(self, matrix: Floats) -> None:
        self._columns = matrix.shape[0]
        made = Packing(is_exact=True).linear(from_floats(matrix), None, is_vocabulary=False)
        self._made: PackedLinear = made

    def of(self, rows: Floats) -> Floats:
        """Return the product."""
        out = np.empty((len(rows), self._made.matrix.num_stored_rows), np.float32)
        _C.linear_rows(self._made.matrix, None, np.ascontiguousarray(rows), out, self._made.precision)
        return out[:, : self._columns]
