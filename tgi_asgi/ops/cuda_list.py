"""The list of launches that a step of a CUDA device is, run by csrc/bindings/cuda/program.cpp without Python.

A launch is an operator, its arguments, and when it runs. What is another in every step stands in the
arguments by name: a `Size`, a tensor that is `Given`, `Rows` of either kind of tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tgi_asgi._cuda import Operand, Program


class Size(Enum):
    """What a step counts."""

    TOKENS = "tokens"
    DECODES = "decodes"  # sequences of one token, which come first
    PROMPTS = "prompts"  # the other sequences
    KNOWN_PROMPTS = "known_prompts"  # all of them, where the host tells their lengths
    UNKNOWN_PROMPTS = "unknown_prompts"  # all of them, where it does not
    MAX_QUERY_LEN = "max_query_len"  # of these
    ROWS = "rows"  # of logits


class Given(Enum):
    """What a step brings, on the device; the shapes are `CudaBatch`'s."""

    IDS = "ids"
    POSITIONS = "positions"
    SLOTS = "slots"
    QUERY_START = "query_start"
    CONTEXT_LEN = "context_len"
    BLOCK_TABLE = "block_table"
    PROMPT_LENS = "prompt_lens"  # [n_prompts, 2] int64 on the host
    ROWS = "rows"  # [n_rows] int32: tokens whose logits are wanted


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a tensor: from the `first`-th on (None: the first), up to the `stop`-th (None: the last)."""

    of: Tensor | Given
    stop: Size | None
    first: Size | None = None


@dataclass(frozen=True, slots=True)
class When:
    """While `size` is in [least, most]."""

    size: Size
    least: int = 0
    most: int = sys.maxsize

    def holds(self, sizes: dict[Size, int]) -> bool:
        """Tell whether it is so."""
        return self.least <= sizes[self.size] <= self.most


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A call of `namespace::name.overload`, whose schema has the order of the arguments; or of a function.

    A function is Python's own: it gets tensors and integers, and takes the GIL.
    """

    op: str | Callable[..., object]
    arguments: tuple[Any, ...]
    when: When | None


class LaunchList:
    """Launches in order.

        launches = LaunchList((Size.TOKENS,), (Given.IDS,))
        launches.add("tgi_cuda::embed", Given.IDS, table, Rows(x, Size.TOKENS))
        launches.run((3,), (ids,))

    Args:
        sizes, given: what a run brings, in this order.

    Attributes:
        launches: all that were added.
    """

    def __init__(self, sizes: Sequence[Size], given: Sequence[Given]) -> None:
        self._sizes, self._given = tuple(sizes), tuple(given)
        self.launches: list[Launch] = []
        self._program: Program | None = None

    def add(self, op: str | Callable[..., object], *arguments: object, when: When | None = None) -> None:
        """Add a launch behind the others; None: in every run."""
        self.launches.append(Launch(op, arguments, when))

    def finish(self) -> None:
        """Turn the launches into calls of operators, which must be there now.

        Raises:
            TypeError, ValueError: an operator takes other arguments, or is not there.
        """
        from tgi_asgi._cuda import Program  # where it was built

        program = Program([size.value for size in self._sizes], [given.value for given in self._given])
        for launch in self.launches:
            arguments = [_operand(program, argument) for argument in launch.arguments]
            when = launch.when or When(self._sizes[0])
            size = None if launch.when is None else program.size(when.size.value)
            program.add(launch.op, arguments, size, when.least, when.most)
        self._program = program

    def run(self, sizes: Sequence[int], given: Sequence[Tensor]) -> None:
        """Launch all whose condition holds, without the GIL; from any thread, on its stream.

        Raises:
            IndexError: there are fewer rows than `sizes` says.
        """
        assert self._program is not None, "the list is not finished"
        self._program.run(sizes, given)

    def count(self, sizes: Sequence[int]) -> int:
        """Return how many launches a run of these sizes is."""
        known = dict(zip(self._sizes, sizes, strict=True))
        return sum(launch.when is None or launch.when.holds(known) for launch in self.launches)


def _operand(program: Program, argument: object) -> object | Operand:
    """Return what stands for an argument in the program; constants stay as they are."""
    if isinstance(argument, Size):
        return program.size(argument.value)
    if isinstance(argument, Given):
        return program.tensor(argument.value)
    if isinstance(argument, Rows):
        base = program.tensor(argument.of.value) if isinstance(argument.of, Given) else argument.of
        first, stop = (
            None if size is None else program.size(size.value) for size in (argument.first, argument.stop)
        )
        return program.rows(base, first, stop)
    return argument
