"""A model's weights by their canonical names, which are those of Hugging Face's checkpoints.

Both formats give bytes as they are stored; what layout the kernels want of them is `ops`' affair.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Protocol

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.ops import WeightSource

# The format of what torch keeps, be it stored otherwise: float32.
KEPT = "kept"


class Weights(Protocol):
    """Where a model takes its weights from."""

    num_bytes: int  # of all tensors, as stored
    is_gguf: bool  # which has llama.cpp's tensors: all experts' in one, say

    def __contains__(self, name: object) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...]) -> WeightSource:
        """Return a tensor of this shape; its bytes are a view of the file wherever possible.

        Raises:
            ModelLoadError: it is missing, of another shape, or of a type that cannot be read.
        """

    def unread(self) -> list[str]:
        """Return the file's names of tensors that nobody has asked for yet."""

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return the format of each tensor, as the file has it, and its elements, by the file's names."""

    def close(self) -> None:
        """Let go of the files; views that are still held stay valid."""


class NamedWeights(Weights, Protocol):
    """Those of a checkpoint directory, which says what it holds."""

    def names(self) -> list[str]:
        """Return the names of all weights: of a quantised one its own, not those of its parts."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a weight has once it is decoded."""

    def parts(self, name: str) -> list[str]:
        """Return the file's names of the tensors that make up a weight: its own if it is not quantised."""


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a tensor that is not of the shape that the configuration says."""
    if found != expected:
        raise ModelLoadError(
            f"tensor {name!r} has the shape {list(found)}, "
            f"but the model's configuration says {list(expected)}"
        )


def refuse_unread(names: Iterable[str], expected: Sequence[str]) -> None:
    """Refuse tensors that a model has no use for: it would compute something else than its authors' code.

    Args:
        expected: patterns, as `fnmatch` has them, of those that do not matter.
    """
    for name in sorted(names):
        if not matches(name, expected):
            raise ModelLoadError(
                f"the model's files hold the tensor {name!r}, which this server does not know for this "
                "architecture: the model would compute something else"
            )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether one of the patterns, as `fnmatch` has them, is that of a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
