"""The CUDA kernels as torch.ops.tgi_cuda, registered on import, and what runs them without Python.

Built when torch has CUDA. Callers use `tgi_asgi.ops.cuda_list` and `tgi_asgi.runner.cuda_device`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tgi_asgi.runner.cuda_device import Command

class Operand:
    """A step's size, or a tensor that differs in every step, as a `Program`'s entries name it."""

class Program:
    """Recorded calls of torch's dispatcher, replayed in order without the GIL.

    Args:
        sizes, tensors: Names of the values that each run passes.
    """

    def __init__(self, sizes: Sequence[str], tensors: Sequence[str]) -> None: ...
    def size(self, name: str) -> Operand: ...
    def tensor(self, name: str) -> Operand: ...
    def rows(self, base: Tensor | Operand, first: Operand | None, stop: Operand | None) -> Operand:
        """Return rows [first, stop) of a tensor, given as sizes; equal rows are one operand, cut once per
        run.

        Tensors that are sliced into rows keep their memory; others may point to other memory between runs.
        """

    def add(
        self,
        op: str | Callable[..., object],
        arguments: Sequence[Any],
        when: Operand | None,
        min: int,
        max: int,
    ) -> None:
        """Add a call of `namespace::name.overload` or of a function, made if the size is in [min, max].

        Arguments are constants or operands, in the schema's order.

        Raises:
            TypeError: if an argument does not fit the schema.
            ValueError: if there is no such operator, or the program has already run.
        """

    def run(self, sizes: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Make the calls on the thread's current stream; exceptions of operators propagate.

        Raises:
            IndexError: if a tensor has fewer rows than requested.
            ValueError: if a size is negative, or the number of sizes or tensors differs from the program's.
        """

    def __len__(self) -> int: ...

class Event:
    """An event without timing, whose waiters sleep; created on the device when it is first submitted."""

    def __init__(self) -> None: ...
    def synchronize(self) -> None:
        """Wait, without the GIL, until the device has reached it; return at once if it is nowhere."""

class Graph:
    """An instantiated CUDA graph; `owner` keeps it. Calling it launches it."""

    def __init__(self, owner: object, graph: int) -> None: ...
    def __call__(self) -> None: ...

class Prepared:
    """Commands that native code submits to its thread's current stream, at `address`.

    Raises:
        TypeError, RuntimeError: as `submit`, or if the last command is not an event.
    """

    def __init__(self, commands: Sequence[Command]) -> None: ...
    @property
    def address(self) -> int: ...

def submit(commands: Sequence[Command]) -> None:
    """Submit commands in order to the thread's current stream, without the GIL except for Python calls.

    Raises:
        TypeError, RuntimeError: if one is no command, or a copy leaves its tensors; nothing is submitted.
        Exception: an error of the device or of a call, after which nothing more is submitted.
    """
