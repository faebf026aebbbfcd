"""Loads: the requests, their timing, and the evaluation of the answers.

load = ClosedLoop(clients=16, requests=64)
measured = await run(load, Prompts(tokens=100), url, max_tokens=64)
measured.summary(target)
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from bench.client import Answer, Client, Exchange
from bench.report import spread

# Words that are one token, including a leading space, in the usual English vocabularies.
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book",
    "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend",
    "father", "power", "hour", "game", "line", "end", "member", "law", "car", "city", "community", "name",
    "president", "team", "minute", "idea", "body", "information", "back", "parent", "face", "others",
    "level", "office", "door", "health", "person", "art", "war", "history", "party", "result", "change",
    "morning", "reason", "research", "girl", "guy", "moment", "air",
)  # fmt: skip


class Prompts:
    """Makes chat messages of a given number of tokens, each different, so that no prefix is cached.

    `tokens` is the server's count, including the chat template's own tokens: `calibrate` asks it once. The
    first `shared_tokens` of the words are the same in every prompt. Prompts of two objects differ, in any
    process; only their lengths are repeatable, which is enough because their contents do not matter.
    """

    def __init__(self, tokens: int, *, shared_tokens: int = 0) -> None:
        self.tokens = tokens
        self._random = random.SystemRandom()
        self._shared = self.words(shared_tokens)
        self._num_words = tokens
        self._is_calibrated = False

    def resized(self, tokens: int) -> Prompts:
        """Return one for another length without asking again: the template's share is constant."""
        other = Prompts(tokens, shared_tokens=len(self._shared))
        other._num_words += self._num_words - self.tokens
        other._is_calibrated = self._is_calibrated
        return other

    def messages(self) -> list[dict[str, str]]:
        """Return the next prompt. It includes a system turn, because templates add a fixed one otherwise."""
        own = self.words(max(self._num_words - len(self._shared), 1))
        words = self._shared + own
        return [
            {"role": "system", "content": " ".join(words[:4])},
            {"role": "user", "content": " ".join(words[4:])},
        ]

    async def calibrate(self, client: Client, body: dict[str, Any]) -> None:
        """Ask the server, once, how many tokens a prompt has, and adjust the number of words.

        Raises:
            ValueError: if the server does not answer, or the template alone is longer than the prompt.
        """
        if self._is_calibrated:
            return
        for _ in range(2):
            answer = Answer.read(await client.chat({**body, "messages": self.messages(), "max_tokens": 4}))
            self._num_words += self.tokens - answer.num_prompt_tokens
        if self._num_words < len(self._shared) + 5:
            raise ValueError(f"{self.tokens} tokens are too few for this template and the shared prefix")
        self._is_calibrated = True

    def words(self, count: int) -> list[str]:
        """Return this many words, about one token each."""
        return self._random.choices(WORDS, k=count)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`clients` clients, each sending its next request when the last is answered; all start at once."""

    clients: int
    requests: int

    @property
    def name(self) -> str:
        return "1 client" if self.clients == 1 else f"{self.clients} clients"

    async def drive(self, send: _Sender) -> None:
        """Send all requests."""
        left = iter(range(self.requests))

        async def client() -> None:
            for _ in left:
                await send(time.perf_counter())

        await asyncio.gather(*(client() for _ in range(min(self.clients, self.requests))))


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests that arrive at random (Poisson), `rate` per second, even if earlier ones are unanswered."""

    rate: float
    requests: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.rate:g} requests/s"

    async def drive(self, send: _Sender) -> None:
        """Send all requests; latency counts from when a request was due, so a late client hides nothing."""
        gaps = random.Random(self.seed)
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(self.requests):
                due_s += gaps.expovariate(self.rate)
                await asyncio.sleep(due_s - time.perf_counter())
                group.create_task(send(due_s))


@dataclass(frozen=True, slots=True)
class Target:
    """Latency targets that users notice: a request is good if it meets both."""

    ttft_ms: float = 1000.0
    tpot_ms: float = 50.0

    def is_met(self, answer: Answer) -> bool:
        return answer.ttft_s * 1e3 <= self.ttft_ms and answer.tpot_s * 1e3 <= self.tpot_ms


@dataclass(slots=True)
class Measured:
    """The answers of one run of a load."""

    load: str
    answers: list[Answer]
    errors: list[str] = field(default_factory=list)

    def summary(self, target: Target) -> dict[str, Any]:
        """Return the figures of the run: times in ms, rates per second."""
        answers = self.answers
        result: dict[str, Any] = {"load": self.load, "requests": len(answers), "failed": len(self.errors)}
        if self.errors:
            result["first_error"] = self.errors[0]
        if not answers:
            return result
        seconds = max(a.end_s for a in answers) - min(a.due_s for a in answers)
        tokens = sum(a.num_tokens for a in answers)
        good = sum(target.is_met(a) for a in answers)
        return result | {
            "seconds": round(seconds, 2),
            "prompt_tokens": round(sum(a.num_prompt_tokens for a in answers) / len(answers), 1),
            "output_tokens": round(tokens / len(answers), 1),
            "tokens_per_s": round(tokens / seconds, 1),
            "requests_per_s": round(len(answers) / seconds, 2),
            "ttft_ms": spread([a.ttft_s for a in answers], 1e3, 1),
            "itl_ms": spread([gap for a in answers for gap in a.itl_s], 1e3, 2),
            "tpot_ms": spread([a.tpot_s for a in answers], 1e3, 2),
            "latency_ms": spread([a.end_s - a.due_s for a in answers], 1e3, 1),
            "request_tokens_per_s": spread([a.num_tokens / (a.end_s - a.due_s) for a in answers], 1, 1),
            "goodput_per_s": round(good / seconds, 2),
            "good_share": round(good / len(answers), 3),
        }


class _Sender:
    """Sends the next request of a run and keeps the exchange."""

    def __init__(self, client: Client, prompts: Prompts, body: dict[str, Any]) -> None:
        self._client, self._prompts, self._body = client, prompts, body
        self.exchanges: list[Exchange] = []

    async def __call__(self, due_s: float) -> None:
        body = {**self._body, "messages": self._prompts.messages()}
        self.exchanges.append(await self._client.chat(body, due_s=due_s))


async def run(
    load: ClosedLoop | OpenLoop, prompts: Prompts, url: str, *, max_tokens: int, model: str = "tgi"
) -> Measured:
    """Calibrate the prompts, run the load (greedy, past EOS), and read the answers when it is over."""
    client = Client(url)
    body = {"model": model, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    try:
        await prompts.calibrate(client, body)
        send = _Sender(client, prompts, body)
        await load.drive(send)
    finally:
        client.close()
    measured = Measured(load.name, [])
    for exchange in send.exchanges:
        try:
            measured.answers.append(Answer.read(exchange))
        except ValueError as error:
            measured.errors.append(str(error))
    return measured
