"""The requests that each contender of bench.peers gets, and the figures computed from its answers.

All use the API, with one client program, so engines without a benchmark of their own are measured in the same
way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from bench.client import Answer
from bench.loads import ClosedLoop, Prompts, run
from bench.report import percentile

MIN_REQUESTS = 3  # per load
TPOT_TARGETS_MS = (25, 50, 100)
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """Single prompts by length, and concurrent chat clients.

    Attributes:
        prompts: Tokens of each prompt whose first token is awaited on an idle server.
        clients: Number of clients of each load; all start at once.
        prompt_tokens, max_tokens: Sizes of a chat.
    """

    prompts: Sequence[int]
    clients: Sequence[int]
    prompt_tokens: int
    max_tokens: int

    @property
    def max_clients(self) -> int:
        return max(1, *self.clients)


@dataclass(frozen=True, slots=True)
class Stage:
    """The loads that one server instance gets, all with the same number of clients.

    Attributes:
        tokens: Tokens of the longest request, prompt and answer.
    """

    clients: int
    prompts: Sequence[int]
    has_chats: bool
    tokens: int


def stages(plan: Plan) -> list[Stage]:
    """Return the stages of a turn, by number of clients: single prompts have one client."""
    found = []
    for clients in sorted({*plan.clients, *([1] if plan.prompts else [])}):
        prompts = plan.prompts if clients == 1 else ()
        tokens = max(plan.prompt_tokens + plan.max_tokens, *(length + 8 for length in prompts), 0)
        found.append(Stage(clients, prompts, clients in plan.clients, tokens))
    return found


def measure(url: str, model: str, plan: Plan, stage: Stage) -> Figures:
    """Run a stage's loads, after two requests that warm up the server and calibrate the prompts.

    Raises:
        SystemExit: if a request fails.
    """
    return asyncio.run(_measure(url, model, plan, stage))


async def _measure(url: str, model: str, plan: Plan, stage: Stage) -> Figures:
    async def answers(clients: int, requests: int, prompts: Prompts, max_tokens: int) -> list[Answer]:
        load = ClosedLoop(clients, requests)
        measured = await run(load, prompts, url, max_tokens=max_tokens, model=model)
        if measured.errors:
            raise SystemExit(f"{model}: {len(measured.errors)} requests failed: {measured.errors[0]}")
        return measured.answers

    prompts, figures = Prompts(plan.prompt_tokens), Figures()
    await answers(1, 2, prompts, 32)
    for length in stage.prompts:
        (alone,) = await answers(1, 1, prompts.resized(length), 2)
        figures[f"prompt of {length}: TTFT, ms"] = alone.ttft_s * 1e3
    if stage.has_chats:
        requests = max(stage.clients, MIN_REQUESTS)
        figures |= chat_figures(
            stage.clients, await answers(stage.clients, requests, prompts, plan.max_tokens)
        )
    return figures


def chat_figures(clients: int, answers: Sequence[Answer]) -> Figures:
    """Return the figures of a load of chats.

    "decode" is the total speed of all streams between prompts: clients over the median gap between tokens.
    Goodput counts the requests whose mean time per token after the first meets a target; the first token's
    time has separate rows.
    """
    seconds = max(each.end_s for each in answers) - min(each.due_s for each in answers)
    tokens = sum(each.num_tokens for each in answers)
    gaps = [gap for each in answers for gap in each.itl_s]
    ttft_s = [each.ttft_s for each in answers]
    name = "1 client: " if clients == 1 else f"{clients} clients: "
    figures = Figures()
    if gaps:  # none if answers come in one piece
        joined = (tokens - len(answers)) / len(gaps)  # tokens per chunk
        figures[f"decode x{clients}: tokens/s"] = clients * joined / percentile(gaps, 0.5)
        figures[name + "ITL p99, ms"] = percentile(gaps, 0.99) * 1e3
        figures[name + "ITL max, ms"] = max(gaps) * 1e3
    figures |= {
        name + "tokens/s": tokens / seconds,
        name + "TTFT p50, ms": percentile(ttft_s, 0.5) * 1e3,
        name + "TTFT p99, ms": percentile(ttft_s, 0.99) * 1e3,
    }
    for target_ms in TPOT_TARGETS_MS if clients > 1 else ():  # a single client runs at full speed
        good = sum(each.tpot_s * 1e3 <= target_ms for each in answers)
        figures[name + f"share within {target_ms} ms a token"] = good / len(answers)
        figures[name + f"requests/s within {target_ms} ms a token"] = good / seconds
    return figures
