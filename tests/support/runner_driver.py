"""Drive a runner like the engine does, with two steps in flight, but with every decision made in advance."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tgi_asgi.runner.plan import Runner, Sampled, SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.types import PromptLogprobs, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class Job:
    """One sequence to generate; `generate` fills `sampled` and `prompt_logprobs`."""

    prompt_ids: Sequence[int]
    num_tokens: int
    sampling: SamplingParams = GREEDY
    wants_prompt_logprobs: int | None = None
    start: dict[str, Any] = field(default_factory=dict)  # further arguments of `SlotStart`, such as a grammar
    adapter: Any = None  # the adapter's weights
    sampled: list[Sampled] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [sampled.token_id for sampled in self.sampled]


class _Running:
    """A job's slot, block tables and progress."""

    def __init__(self, job: Job, slot: int, tables: list[list[int]]) -> None:
        self.job = job
        self.slot = slot
        self.tables = tables
        self.num_computed = 0

    @property
    def is_done(self) -> bool:
        return self.num_computed >= len(self.job.prompt_ids) + self.job.num_tokens - 1

    def next_row(self, budget: int) -> StepRow:
        start, prompt = self.num_computed, self.job.prompt_ids
        if start >= len(prompt):
            self.num_computed += 1
            return StepRow(self.slot, None, start, self.tables, samples=True, adapter=self.job.adapter)
        chunk = prompt[start : start + budget]
        self.num_computed += len(chunk)
        is_last = self.num_computed == len(prompt)
        return StepRow(
            self.slot,
            chunk,
            start,
            self.tables,
            samples=is_last and self.job.num_tokens > 0,
            prompt_logprobs=self.job.wants_prompt_logprobs,
            adapter=self.job.adapter,
        )


async def generate(runner: Runner, jobs: Sequence[Job], *, chunk: int = 512) -> None:
    """Run all jobs to completion in one continuous batch: decode rows first, prompts in chunks."""
    blocks = iter(range(runner.traits.num_blocks - 1, -1, -1))  # descending, so that no table is in order
    running = []
    starts = []
    for slot, job in enumerate(jobs):
        count = -(-(len(job.prompt_ids) + job.num_tokens) // runner.traits.block_size)
        tables = [[next(blocks) for _ in range(count)] for _ in runner.traits.windows]
        running.append(_Running(job, slot, tables))
        starts.append(SlotStart(slot, job.sampling, 0, job.prompt_ids, **job.start))
    waiting: list[tuple[asyncio.Future[StepResult], list[_Running]]] = []
    step_id = 0
    try:
        while any(not sequence.is_done for sequence in running):
            decoding = [s for s in running if not s.is_done and s.num_computed >= len(s.job.prompt_ids)]
            members, rows, budget = list(decoding), [s.next_row(1) for s in decoding], chunk
            for sequence in running:
                if (
                    budget
                    and sequence not in decoding
                    and sequence.num_computed < len(sequence.job.prompt_ids)
                ):
                    rows.append(sequence.next_row(budget))
                    budget -= rows[-1].num_tokens
                    members.append(sequence)
            if len(waiting) == 2:
                await _collect(*waiting.pop(0))
            waiting.append((runner.submit(StepPlan(step_id, rows, starts)), members))
            step_id, starts = step_id + 1, []
        for step in waiting:
            await _collect(*step)
    finally:  # the step after a failed one fails too; retrieve its exception here
        await asyncio.gather(*(future for future, _ in waiting), return_exceptions=True)
    for job in jobs:  # callers compare token by token
        assert len(job.sampled) == job.num_tokens


async def _collect(future: asyncio.Future[StepResult], members: Sequence[_Running]) -> None:
    result = await future
    for index, (sequence, sampled) in enumerate(zip(members, result.sampled, strict=True)):
        sequence.job.prompt_logprobs += result.prompt_logprobs.get(index, [])
        if sampled is not None:
            sequence.job.sampled.append(sampled)


def compare(found: Sequence[Job], expected: Sequence[Job], tolerance: float = 2e-3) -> None:
    """Compare texts and the log-probabilities of sampled tokens, top tokens and prompts."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        for mine, other in zip(ours.sampled, theirs.sampled, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=tolerance)
            assert dict(mine.top or ()) == pytest.approx(dict(other.top or ()), abs=tolerance)
        assert len(ours.prompt_logprobs) == len(theirs.prompt_logprobs)
        for (mine_logprob, _), (other_logprob, _) in zip(
            ours.prompt_logprobs, theirs.prompt_logprobs, strict=True
        ):
            assert mine_logprob == pytest.approx(other_logprob, abs=tolerance)


async def sample_over_a_shared_block(
    runner: Runner, prompt: Sequence[int], sampling: SamplingParams
) -> list[list[Sampled | None]]:
    """Run a prompt twice in one step, the second reading the block that the first writes; decode both.

    Returns:
        The tokens sampled for the two rows in each of four steps.
    """
    starts = [SlotStart(slot, sampling, 0, prompt) for slot in (0, 1)]
    writer = StepRow(0, prompt, 0, [[5, 9]], samples=True)
    reader = StepRow(1, prompt[16:], 16, [[5, 11]], samples=True)
    steps = [(await runner.submit(StepPlan(0, [writer, reader], starts))).sampled]
    for step in range(1, 4):
        at = len(prompt) + step - 1
        rows = [StepRow(0, None, at, [[5, 9]], samples=True), StepRow(1, None, at, [[5, 11]], samples=True)]
        steps.append((await runner.submit(StepPlan(step, rows))).sampled)
    return steps
