"""A runner without a model, and a matching tokenizer, for tests of everything above the runner.

    runner = FakeRunner(num_blocks=64)
    engine = Engine(runner, FakeTokenizer(), Settings(), fake_info())

Its KV cache is a table of (token, position) entries, written and read through the block tables like a real
one. Each row checks that it reads exactly its own sequence's tokens at their positions. A block that is
wrongly shared, reused or copied therefore fails the step, and the message is kept in `violations`. With
`has_prompt_arithmetic`, each row also checks that prompt tokens were computed with prompt arithmetic and
sampled tokens with decode arithmetic. With `num_kept_states`, each row also checks that the recurrent state
it resumes from covers exactly the preceding tokens.

The next token is a function of the tokens read, the seed and the choice: `expected_tokens` returns what a
request must produce, whatever else runs at the same time.
"""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from tests.support.fake_states import FakeStates
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.runner.plan import (
    DraftLimits,
    RunnerTraits,
    Sampled,
    SlotStart,
    StepPlan,
    StepResult,
    StepRow,
)
from tgi_asgi.types import Bidirectional, PromptLogprobs, SamplingParams

EOS_ID = 256
BOS_ID = 257
VOCAB_SIZE = 258
GARBAGE = -1
# An entry of the cache: a token, its position, whether it was computed as a sampled token, its adapter, and
# the group of layers that wrote it.
_Written = tuple[int, int, bool, Any, int]
_NOTHING: _Written = (GARBAGE, GARBAGE, False, None, 0)

NextToken = Callable[[Sequence[int], SamplingParams, int], int]


class FakeTokenizer:
    """A tokenizer whose ids 0..255 are the bytes; EOS and BOS are special tokens."""

    vocab_size = VOCAB_SIZE
    eos_ids = frozenset({EOS_ID})
    special_ids = frozenset({EOS_ID, BOS_ID})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes((token_id,)) if token_id < 256 else {EOS_ID: b"<eos>", BOS_ID: b"<bos>"}[token_id]


def fake_info(max_total_tokens: int = 4096) -> ModelInfo:
    """Return the description of a model with FakeTokenizer's vocabulary."""
    return ModelInfo(
        model_id="fake",
        revision=None,
        architecture="FakeForCausalLM",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB_SIZE,
        max_input_tokens=max_total_tokens - 1,
        max_total_tokens=max_total_tokens,
        eos_token_ids=frozenset({EOS_ID}),
    )


def letters(tokens: Sequence[int], sampling: SamplingParams, choice: int) -> int:
    """Sample a lower-case letter from all preceding tokens; greedy sampling ignores seed and choice."""
    key = (0, 0) if sampling.temperature == 0 else (sampling.seed, choice)
    return 97 + crc32(repr(key).encode(), crc32(array("q", tokens).tobytes())) % 26


def script(text: bytes | Sequence[int], then: int = EOS_ID) -> Callable[[int], NextToken]:
    """Make a next-token function that says `text` after a prompt of the given length: `script(b"hi")(5)`."""

    def after(prompt_len: int) -> NextToken:
        def next_token(tokens: Sequence[int], sampling: SamplingParams, choice: int) -> int:
            index = len(tokens) - prompt_len
            return text[index] if index < len(text) else then

        return next_token

    return after


def expected_tokens(
    prompt_ids: Sequence[int],
    num_tokens: int,
    *,
    sampling: SamplingParams | None = None,
    choice: int = 0,
    next_token: NextToken = letters,
) -> list[int]:
    """Return what a request must produce, ignoring EOS and other reasons to stop."""
    tokens = list(prompt_ids)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, sampling or SamplingParams(temperature=0), choice))
    return tokens[len(prompt_ids) :]


@dataclass
class _Slot:
    start: SlotStart
    tokens: list[int]  # prompt and output, including sampled tokens
    num_pooled: int = 0  # prompt tokens given so far for pooling
    num_scored: int = 0  # prompt tokens given so far for log-probabilities

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.start.prompt_ids)


