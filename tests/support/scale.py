"""One test at two sizes: the small one runs with all other tests, the full one in `make soak`.

def test_nothing_is_lost(scale: Scale) -> None:
    num_clients = scale(50, 500)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

_Size = TypeVar("_Size")


@dataclass(frozen=True, slots=True)
class Scale:
    """Choose between the size for a second or two and the size for minutes."""

    is_full: bool

    def __call__(self, small: _Size, full: _Size) -> _Size:
        return full if self.is_full else small
