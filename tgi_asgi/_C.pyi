"""Compute threads, instruction set and recorded steps of the CPU kernels.

Importing it registers `torch.ops.tgi`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

def num_threads() -> int:
    """Return the number of compute threads, the caller's own included."""

def set_num_threads(num_threads: int) -> None:
    """Set the number of compute threads; 0 means the default."""

def default_num_threads() -> int:
    """Return the cores that the process may use, by affinity and by cgroup quota."""

def configure_team(num_threads: int = 0, nice: int = 0, pin: bool = False, spin_us: int = 75) -> None:
    """Restart the team with these options."""

def join_team() -> None:
    """Give the calling thread the team's nice value and member 0's core, for good."""

def wake_team() -> None:
    """Unpark the team ahead of a step."""

def isa() -> str:
    """Return the instruction set in use: portable, avx2 or avx512."""

def supported_isas() -> list[str]:
    """Return what `force_isa` takes on this machine."""

def force_isa(name: str) -> None:
    """Use this instruction set from now on (for tests)."""

def weight_formats() -> list[dict[str, Any]]:
    """Return the table of weight formats, csrc/formats.def: a dict each, `ggml_type` None outside GGUF."""

class PlanError(ValueError):
    """Raised when a plan names what does not exist: the engine's mistake, never a client's."""

class RowLimits:
    """Bounds of a plan's integers."""

    def __init__(
        self,
        *,
        vocab_size: int,
        num_blocks: int,
        block_size: int,
        max_context: int,
        max_rows: int,  # of a step, and the bound of slots
        max_tokens: int,  # of a step
    ) -> None: ...

def flatten_rows(
    rows: Sequence[Any], limits: RowLimits, last_ids: npt.NDArray[np.int32]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the arrays of a plan's rows: ids, positions, slots, query_start, context_len, block_table.

    Raises:
        PlanError: a row names what does not exist, or two have one slot.
    """

class StepProgram:
    """See `tgi_asgi.ops.StepProgram`, which alone calls it; its methods are those of program.h."""

    def __init__(self, max_tokens: int, max_sequences: int, max_rows: int) -> None: ...
    def __getattr__(self, name: str) -> Any: ...

_Drawn = tuple[int, float | None, list[tuple[int, float]] | None, bool]

class StepQueue:
    """Steps on their way from the event loop to the thread that computes them, and back.

    `push`, `push_rows`, `done` and `close` are for the event loop, `take` and `set_sampling` for one thread
    that computes, `finish` for any.
    """

    def __init__(self, program: StepProgram | None = None, limits: RowLimits | None = None) -> None: ...
    def fileno(self) -> int:
        """Return a descriptor that is readable while something is done that `done` has not returned."""

    def push(self, number: int) -> None:
        """Queue a step that `take` returns."""

    def push_rows(self, number: int, rows: Sequence[Any]) -> None:
        """Queue a step that `take` computes: no slot of it starts, and no row has a grammar.

        Raises:
            PlanError: a row names what does not exist, or two have one slot.
        """

    def close(self) -> None:
        """Take nothing more; behind what is queued `take` returns None."""

    def done(self) -> list[tuple[int, list[_Drawn | None] | Exception | None]]:
        """Return numbers and outcomes since the last call, in order.

        An outcome is None of a step that `take` returned, what failed, or what each row drew: its token,
        the log-probability and the most probable ones if it wants any, whether its logits were finite.
        """

    def take(self) -> int | None:
        """Compute steps, without the GIL, until one comes that is not made of rows: return its number.

        Waits for more. None: the queue is closed and empty.
        """

    def finish(self, number: int) -> None:
        """Say that the step which `take` returned is done."""

    def set_sampling(
        self,
        records: Tensor,
        counts: Tensor,
        biased_ids: Tensor,
        biased_values: Tensor,
        masked_ids: Tensor,
        scratch: Tensor,
    ) -> None:
        """Say what the next steps draw with: the tensors of `ops.SampleState`."""

class PageSupply:
    """A thread of the lowest priority that has the system supply memory before it is written.

    Its contents stay, whoever writes meanwhile.
    """

    def __init__(self, memory: Tensor, num_bytes: int) -> None: ...
    def wait(self) -> None:
        """Wait until the first `num_bytes` are there."""

    def close(self) -> None:
        """End it where it is. Idempotent; beside busy cores it may take 0.1 s."""
