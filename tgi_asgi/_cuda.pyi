"""The CUDA kernels as torch.ops.tgi_cuda, which importing this registers, and what replays calls of them.

Built where torch has CUDA. `tgi_asgi.ops.cuda_list` is what to call.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

class Operand:
    """A size of a step, or a tensor that is another in every step, as entries of a `Program` name them."""

class Program:
    """Calls of torch's dispatcher, which run in order and without the GIL.

    Args:
        sizes, tensors: the names of what a run brings.
    """

    def __init__(self, sizes: Sequence[str], tensors: Sequence[str]) -> None: ...
    def size(self, name: str) -> Operand: ...
    def tensor(self, name: str) -> Operand: ...
    def rows(self, base: Tensor | Operand, first: Operand | None, stop: Operand | None) -> Operand:
        """Return rows of a tensor, counted by sizes; the same rows are one operand, cut once a run.

        Tensors whose rows are taken keep their memory; others may be set to other memory between runs.
        """

    def add(
        self,
        op: str | Callable[..., object],
        arguments: Sequence[Any],
        when: Operand | None,
        least: int,
        most: int,
    ) -> None:
        """Add a call of `namespace::name.overload`, or of a function, for runs with a size in [least, most].

        Arguments are in the schema's order, constants or operands.

        Raises:
            TypeError: the schema wants another argument.
            ValueError: there is no such operator, or the program has run already.
        """

    def run(self, sizes: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Make the calls, on the thread's current stream; what an operator raises is raised.

        Raises:
            IndexError: more rows are wanted than a tensor has.
            ValueError: a size is negative, or there are more or fewer than the program names.
        """

    def __len__(self) -> int: ...
