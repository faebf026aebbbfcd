"""Drafts in a CUDA runner's steps: each becomes a row of its own, which decodes in a spare slot.

    plan       slot 5, its last token d, drafts x y         slot 2, its last token e
    laid out   slot 5: d      spare 0: x      spare 1: y    slot 2: e
    sampled            x               w               q            f
    result     slot 5: x, and w because x was right         slot 2: f           q is discarded

For the forward pass, a draft is one more sequence, with the same blocks and a longer context. As within any
step, all keys and values are written before a row reads them. Steps with drafts therefore replay the same
graphs as others. A spare slot is a copy of the sequence's slot, made just before the sampling
(`CudaSampleState.prepare_drafts`), so the kernel that samples knows no drafts either.

Called by `CudaRunner`, which waits for earlier steps where this module says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tgi_asgi.ops import PlanError
from tgi_asgi.runner.cuda_device import Command, Copy
from tgi_asgi.runner.cuda_sampler import CudaSampler, SampleStaging
from tgi_asgi.runner.drafts import SlotDrafts, num_spares
from tgi_asgi.runner.plan import Sampled, SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.runner.sampling import collect
from tgi_asgi.settings.speculation import Speculation


@dataclass(frozen=True, slots=True)
class DraftedRows:
    """What the rows of a laid-out step are in its plan.

    Attributes:
        plan_rows: Row of the plan that each belongs to.
        slots: Slot of each one's sequence.
        drafts: The draft that each computes; -1 if it computes its sequence's own token.
        num_plan_rows: Number of rows in the plan.
    """

    plan_rows: Sequence[int]
    slots: Sequence[int]
    drafts: Sequence[int]
    num_plan_rows: int

    def collect(
        self, computed: StepResult, sampling: Sequence[int], sampled: Sequence[Sampled]
    ) -> tuple[StepResult, list[int], list[Sampled]]:
        """Return the plan's result, and the samples that count with the slots of their sequences.

        Args:
            computed: Result of the rows.
            sampling: Rows that sampled.
            sampled: Their samples.
        """
        of = self.plan_rows
        result = replace(computed, sampled=[None] * self.num_plan_rows)
        result.prompt_logprobs = {of[row]: scores for row, scores in computed.prompt_logprobs.items()}
        result.pooled = {of[row]: vector for row, vector in computed.pooled.items()}
        rows, slots, drafts = ([each[row] for row in sampling] for each in (of, self.slots, self.drafts))
        slots, kept = collect(rows, slots, drafts, sampled, _are_accepted(drafts, sampled), result)
        return result, slots, kept


@dataclass(slots=True)
class LaidStep:
    """A step as the device computes it, on a runner that makes drafts.

    Attributes:
        plan: The plan, with rows of one token instead of those with a `stop`.
        starts: Starts of slots whose tokens the drafter does not know yet; `CudaDrafts.observe` takes them.
        drafted: What the rows are, if they are not those that the engine planned.
        masked: Slots with masks, in the order of the masks, which `before` uploads; None: the step has no
            drafts, and its masks are computed during the forward pass.
        before, after: What comes before and after the sampling of a step with drafts.
    """

    plan: StepPlan
    starts: Sequence[SlotStart]
    drafted: DraftedRows | None = None
    masked: list[int] | None = None
    before: Sequence[Command] = ()
    after: Sequence[Command] = ()


class CudaDrafts:
    """The drafts of a CUDA runner's slots.

        drafts = CudaDrafts(speculation, num_slots=64, max_rows=96)
        if drafts.must_wait(plan): ...                            # for earlier steps
        laid = drafts.lay_out(plan, sampler, staging, is_idle=True)
        drafts.observe(laid.starts, slots, samples)               # on the thread that waited for a step

    Args:
        num_slots: Number of slots of sequences.
        max_rows: Number of rows of a step, drafts included.

    Attributes:
        limits: Maximum numbers of drafts, for the engine.
        num_spares: Number of spare slots, which come after those of sequences.
        are_in_flight: Whether the step launched last has drafts, so that the positions of its slots are not
            known yet.
    """

    def __init__(self, how: Speculation, *, num_slots: int, max_rows: int) -> None:
        self._slots = SlotDrafts(how, num_slots)
        self._first_spare = num_slots
        self._max_rows = max_rows
        self.limits = self._slots.limits
        self.num_spares = num_spares(how, num_slots)
        self.are_in_flight = False

    def must_wait(self, plan: StepPlan) -> bool:
        """Return whether the tokens of earlier steps decide how this step is laid out.

        They do if their number is unknown, or if drafts for this step are likely, given the tokens known so
        far. Where text begins to repeat itself, the first step is thus launched without waiting and without
        drafts; where it never does, none waits.
        """
        if self.are_in_flight:
            return True
        if not any(row.num_drafts for row in plan.rows):
            return False
        return bool(plan.starts) or any(self._slots.choose(plan, _starts(plan), lambda slot: ()))

    def lay_out(
        self, plan: StepPlan, sampler: CudaSampler, staging: SampleStaging, *, is_idle: bool
    ) -> LaidStep:
        """Choose the drafts of a step with stops, and lay it out.

        Args:
            sampler: Has the grammars, which drafts must match and which force some.
            is_idle: Whether all tokens of earlier steps are known. If not, no earlier step has drafts, so
                rows begin at their `start`.

        Raises:
            PlanError: if a slot is outside of its row, or there are more rows or drafts than spare slots.
        """
        if not is_idle:
            return LaidStep(plan, plan.starts)
        for start in plan.starts:
            self._slots.start(start)
        laid = LaidStep(plan, ())
        begins = self._begins(plan)
        drafts = self._slots.choose(plan, begins, sampler.certain)
        if not any(drafts) and begins == _starts(plan):
            return laid
        masked, masks = set[int](), list[Copy]()
        if any(drafts):
            sampling = [at for at, row in enumerate(plan.rows) if row.samples and begins[at] < row.end]
            masked, masks = sampler.masks_along({plan.rows[at].slot: drafts[at] for at in sampling}, staging)
        spares = [[-1] * self.num_spares for _ in range(3)]
        laid.plan, laid.drafted = self._replace_rows(plan, begins, drafts, spares)
        if any(drafts):
            before, laid.after = sampler.drafted(spares, staging)
            laid.before = [*before, *masks]
            all_slots = zip(laid.plan.rows, laid.drafted.slots, strict=True)
            laid.masked = [row.slot for row, slot in all_slots if slot in masked] if masked else []
        return laid

    def observe(self, starts: Iterable[SlotStart], slots: Iterable[int], samples: Iterable[Sampled]) -> None:
        """Learn what a step has changed: the slots that started, and the tokens that count."""
        for start in starts:
            self._slots.start(start)
        self._slots.append(slots, samples)

    def _begins(self, plan: StepPlan) -> list[int]:
        """Return where each row begins: with a `stop`, at its sequence's last token."""
        begins = _starts(plan)
        for index, row in enumerate(plan.rows):
            if row.stop is None:
                continue
            begins[index] = self._slots.native.length(row.slot) - 1
            if not row.start <= begins[index] <= row.stop:
                raise PlanError(
                    f"slot {row.slot} is at {begins[index]}, outside of its row: {row.start} to {row.stop}"
                )
        return begins

    def _replace_rows(
        self,
        plan: StepPlan,
        begins: Sequence[int],
        drafts: Sequence[Sequence[int]],
        spares: Sequence[list[int]],
    ) -> tuple[StepPlan, DraftedRows]:
        """Replace rows with a `stop` by rows of one token; those with nothing left to compute are left out.

        Args:
            spares: Three lists of `num_spares`, which are filled in as `CudaSampleState.drafts`.
        """
        rows: list[StepRow] = []
        origins: list[tuple[int, int, int]] = []  # row of the plan, slot, draft
        # A row's spare slots depend on what the plan allows, not on what was chosen, so they mostly remain
        # copies of the same slot, and its block table need not be read again.
        first = 0
        for index, row in enumerate(plan.rows):
            if row.stop is None:
                rows.append(row)
                origins.append((index, row.slot, -1))
                continue
            slot, begin, of_row = row.slot, begins[index], drafts[index] if drafts else ()
            count = len(of_row)
            if first + count > self.num_spares:
                raise PlanError(f"a step has at most {self.num_spares} drafts")
            if begin < row.stop:
                rows.append(_decode(row, slot, None, begin))
                origins.append((index, slot, -1))
            for spare, token in enumerate(of_row, first):
                rows.append(_decode(row, self._first_spare + spare, (token,), begin + spare - first + 1))
                origins.append((index, slot, token))
            for values, of_drafts in zip(spares, ([slot] * count, range(1, count + 1), of_row), strict=True):
                values[first : first + count] = of_drafts
            first += row.num_drafts
        if len(rows) > self._max_rows:
            raise PlanError(f"a step has at most {self._max_rows} rows, drafts included, got {len(rows)}")
        drafted = DraftedRows(
            [index for index, _, _ in origins],
            [slot for _, slot, _ in origins],
            [draft for _, _, draft in origins],
            len(plan.rows),
        )
        return StepPlan(plan.step_id, rows), drafted


def _starts(plan: StepPlan) -> list[int]:
    return [row.start for row in plan.rows]


def _decode(row: StepRow, slot: int, token_ids: Sequence[int] | None, start: int) -> StepRow:
    """Return a row of one token of the same sequence."""
    return StepRow(slot, token_ids, start, row.block_tables, samples=row.samples, adapter=row.adapter)


def _are_accepted(drafts: Sequence[int], sampled: Sequence[Sampled]) -> list[bool]:
    """Return which samples count: those after a wrong draft do not."""
    found: list[bool] = []
    for index, draft in enumerate(drafts):
        before = sampled[index - 1]
        found.append(draft < 0 or (found[-1] and before.is_finite and before.token_id == draft))
    return found
