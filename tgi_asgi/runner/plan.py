"""What passes between the engine and a runner: one step's plan down, its sampled tokens up.

Plain values without torch, so that the scheduler can be tested alone and the engine with a scripted runner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tgi_asgi.types import Eyes, ImageInput, Pooling, SamplingParams

if TYPE_CHECKING:
    from tgi_asgi.text.constrain.grammar import Grammar
    from tgi_asgi.types import Vector


@dataclass(slots=True)
class SlotStart:
    """Give a slot to a sequence: the runner resets the slot's sampling state to this.

    `output_ids` are the tokens that the sequence had generated before it was preempted (else empty); they
    count for penalties, and the first draw is of output token number `len(output_ids)`.
    """

    slot: int
    sampling: SamplingParams
    choice: int  # the draw's key is (seed, choice)
    prompt_ids: Sequence[int]
    output_ids: Sequence[int] = ()
    min_tokens: int = 0  # output tokens before which `masked_ids` cannot be sampled
    masked_ids: tuple[int, ...] = ()  # EOS and stop token ids
    grammar: Grammar | None = None  # what the output must match
    images: tuple[ImageInput, ...] = ()  # of the prompt


@dataclass(slots=True)
class StateMoves:
    """What of a row's states is not its slot's: of models with recurrent layers alone.

    The state that a row begins with is its slot's, else that of place `resumes`. On the way the row's states
    are kept, each in front of a position that the row computes, above 0, in a place that no other row of the
    step has to do with; positions ascend. Of a row that may have drafts only its `start` may be one, and it
    begins there. Of a step that fails none is kept.
    """

    resumes: int | None = None  # [0, num_kept_states)
    keeps: Sequence[tuple[int, int]] = ()  # (position, place)


@dataclass(slots=True)
class StepRow:
    """One sequence's part of a step."""

    slot: int  # [0, max_batch_size)
    token_ids: Sequence[int] | None  # None: one token, the one this slot sampled last, still on the device
    start: int  # position of the first token, which is the number of its tokens already in the KV cache
    # One for each of `Runner.windows`; covers at least start + number of tokens, but for what lies before the
    # window of the first: there anything may stand. The engine's own lists: while the step is in flight they
    # may grow at their ends, and nothing else in them changes.
    block_tables: Sequence[Sequence[int]]
    samples: bool  # draw a token after the last one
    prompt_logprobs: int | None = None  # k: log-probabilities of this chunk's tokens, and of the k best
    # How the prompt that this is a chunk of becomes a vector: where `samples` is set it ends here, and the
    # row gives one in the place of a draw. Chunks come in order, from position 0 on if `pools.needs_all`.
    pools: Pooling | None = None
    second_start: int | None = None  # as `GenerationRequest.second_start`
    # Its tokens were drawn. (Computed again, also in rows without this, unless prompts have an arithmetic.)
    is_generated: bool = False
    # Where steps in flight may draw several tokens, or this row may: it begins where its slot is, from
    # `start` on, and ends before `stop`, which the table covers; it may be that nothing is left to compute.
    # None: exactly at `start`.
    stop: int | None = None
    num_drafts: int = 0  # most tokens that the runner may guess and compute behind the row's own
    adapter: Any = None  # `Adapter.weights`; steps are fastest where rows of one adapter are neighbours
    states: StateMoves | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that it computes at the least."""
        return 1 if self.token_ids is None else len(self.token_ids)

    @property
    def end(self) -> int:
        """Behind the last position that it may write."""
        return self.start + self.num_tokens if self.stop is None else self.stop


@dataclass(slots=True)
class StepPlan:
    """What one step computes. In order: slots start, blocks are copied, rows run, images are encoded."""

    step_id: int
    rows: list[StepRow]  # decode rows first, then prefill chunks; those of generated tokens before the others
    starts: list[SlotStart] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from block, to block)
    # Images to encode ahead of the steps that need them, in turn, as far as the time goes: at least a piece.
    views: list[ImageInput] = field(default_factory=list)
    view_s: float = 0.0
    cost: tuple[float, float] = (0.0, 0.0)  # seconds of a step that decodes, and of each of its tokens


@dataclass(slots=True)
class Sampled:
    """One row's draw."""

    token_id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] | None = None  # descending
    is_finite: bool = True  # False: the row's logits held NaN or +inf; the token means nothing
    is_last: bool = False  # the slot's grammar is complete, and nothing can follow
    failure: str | None = None  # why the slot's grammar cannot go on; the token means nothing


# Of each token of a chunk: its log-probability given those before it (None at position 0), and the k best.
PromptLogprobs = list[tuple[float | None, Sequence[tuple[int, float]]]]


@dataclass(slots=True)
class StepResult:
    """What a step drew."""

    step_id: int
    sampled: list[Sampled | None]  # one a row; None where the row does not sample, or had nothing left
    further: dict[int, list[Sampled]] = field(default_factory=dict)  # by row index: behind that, by drafts
    num_drafted_rows: int = 0  # that had drafts
    num_drafts: int = 0
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)  # by row index
    pooled: dict[int, Vector] = field(default_factory=dict)  # likewise: float32, the caller's own
    is_viewed: list[bool] = field(default_factory=list)  # one a view: it needs no more of this
    view_s: float = 0.0  # what the views have taken of the step


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """How many drafts a runner takes."""

    per_row: int
    per_step: int


class DeviceLost(Exception):
    """Raised through a step's future when no further step can succeed (a CUDA error): nothing is retried."""


class Runner(Protocol):
    """Computes steps, in the order submitted, at most two of them in flight."""

    num_blocks: int
    block_size: int
    max_batch_size: int
    max_step_tokens: int
    least_chunk: int  # tokens of a prompt, fewer of which take a step no less time
    # Places for states of sequences, beside those of the slots: without its state at a token no sequence goes
    # on there. With 0 none can share what it has computed. None: blocks are all that there is of a sequence.
    num_kept_states: int | None
    eyes: Eyes | None  # of a model that takes images
    # A prompt is one row of one step, and nothing follows; `max_step_tokens` hold the longest.
    takes_whole_prompts: bool
    # Keys and values of a prompt's tokens have other bits than those of the same tokens drawn.
    has_prompt_arithmetic: bool
    drafts: DraftLimits | None  # None: it draws one token a row
    # Of each group of layers, which share block tables: how many positions a token sees, its own the last;
    # None: all. A block is of any group.
    windows: tuple[int | None, ...]

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Queue a step (from the event loop); the future fails if the step raised."""

    def close(self) -> None:
        """Finish the steps in flight and stop the threads."""
