"""Between a plan's values and the `sample` operator: slots that start, and results for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tgi_asgi.ops import FlatRows, SampleResult, SampleState
from tgi_asgi.runner.plan import Sampled, SlotStart, StepPlan, StepResult

if TYPE_CHECKING:
    from tgi_asgi.ops.cuda_sample_state import CudaSampleState


def start_slot(
    state: SampleState | CudaSampleState, start: SlotStart, begun: Sequence[int] | None = None
) -> None:
    """Reset the sampling state of a slot that starts.

    Args:
        begun: Tokens that penalties count instead of the prompt's: an encoder-decoder's prompt is another
            text.

    Raises:
        ValueError: as `start` of the state's class.
    """
    state.start(
        start.slot,
        start.sampling,
        choice=start.choice,
        prompt_ids=start.prompt_ids,
        begun=begun,
        output_ids=start.output_ids,
        min_tokens=start.min_tokens,
        masked_ids=start.masked_ids if start.grammar is None else (),  # else the grammar's mask has them
    )


@dataclass(frozen=True, slots=True)
class StepSamples:
    """The samples of a step: one per row, and one more after each of its drafts.

    Attributes:
        rows: Plan row of each sample.
        tokens: Index, within the step, of the token that each sample follows.
        slots: Slot of each sample.
        drafts: The draft that the sample follows; -1 if it follows the row's own token.
    """

    rows: list[int]
    tokens: list[int]
    slots: list[int]
    drafts: list[int]

    @classmethod
    def of(cls, plan: StepPlan, batch: FlatRows) -> StepSamples:
        """Return the samples of a batch, without rows that return a vector instead of a token."""
        found = zip(
            batch.sample_plan_rows.tolist(),
            batch.sample_after.tolist(),
            batch.sample_slots.tolist(),
            batch.drafts.tolist(),
            strict=True,
        )
        samples = [each for each in found if plan.rows[each[0]].pooling is None]
        return cls(*map(list, zip(*samples, strict=True))) if samples else cls([], [], [], [])

    def collect(self, results: SampleResult, result: StepResult) -> tuple[list[int], list[Sampled]]:
        """Store the samples that count in a step's result; return their slots and the samples."""
        assert results.is_accepted is not None
        are_accepted: list[bool] = results.is_accepted.tolist()
        return collect(self.rows, self.slots, self.drafts, unpack(results), are_accepted, result)


def collect(
    rows: Sequence[int],
    slots: Sequence[int],
    drafts: Sequence[int],
    samples: Sequence[Sampled],
    are_accepted: Sequence[bool],
    result: StepResult,
) -> tuple[list[int], list[Sampled]]:
    """Store the samples that count in a step's result; return their slots and the samples.

    Args:
        rows, slots, drafts: As in `StepSamples`.
        are_accepted: Whether each sample counts.
    """
    kept_slots, kept = [], []
    for row, slot, draft, sampled, is_accepted in zip(
        rows, slots, drafts, samples, are_accepted, strict=True
    ):
        if draft >= 0:
            result.num_drafts += 1
        if not is_accepted:
            continue
        kept_slots.append(slot)
        kept.append(sampled)
        if draft < 0:
            result.sampled[row] = sampled
        else:
            result.draft_samples.setdefault(row, []).append(sampled)
    result.num_drafted_rows = len({row for row, draft in zip(rows, drafts, strict=True) if draft >= 0})
    return kept_slots, kept


def unpack(result: SampleResult) -> list[Sampled]:
    """Convert the result's arrays to one `Sampled` per row, on the runner's thread."""
    ids: list[int] = result.token_ids.tolist()
    are_finite: list[bool] = result.is_finite.tolist()
    logprobs: list[float] = result.logprobs.tolist()
    tops: list[list[tuple[int, float]]] = [[] for _ in ids]
    if result.top_ids.shape[1] > 0:
        tops = unpack_top(result.top_ids.tolist(), result.top_logprobs.tolist(), result.num_top.tolist())
    return [
        # NaN, the only value unequal to itself: the slot wants no log-probabilities, or the row has none.
        Sampled(token_id, logprob, top, is_finite)
        if logprob == logprob
        else Sampled(token_id, is_finite=is_finite)
        for token_id, is_finite, logprob, top in zip(ids, are_finite, logprobs, tops, strict=True)
    ]


def unpack_top(
    ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], counts: Sequence[int]
) -> list[list[tuple[int, float]]]:
    """Pair each row's first `counts` ids with their log-probabilities."""
    return [
        list(zip(row_ids[:count], row_logprobs[:count], strict=True))
        for row_ids, row_logprobs, count in zip(ids, logprobs, counts, strict=True)
    ]
