"""A model's weights by their canonical names, which are those of Hugging Face's checkpoints.

Both file formats return bytes as stored; `ops` converts them to the kernels' layout.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.ops import WeightSource

# The format of tensors that torch keeps as float32, however they are stored.
KEPT = "kept"
# The formats of 4-bit and 8-bit codes that shards would decode (GPTQ's act-order in a matrix that is cut by
# columns), with the bytes of each weight. Scales count beside.
ORDERED = {"ordered_4": 0.5, "ordered_8": 1.0}
WHOLE = slice(None)


class Weights(Protocol):
    """The source of a model's weights."""

    num_bytes: int  # of all tensors, as stored
    is_gguf: bool  # llama.cpp's tensors, for example all experts' in one

    def __contains__(self, name: object) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor of this shape, or a part of it; its bytes are a view of the file if possible.

        Args:
            part: Consecutive indices along the first dimension, such as those of some experts. Nothing else
                is read or decoded.

        Raises:
            ModelLoadError: if it is missing, has another shape, or has an unreadable type.
        """

    def unread(self) -> list[str]:
        """Return the file's names of tensors that have not been requested yet."""

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return each tensor's stored format and number of elements, by the file's names."""

    def close(self) -> None:
        """Release the files; views that are still held stay valid."""


class NamedWeights(Weights, Protocol):
    """The weights of a module of `transformers`, which can be listed; `GgufModuleWeights` has its names."""

    def names(self) -> list[str]:
        """Return the names of all weights; a quantised weight has one name, not those of its parts."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight after decoding."""

    def integers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
        """Return a table of integers, such as the experts of each token.

        Raises:
            ModelLoadError: if it has another shape, or is of another type.
        """

    def parts(self, name: str) -> list[str]:
        """Return the file's names of the tensors that make up a weight; one if it is not quantised."""


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape differs from the configuration's."""
    if found != expected:
        raise ModelLoadError(
            f"tensor {name!r} has the shape {list(found)}, "
            f"but the model's configuration says {list(expected)}"
        )


def refuse_unread(names: Iterable[str], expected: Sequence[str]) -> None:
    """Refuse tensors that the model does not use, as it would compute something else than its authors' code.

    Args:
        expected: Names (`fnmatch` patterns) of tensors that do not matter.
    """
    for name in sorted(names):
        if not matches(name, expected):
            raise ModelLoadError(
                f"the model's files hold the tensor {name!r}, which this server does not know for this "
                "architecture: the model would compute something else"
            )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name matches one of the `fnmatch` patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
