"""Matrices that other tools have packed, with the weights that they read: `case.tensor` in a file of numpy's.

The scripts tests/models/oracle/record_*.py write such files in environments of their own: this imports only
numpy and torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor


def save_cases(path: str, cases: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write all tensors of all cases; they must be of dtypes that numpy has."""
    arrays = {
        f"{case}.{name}": tensor.numpy()
        for case, tensors in cases.items()
        for name, tensor in tensors.items()
    }
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read_case(path: Path, case: str) -> dict[str, np.ndarray]:
    """Return the arrays of one case, by the names of a checkpoint; `values` are the weights."""
    with np.load(path) as stored:
        return {key.partition(".")[2]: stored[key] for key in stored if key.startswith(f"{case}.")}