@dataclass
class _Queued:
    plan: StepPlan
    future: asyncio.Future[StepResult]
    is_tainted: bool = False  # queued after a step that failed; its results are meaningless


@dataclass
class FakeRunner:
    """A runner that executes plans in order on a simulated cache, one per loop turn or every `step_s`.

    With `vision`, an image is encoded after it came first in the images of `encode_steps` steps; no row may
    include it earlier.

    With `drafts`, each row that allows drafts guesses as many tokens as a hash determines; the first few are
    right.

    With `is_manual`, a step runs when `run_next` is called. Hooks can be set at any time: `fault(plan)` may
    return the exception that a step fails with, `is_poisoned(tokens)` makes a row's logits non-finite, and
    `next_token` samples.
    """

    num_blocks: int = 64
    block_size: int = 16
    max_batch_size: int = 64
    max_step_tokens: int = 4096
    num_eager_blocks: int | None = None
    num_kept_states: int | None = None
    vision: Bidirectional | None = None
    encode_steps: int = 2
    takes_whole_prompts: bool = False
    min_chunk: int = 0
    has_prompt_arithmetic: bool = False
    drafts: DraftLimits | None = None
    num_threads: int = 0
    progress: int | None = None
    windows: tuple[int | None, ...] = (None,)
    next_token: NextToken = letters
    step_s: float = 0.0
    is_manual: bool = False
    fault: Callable[[StepPlan], BaseException | None] | None = None
    is_poisoned: Callable[[Sequence[int]], bool] | None = None
    violations: list[str] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)  # in order of execution
    max_adapters: int = 8  # limit for one step
    keeps_plans: bool = True  # set to False for servers that run for long
    is_closed: bool = False

    def __post_init__(self) -> None:
        size = self.num_blocks * self.block_size
        self._store: list[_Written] = [_NOTHING] * size
        self._states = FakeStates(self.num_kept_states or 0, self._extent, self._require)
        self._slots: dict[int, _Slot] = {}
        self._tables: dict[int, list[tuple[Sequence[int], list[int]]]] = {}  # by slot: tables, their entries
        self._guesses: dict[int, list[int]] = {}  # of the current step, by slot
        self._num_encodes: Counter[bytes] = Counter()  # by digest
        self._queue: deque[_Queued] = deque()
        self._is_pumping = False
        self._has_failed = False

    @property
    def traits(self) -> RunnerTraits:
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(RunnerTraits)}
        return RunnerTraits(**values)

    @property
    def num_in_flight(self) -> int:
        return len(self._queue)

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        queued = _Queued(plan, loop.create_future(), is_tainted=self._has_failed)
        queued.future.add_done_callback(self._on_delivered)
        self._queue.append(queued)
        self._require(len(self._queue) <= 2, "more than two steps in flight")
        self._require(not self.is_closed, "a step after close()")
        if not self.is_manual:
            self._pump_later()
        return queued.future

    def close(self) -> None:
        self.is_closed = True

    def run_next(self) -> None:
        """Run the oldest step in flight."""
        queued = self._queue.popleft()
        try:
            result = self.execute(queued.plan, is_tainted=queued.is_tainted)
        except Exception as error:
            self._has_failed = True  # until the future has notified the engine
            for later in self._queue:
                later.is_tainted = True
            if not queued.future.cancelled():
                queued.future.set_exception(error)
        else:
            if not queued.future.cancelled():
                queued.future.set_result(result)

    def _on_delivered(self, future: asyncio.Future[StepResult]) -> None:
        self._has_failed = False

    def _pump_later(self) -> None:
        if not self._is_pumping and self._queue:
            self._is_pumping = True
            loop = asyncio.get_running_loop()
            if self.step_s:
                loop.call_later(self.step_s, self._pump)
            else:
                loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pumping = False
        if self._queue and not self.is_manual:
            self.run_next()
            self._pump_later()

    def execute(self, plan: StepPlan, *, is_tainted: bool = False) -> StepResult:
        """Run a step immediately: slots start, blocks are copied, rows write, then rows read and sample."""
        if self.keeps_plans:
            self.plans.append(plan)
        error = self.fault(plan) if self.fault is not None else None
        if error is not None:
            is_tainted = True
        self._check_plan(plan)
        for start in plan.starts:
            tokens = [*start.prompt_ids, *start.output_ids]
            self._slots[start.slot] = _Slot(start, tokens)
        size = self.block_size
        for source, target in plan.copies:
            self._store[target * size : (target + 1) * size] = self._store[
                source * size : (source + 1) * size
            ]
        self._guesses = {
            row.slot: [] if is_tainted else self._guess(row) for row in plan.rows if row.stop is not None
        }
        self._states.check_places(plan)
        for row in plan.rows:
            self._check_images(row)
            self._write(row, is_tainted)
        if self.num_kept_states is not None:
            self._states.move(plan, is_tainted=is_tainted)
        if error is not None:
            raise error
        result = StepResult(plan.step_id, [])
        for index, row in enumerate(plan.rows):
            if row.stop is not None:
                self._drafted_row(index, row, is_tainted, result)
                continue
            result.sampled.append(self._row(row, is_tainted))
            if row.prompt_logprobs is not None and not is_tainted:
                result.prompt_logprobs[index] = self._score(row)
            if row.pooling is not None and row.samples and not is_tainted:
                result.pooled[index] = fake_vector(self._slots[row.slot].tokens)
        for image in plan.images:
            if self._num_encodes[image.digest] < self.encode_steps:
                self._num_encodes[image.digest] += 1
                break
        result.is_encoded = [self._num_encodes[image.digest] >= self.encode_steps for image in plan.images]
        return result

    def _extent(self, row: StepRow) -> tuple[list[int], int, int]:
        """Return a row's sequence with its drafts, and the start and end of what the row computes."""
        tokens = self._slots[row.slot].tokens
        if row.stop is None:
            return tokens, row.start, row.start + row.num_tokens
        begin = len(tokens) - 1
        guesses = self._guesses[row.slot]
        return [*tokens, *guesses], begin, begin + 1 + len(guesses) if begin < row.stop else begin

    def _check_images(self, row: StepRow) -> None:
        start, end = row.start, row.start + row.num_tokens
        slot = self._slots[row.slot].start
        if self.vision is Bidirectional.PROMPT:
            self._require(end >= len(slot.prompt_ids), "a prompt is cut")
        for image in slot.images if self.vision is not None else ():
            first, stop = image.start, image.start + image.num_tokens
            is_inside = first < end and stop > start
            if image.is_seen_by_all or is_inside:
                self._require(self._num_encodes[image.digest] >= self.encode_steps, "an image is not encoded")
            if self.vision is Bidirectional.IMAGES and is_inside:
                self._require(end >= stop, "an image is cut")

    def _score(self, row: StepRow) -> PromptLogprobs:
        slot, tokens = self._slots[row.slot], row.token_ids or ()
        self._require(slot.num_scored == row.start, "a prompt is not scored from its beginning")
        slot.num_scored += len(tokens)
        return [
            (fake_logprob(token) if row.start + at else None, [(token, fake_logprob(token))])
            for at, token in enumerate(tokens)
        ]

    def _check_plan(self, plan: StepPlan) -> None:
        self._require(bool(plan.rows or plan.images), "an empty step")
        slots = [row.slot for row in plan.rows]
        self._require(len(slots) <= self.max_batch_size, "too many rows")
        self._require(len(set(slots)) == len(slots), "a slot twice in a step")
        self._require(all(0 <= slot < self.max_batch_size for slot in slots), "no such slot")
        num_drafts = sum(row.num_drafts for row in plan.rows)
        num_tokens = sum(row.num_tokens for row in plan.rows)
        self._require(num_tokens + num_drafts <= self.max_step_tokens, "too many tokens")
        self._require(self.drafts is not None or not num_drafts, "drafts without draft limits")
        self._require(self.drafts is None or num_drafts <= self.drafts.per_step, "too many drafts")
        if self.takes_whole_prompts:
            are_whole = all(row.samples and row.start == 0 and row.token_ids for row in plan.rows)
            self._require(are_whole, "a prompt is not whole")
        sizes = [row.num_tokens for row in plan.rows]
        first_chunk = next((at for at, size in enumerate(sizes) if size > 1), len(sizes))
        late = [row for row in plan.rows[first_chunk:] if row.token_ids is None]
        self._require(not late, "decode rows do not come first")
        if self.has_prompt_arithmetic:
            kinds = [not row.is_generated for row in plan.rows]
            self._require(kinds == sorted(kinds), "rows of generated tokens do not come first")
        adapters = [row.adapter for row in plan.rows]
        num_adapters = len(set(adapters) - {None})
        self._require(num_adapters <= self.max_adapters, "too many adapters")
        decoding = [row.adapter for row in plan.rows if row.token_ids is None]
        decoding = [key for key, _ in itertools.groupby(decoding)]
        are_together = len(decoding) == len(set(decoding)) and None not in decoding[1:]
        self._require(are_together, "rows of one adapter are not neighbours")

    def _guess(self, row: StepRow) -> list[int]:
        """Return drafts for a row; the first few are right and the others wrong."""
        slot = self._slots[row.slot]
        begin, stop = len(slot.tokens) - 1, row.end
        self._require(row.token_ids is None, "a row with a stop has token ids")
        self._require(row.start <= begin <= stop, f"slot {row.slot} is at {begin}: {row.start}..{stop}")
        most = min(row.num_drafts, stop - begin - 1)
        if most <= 0:
            return []
        count, num_right = divmod(crc32(array("q", slot.tokens).tobytes()), 7)
        tokens = list(slot.tokens)
        for at in range(count % (most + 1)):
            token = self._next(slot, tokens)
            tokens.append(token if at < num_right else (token + 1) % 256)
        return tokens[len(slot.tokens) :]

    def _drafted_row(self, index: int, row: StepRow, is_tainted: bool, result: StepResult) -> None:
        """Sample the tokens of a row with a `stop`, up to the first that differs from its draft."""
        slot, guesses = self._slots[row.slot], self._guesses[row.slot]
        result.sampled.append(None)
        if is_tainted:
            slot.tokens.append(0)
            result.sampled[index] = Sampled(0)
            return
        if len(slot.tokens) - 1 >= row.end:
            return
        result.num_drafts += len(guesses)
        result.num_drafted_rows += bool(guesses)
        for at in range(len(guesses) + 1):
            self._read(row, slot, len(slot.tokens) - 1, len(slot.tokens))
            sampled = self._sample(slot)
            if at == 0:
                result.sampled[index] = sampled
            else:
                result.draft_samples.setdefault(index, []).append(sampled)
            if at == len(guesses) or sampled.token_id != guesses[at] or not sampled.is_finite:
                return

    def _write(self, row: StepRow, is_tainted: bool) -> None:
        slot = self._slots[row.slot]
        is_generated = self.has_prompt_arithmetic and row.is_generated
        if row.stop is not None:
            begin = len(slot.tokens) - 1
            tokens = [slot.tokens[-1], *self._guesses[row.slot]] if begin < row.stop else []
            start, stop = max(begin, row.start), row.stop
            if not is_tainted:
                start, stop = begin, begin + len(tokens)
        else:
            tokens = slot.tokens[-1:] if row.token_ids is None else list(row.token_ids)
            self._require(bool(tokens), "a row without tokens")
            start, stop = row.start, row.start + len(tokens)
        for group in range(len(self.windows)):
            same = (is_generated, row.adapter, group)
            for at, place in enumerate(self._places(row, range(start, stop), group), start):
                self._store[place] = _NOTHING if is_tainted else (tokens[at - start], at, *same)

    def _read(self, row: StepRow, slot: _Slot, start: int, end: int) -> None:
        """Check what tokens [start, end) of a sequence read, within each group's window."""
        num_prompt = len(slot.start.prompt_ids) if self.has_prompt_arithmetic else end
        for group, window in enumerate(self.windows):
            positions = range(0 if window is None else max(start - window + 1, 0), end)
            seen = [self._store[place] for place in self._places(row, positions, group)]
            wanted = [(slot.tokens[at], at, at >= num_prompt, row.adapter, group) for at in positions]
            if seen != wanted:
                self._require(False, f"slot {row.slot} at {start}: reads {seen}, wants {wanted}")

    def _row(self, row: StepRow, is_tainted: bool) -> Sampled | None:
        slot = self._slots[row.slot]
        end = row.start + row.num_tokens
        self._check_tables(row)
        if is_tainted:
            if row.pooling is not None:
                return None
            if row.samples:
                slot.tokens.append(0)
            return Sampled(0) if row.samples else None
        self._read(row, slot, row.start, end)
        if row.pooling is not None and row.pooling.needs_all:
            self._require(slot.num_pooled == row.start, "a prompt is not pooled from its beginning")
            slot.num_pooled = end
        if not row.samples or row.pooling is not None:
            return None
        self._require(end == len(slot.tokens), f"slot {row.slot} samples before its last token")
        return self._sample(slot)

    def _sample(self, slot: _Slot) -> Sampled:
        sampling = slot.start.sampling
        token = self._next(slot, slot.tokens)
        is_finite = self.is_poisoned is None or not self.is_poisoned(slot.tokens)
        slot.tokens.append(token)
        if sampling.logprobs is None:
            return Sampled(token, is_finite=is_finite)
        top = [((token + rank) % VOCAB_SIZE, -0.5 - rank) for rank in range(sampling.logprobs)]
        return Sampled(token, fake_logprob(token), top, is_finite)

    def _next(self, slot: _Slot, tokens: Sequence[int]) -> int:
        token = self.next_token(tokens, slot.start.sampling, slot.start.choice)
        num_output = len(tokens) - len(slot.start.prompt_ids)
        while num_output < slot.start.min_tokens and token in slot.start.masked_ids:
            token = (token + 1) % VOCAB_SIZE
        return token

    def _check_tables(self, row: StepRow) -> None:
        """Check that a block table has what it had when the slot's last row was run, and maybe more."""
        known = {id(table): entries for table, entries in self._tables.get(row.slot, ())}
        for table in row.block_tables:
            entries = known.get(id(table), [])
            self._require(list(table[: len(entries)]) == entries, "an entry of a block table has changed")
        self._tables[row.slot] = [(table, list(table)) for table in row.block_tables]

    def _places(self, row: StepRow, positions: range, group: int) -> list[int]:
        """Return the places in the store of a sequence's positions, block by block: it has thousands."""
        self._require(len(row.block_tables) == len(self.windows), "not one block table for each group")
        if not positions:
            return []
        table, size = row.block_tables[group], self.block_size
        first, last = positions[0] // size, positions[-1] // size
        self._require(last < len(table), "the block table is too short")
        blocks = table[first : last + 1]
        self._require(all(0 <= block < self.num_blocks for block in blocks), f"no such block: {blocks}")
        places = [place for block in blocks for place in range(block * size, (block + 1) * size)]
        begin = positions[0] - first * size
        return places[begin : begin + len(positions)]

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            self.violations.append(message)
            raise AssertionError(message)


def fake_vector(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the vector that FakeRunner makes of a prompt, regardless of the pooling mode."""
    return np.array([len(tokens), crc32(array("q", tokens).tobytes()) % 4096], np.float32)


def fake_logprob(token: int) -> float:
    """Return the log-probability that FakeRunner reports for a token."""
    return -0.5 - token % 8 / 8
