"""The handle that stands for a tensor while a step is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgi_asgi.ops.program import StepProgram


class Recorded:
    """A value of a step that is being recorded: no data, no shape, nothing that torch would take.

    Attributes:
        program: what records it.
        kind: input, residual, activation, query or logits; for messages.
        emit: records the call that computes it, once it is known how; None where nothing waits.
    """

    __slots__ = ("emit", "kind", "program")

    def __init__(self, program: StepProgram, kind: str, emit: Callable[[Any], Any] | None = None) -> None:
        self.program = program
        self.kind = kind
        self.emit = emit

    def __repr__(self) -> str:
        return f"<{self.kind} of a step that is being recorded>"
