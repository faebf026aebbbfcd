"""The interface between the engine and a runner: a step's plan in, its sampled tokens out.

Plain values without torch, so that tests can run the scheduler on its own and the engine with a scripted
runner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tgi_asgi.types import Bidirectional, ImageInput, Pooling, PromptLogprobs, SamplingParams

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.grammar import Grammar
    from tgi_asgi.types import Vector


MAX_IN_FLIGHT = 2  # steps that a runner has at a time: one computes, the next waits for it


@dataclass(slots=True)
class SlotStart:
    """Assigns a slot to a sequence: the runner resets the slot's sampling state to this.

    `output_ids` are the tokens that the sequence generated before it was preempted (else empty). They count
    for penalties, and the first sampled token is output token number `len(output_ids)`.
    """

    slot: int
    sampling: SamplingParams
    choice: int  # sampling is keyed by (seed, choice)
    prompt_ids: Sequence[int]
    output_ids: Sequence[int] = ()
    min_tokens: int = 0  # number of output tokens before which `masked_ids` cannot be sampled
    masked_ids: tuple[int, ...] = ()  # EOS and stop token ids
    grammar: Grammar | None = None  # grammar that the output must match
    images: tuple[ImageInput, ...] = ()  # of the prompt, in order


@dataclass(slots=True)
class StateMoves:
    """Recurrent states that a row reads or writes besides its slot's; only for models with recurrent layers.

    A row begins with its slot's state, or with that of place `resumes`. `keeps` stores the row's state just
    before each given position: positions ascend, are above 0 and are among those that the row computes, and
    no other row of the step uses the place. A row that may have drafts can keep only the state at its
    `start`, and must begin there. A failed step keeps no state.
    """

    resumes: int | None = None  # [0, num_kept_states)
    keeps: Sequence[tuple[int, int]] = ()  # (position, place)


@dataclass(slots=True)
class StepRow:
    """One sequence's part of a step."""

    slot: int  # [0, max_batch_size)
    token_ids: Sequence[int] | None  # None: one token, the one this slot sampled last, still on the device
    start: int  # position of the first token, which is the number of its tokens already in the KV cache
    # One for each of `RunnerTraits.windows`. Covers at least start + number of tokens; entries before the
    # window of the first token may hold anything. The lists belong to the engine and may grow at their
    # ends, but an entry never changes: runners read it once.
    block_tables: Sequence[Sequence[int]]
    samples: bool  # whether to sample a token after the last one
    prompt_logprobs: int | None = None  # k: return log-probabilities of this chunk's tokens and of the k best
    # How the prompt that this chunk belongs to becomes a vector. If `samples` is set, the prompt ends here
    # and the row returns a vector instead of a sampled token. Chunks come in order, from position 0 if
    # `pooling.needs_all`.
    pooling: Pooling | None = None
    second_start: int | None = None  # as in `GenerationRequest.second_start`
    # Whether its tokens were sampled. (A row without this may also recompute sampled tokens, unless prompts
    # have an arithmetic of their own.)
    is_generated: bool = False
    # Set if steps in flight, or this row, may sample several tokens. The row then begins where its slot is,
    # at `start` or later, and ends before `stop`, which the block table covers; nothing may be left to
    # compute. None: the row begins exactly at `start`.
    stop: int | None = None
    num_drafts: int = 0  # maximum number of draft tokens that the runner may compute after the row's own
    adapter: Any = None  # `Adapter.weights`; steps are fastest if rows of one adapter are adjacent
    states: StateMoves | None = None

    @property
    def num_tokens(self) -> int:
        """Minimum number of tokens that the row computes."""
        return 1 if self.token_ids is None else len(self.token_ids)

    @property
    def end(self) -> int:
        """Position after the last one that the row may write."""
        return self.start + self.num_tokens if self.stop is None else self.stop


@dataclass(slots=True)
class StepPlan:
    """What one step computes. Order: blocks are copied, slots start, rows run, images are encoded."""

    step_id: int
    rows: list[StepRow]  # decode rows, then prefill chunks, those of generated tokens first
    starts: list[SlotStart] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from block, to block)
    # Images to encode ahead of the steps that need them, in order, for about `image_budget_s` seconds. An
    # image is encoded in pieces; the step encodes at least one piece.
    images: list[ImageInput] = field(default_factory=list)
    image_budget_s: float = 0.0
    # Seconds of a decode step: the fixed part, and the part per token, drafts included; zeros: unknown.
    cost: tuple[float, float] = (0.0, 0.0)


