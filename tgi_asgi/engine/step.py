"""A planned step, and the handling of its result (append tokens, register blocks) or of its failure."""

from __future__ import annotations

from tgi_asgi.engine.drafting import settle_row
from tgi_asgi.engine.image_encoding import PendingImage, settle
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.states import Keep
from tgi_asgi.engine.step_time import StepSize
from tgi_asgi.engine.tables import BlockTables
from tgi_asgi.runner.plan import StepPlan, StepResult, StepRow


class Step:
    """A planned step: the plan for the runner, and the sequence that each row belongs to."""

    __slots__ = (
        "epochs", "keeps", "num_decode_rows", "num_generated_rows", "num_pairs", "num_prefill_tokens",
        "pending_images", "plan", "sequences",
    )  # fmt: skip

    def __init__(self, step_id: int) -> None:
        self.plan = StepPlan(step_id, [])
        self.pending_images: list[PendingImage] = []  # images that the step encodes
        self.keeps: list[Keep] = []  # states that the step keeps
        self.sequences: list[Sequence] = []  # by row
        self.epochs: list[int] = []  # by row: its sequence's when the step was planned
        self.num_decode_rows = 0
        self.num_generated_rows = 0  # decode rows, and rows that recompute sampled tokens
        self.num_prefill_tokens = 0
        self.num_pairs = 0.0  # as in `StepSize`

    @property
    def size(self) -> StepSize:
        """What determines how long the step takes."""
        return StepSize(self.num_decode_rows, self.num_prefill_tokens, self.num_pairs)

    def start_slot(self, sequence: Sequence) -> None:
        """Let a sequence's slot start with this step."""
        self.plan.starts.append(sequence.slot_start())
        sequence.starts_slot = False

    def insert(self, at: int, row: StepRow, sequence: Sequence) -> None:
        """Add a sequence's row at index `at`; it is live for as long as the sequence keeps its epoch."""
        self.plan.rows.insert(at, row)
        self.sequences.insert(at, sequence)
        self.epochs.insert(at, sequence.epoch)

    def live(self) -> list[tuple[int, Sequence]]:
        """Return (row, sequence) of the live rows: not finished, cancelled or preempted since."""
        pairs = zip(self.sequences, self.epochs, strict=True)
        return [(row, sequence) for row, (sequence, epoch) in enumerate(pairs) if sequence.epoch == epoch]


def apply_result(step: Step, result: StepResult, tables: BlockTables) -> list[tuple[int, Sequence]]:
    """Apply a step's result to its sequences, as `Scheduler.apply`."""
    live = step.live()
    settle(step.pending_images, result)
    for index, sequence in live:
        row = step.plan.rows[index]
        sampled = result.sampled[index]
        if row.stop is not None:
            _apply_drafted(row, sequence, result, index, tables)
            continue
        computed = row.start + row.num_tokens
        tables.settle(sequence, computed)
        if sequence.wants_prompt_logprobs and computed >= sequence.prompt_len:
            sequence.wants_prompt_logprobs = False
        if sampled is not None:
            sequence.num_pending -= 1
            if sampled.is_finite:
                _append(sequence, sampled.token_id)
    if tables.states is not None:
        tables.states.settle(step.keeps)
    return live


def undo_rows(step: Step, tables: BlockTables) -> dict[int, int]:
    """Reset the live sequences of a failed step to where it began.

    Returns:
        By block that the step was to fill: the position from which its contents are lost.
    """
    live, size = dict(step.live()), tables.block_size
    lost: dict[int, int] = {}
    for index, row in enumerate(step.plan.rows):
        begin = row.start
        sequence = live.get(index)
        if sequence is not None:
            # Results that the runner accumulates over a prompt's chunks start over from position 0.
            begin = 0 if sequence.needs_all else sequence.num_computed - row.num_tokens
            sequence.num_computed = begin
            sequence.num_ahead -= row.num_drafts
            sequence.num_registered = min(sequence.num_registered, begin // size)
            sequence.num_pending -= row.samples
            sequence.is_prefilling = True
            sequence.starts_slot = True
        for at in range(begin // size, tables.blocks_for(row.end)):
            for table in row.block_tables:
                lost[table[at]] = max(begin, at * size)
    return lost


def _append(sequence: Sequence, token_id: int) -> bool:
    """Append a sampled token; return whether the slot restarts, which voids the tokens after it."""
    restarts = sequence.append(token_id)
    if restarts:
        _restart_slot(sequence)
    return restarts


def _apply_drafted(
    row: StepRow, sequence: Sequence, result: StepResult, index: int, tables: BlockTables
) -> None:
    """Apply the tokens of a row with a `stop`; there may be none if its sequence has ended."""
    first, draft_samples = result.sampled[index], result.draft_samples.get(index, [])
    samples = [] if first is None else [first, *draft_samples]
    sequence.num_pending -= 1
    settle_row(row, sequence, len(samples))
    for at, sampled in enumerate(samples):
        if sampled.is_finite and _append(sequence, sampled.token_id):
            del draft_samples[at:]
            break
    tables.settle(sequence, min(sequence.num_computed, len(sequence.token_ids) - 1))


def _restart_slot(sequence: Sequence) -> None:
    """Make the next row restart the slot after the newest known token; rows in flight are void."""
    sequence.epoch += 1
    sequence.num_computed = len(sequence.token_ids) - 1
    sequence.num_pending = sequence.num_ahead = 0
    sequence.starts_slot = True
