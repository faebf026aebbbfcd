"""A CUDA step as a list of launches, which csrc/bindings/cuda/program.cpp runs without Python.

A launch is an operator, its arguments, and a condition. Arguments that differ between steps are symbolic: a
`Size`, an `Input` tensor, or `Rows` of a fixed or `Input` tensor.
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
    """The counts of a step."""

    TOKENS = "tokens"
    DECODES = "decodes"  # sequences of one token, which come first
    PROMPTS = "prompts"  # the other sequences
    KNOWN_PROMPTS = "known_prompts"  # all of the prompts, if their lengths are known on the host
    UNKNOWN_PROMPTS = "unknown_prompts"  # all of the prompts, if they are not
    MAX_QUERY_LEN = "max_query_len"  # of the prompts
    ADAPTED = "adapted"  # the tokens, if one of them has an adapter, else 0
    IMAGE_ROWS = "image_rows"  # tokens with rows of images
    ROWS = "rows"  # of logits


class Input(Enum):
    """A step's input tensors on the device; shapes are those of `CudaBatch`."""

    IDS = "ids"
    POSITIONS = "positions"
    SLOTS = "slots"
    QUERY_START = "query_start"
    CONTEXT_LEN = "context_len"
    BLOCK_TABLE = "block_table"
    PROMPT_LENS = "prompt_lens"  # [n_prompts, 2] int64 on the host
    ADAPTERS = "adapters"  # empty if no token has one
    IMAGE_TOKENS = "image_tokens"
    IMAGE_ROWS = "image_rows"
    ROWS = "rows"  # [n_rows] int32: tokens whose logits are requested


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a tensor: from index `first` (None: 0) up to `stop` (None: the end)."""

    of: Tensor | Input
    stop: Size | None
    first: Size | None = None


def tokens_of(rows: Tensor | Input) -> Rows:
    """Return the rows of a step's tokens."""
    return Rows(rows, Size.TOKENS)


def decodes_of(rows: Tensor | Input) -> Rows:
    """Return the rows of decoding sequences."""
    return Rows(rows, Size.DECODES)


def prompts_of(rows: Input) -> Rows:
    """Return the rows of the sequences that do not decode."""
    return Rows(rows, None, first=Size.DECODES)


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition that `size` is in [min, max]."""

    size: Size
    min: int = 0
    max: int = sys.maxsize

    def holds(self, sizes: dict[Size, int]) -> bool:
        """Return whether the condition holds."""
        return self.min <= sizes[self.size] <= self.max


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A call of `namespace::name.overload` with arguments in the schema's order, or of a Python function.

    A function receives tensors and integers, and runs with the GIL held.
    """

    op: str | Callable[..., object]
    arguments: tuple[Any, ...]
    when: Condition | None


class LaunchList:
    """Launches in order.

        launches = LaunchList((Size.TOKENS,), (Input.IDS,))
        launches.add("tgi_cuda::embed", Input.IDS, table, Rows(x, Size.TOKENS))
        launches.run((3,), (ids,))

    Args:
        sizes, given: The values that a run passes, in this order.

    Attributes:
        launches: All launches added so far.
    """

    def __init__(self, sizes: Sequence[Size], given: Sequence[Input]) -> None:
        self._sizes, self._given = tuple(sizes), tuple(given)
        self.launches: list[Launch] = []
        self._program: Program | None = None

    def add(self, op: str | Callable[..., object], *arguments: object, when: Condition | None = None) -> None:
        """Append a launch, which runs if `when` holds (None: always)."""
        self.launches.append(Launch(op, arguments, when))

    def finish(self) -> None:
        """Turn the launches into operator calls; the operators must be registered by now.

        Raises:
            TypeError, ValueError: if an operator has other arguments or is not registered.
        """
        from tgi_asgi._cuda import Program  # exists only if it was built

        program = Program([size.value for size in self._sizes], [given.value for given in self._given])
        for launch in self.launches:
            arguments = [_operand(program, argument) for argument in launch.arguments]
            when = launch.when or Condition(self._sizes[0])
            size = None if launch.when is None else program.size(when.size.value)
            program.add(launch.op, arguments, size, when.min, when.max)
        self._program = program

    def run(self, sizes: Sequence[int], given: Sequence[Tensor]) -> None:
        """Launch all whose condition holds, without the GIL; from any thread, on that thread's stream.

        Raises:
            IndexError: if a tensor has fewer rows than `sizes` says.
        """
        assert self._program is not None, "the list is not finished"
        self._program.run(sizes, given)

    def count(self, sizes: Sequence[int]) -> int:
        """Return the number of launches of a run with these sizes."""
        known = dict(zip(self._sizes, sizes, strict=True))
        return sum(launch.when is None or launch.when.holds(known) for launch in self.launches)


def _operand(program: Program, argument: object) -> object | Operand:
    """Return the program's operand for an argument; constants are returned as they are."""
    if isinstance(argument, Size):
        return program.size(argument.value)
    if isinstance(argument, Input):
        return program.tensor(argument.value)
    if isinstance(argument, Rows):
        base = program.tensor(argument.of.value) if isinstance(argument.of, Input) else argument.of
        first, stop = (
            None if size is None else program.size(size.value) for size in (argument.first, argument.stop)
        )
        return program.rows(base, first, stop)
    return argument
