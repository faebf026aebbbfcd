"""The sizes that decide how much memory steps need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """Sizes that no step of a model exceeds: buffers are allocated for them.

        StepLimits(max_tokens=4224, max_sequences=128, max_rows=128, max_context=8192)

    Attributes:
        max_tokens: Number of tokens in a step, those of all its sequences.
        max_sequences: Number of sequences in a step.
        max_rows: Number of tokens whose logits are computed at a time.
        max_context: Number of tokens in a sequence, with those of earlier steps.
    """

    max_tokens: int
    max_sequences: int
    max_rows: int
    max_context: int