@dataclass(slots=True)
class Sampled:
    """A sampled token."""

    token_id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] | None = None  # descending
    is_finite: bool = True  # False: the row's logits held NaN or +inf; the token means nothing
    is_last: bool = False  # the slot's grammar is complete, and nothing can follow
    failure: str | None = None  # why the slot's grammar cannot go on; the token means nothing


@dataclass(slots=True)
class StepResult:
    """The results of a step."""

    step_id: int
    sampled: list[Sampled | None]  # per row; None if it does not sample, or had nothing left to compute
    # By row index: the samples after the row's first, one for each accepted draft.
    draft_samples: dict[int, list[Sampled]] = field(default_factory=dict)
    num_drafted_rows: int = 0  # number of rows with drafts
    num_drafts: int = 0
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)  # by row index
    pooled: dict[int, Vector] = field(default_factory=dict)  # by row index; float32, owned by the caller
    is_encoded: list[bool] = field(default_factory=list)  # per image: whether it needs no more work
    image_s: float = 0.0  # seconds of the step spent on encoding images


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """How many drafts a runner accepts."""

    per_row: int
    per_step: int

    def for_rows(self, num_rows: int, room: int | None = None) -> int:
        """Return how many drafts each row of a step may have; 0 if fewer than two would be left for each.

        At that size a draft costs as much as it gains, and only the planning overhead would remain.

        Args:
            room: Number of tokens that the step can still hold; None: enough.
        """
        per_step = self.per_step if room is None else min(self.per_step, room)
        count = min(self.per_row, per_step // num_rows)
        return count if count >= min(self.per_row, 2) else 0


class DeviceLost(Exception):
    """Raised through a step's future when no further step can succeed (a CUDA error); nothing is retried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerTraits:
    """What a runner and its model ask of the plans: sizes, and what a plan may and must contain.

    Attributes:
        num_eager_blocks: Number of blocks to fill before cached contents are evicted, because their memory is
            committed early; None: all.
        max_step_tokens: Maximum number of tokens in a step, drafts included.
        min_chunk: Number of prompt tokens below which a chunk does not make a step faster.
        num_kept_states: Places for states of sequences, besides those of the slots. A sequence can continue
            at a token only from its state there; with 0 places no sequence can reuse computed prefixes. None:
            a sequence's state is only its blocks.
        vision: Which parts of a prompt a step must compute whole, for models that accept images.
        takes_whole_prompts: Whether a prompt is one row of one step and nothing follows; `max_step_tokens`
            then fits the longest prompt.
        has_prompt_arithmetic: Whether keys and values of prompt tokens differ in bits from those of the same
            tokens sampled.
        drafts: How many drafts the runner accepts; None: it samples one token per row.
        windows: Per group of layers that share block tables: number of positions a token attends to, itself
            included; None: all. A block can serve any group.
    """

    num_blocks: int
    block_size: int
    max_batch_size: int
    max_step_tokens: int
    num_eager_blocks: int | None = None
    min_chunk: int = 0
    num_kept_states: int | None = None
    vision: Bidirectional | None = None
    takes_whole_prompts: bool = False
    has_prompt_arithmetic: bool = False
    drafts: DraftLimits | None = None
    windows: tuple[int | None, ...] = (None,)


class Runner(Protocol):
    """Computes steps in the order submitted, with at most `MAX_IN_FLIGHT` in flight."""

    @property
    def traits(self) -> RunnerTraits:
        """What its plans may and must contain; the same for as long as it serves."""

    @property
    def num_threads(self) -> int:
        """The number of CPU threads that computed last; 0 on a GPU."""

    @property
    def progress(self) -> int | None:
        """A number that keeps changing while a step is computed, so that it can be told from a hung one.

        None: the runner cannot tell.
        """

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Queue a step (from the event loop); the future fails if the step raised."""

    def close(self) -> None:
        """Finish the steps in flight and stop the threads."""
