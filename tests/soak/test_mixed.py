"""Everything at once, for long: cancels, preemption, many choices, shared prefixes, faults."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.soak.client import Streaming, ask, inside, metric, until_idle
from tests.soak.conftest import Serve
from tests.support.memory import resident_bytes
from tests.support.scale import Scale
from tests.support.server_process import ServerProcess

NUM_WORKERS = 12


def _prompts(rng: random.Random, count: int) -> list[tuple[str, int]]:
    """Make prompts, of which several share a prefix, with the number of tokens to request."""
    prefixes = ["", "You are a careful assistant. " * 4, "Once upon a time, " * 10]
    made = [(rng.choice(prefixes) + f"Tell me about {rng.randrange(10**6)}", rng.randrange(1, 60))
            for _ in range(count)]  # fmt: skip
    return [*made, (prefixes[2] * 2 + "x", 100)]


class Mixed:
    """Workers that repeat the same prompts and compare each answer with the one given while idle."""

    def __init__(self, server: ServerProcess, prompts: list[tuple[str, int]], seed: int) -> None:
        self.server = server
        self.prompts = prompts
        self.rng = random.Random(seed)
        self.alone: dict[str, str] = {}
        self.num_compared = 0

    async def ask_alone(self) -> None:
        """Send each prompt while nothing else runs."""
        for prompt, num_tokens in self.prompts:
            answer = await ask(self.server.port, {"prompt": prompt, "max_tokens": num_tokens})
            self.alone[prompt] = answer.texts[0]

    async def work(self, until_s: float, most: int) -> None:
        """Send requests until a time, or at most `most` requests."""
        while most and time.monotonic() < until_s:
            most -= 1
            prompt, num_tokens = self.rng.choice(self.prompts)
            num_choices = self.rng.choice((1, 1, 1, 2, 3))
            body = {"prompt": prompt, "max_tokens": num_tokens, "n": num_choices}
            client = await Streaming.start(self.server.port, body)
            if self.rng.random() < 0.2:
                num_events = self.rng.randrange(6)
                if await client.head() == 200:
                    async for _ in client.events():
                        num_events -= 1
                        if num_events <= 0:
                            break
                client.leave()
                continue
            await client.finish()
            assert client.status == 200
            assert client.texts == dict.fromkeys(range(num_choices), self.alone[prompt])
            assert client.is_done
            self.num_compared += 1


@pytest.mark.parametrize("model", ["fake", pytest.param("demo", marks=pytest.mark.demo)])
async def test_everything_at_once_gives_what_each_request_gives_alone(
    serve: Serve, model: str, scale: Scale
) -> None:
    seconds, most = scale((60.0, 4 if model == "fake" else 3), (600.0, -1))
    limits = ("--max-batch-size", "8", "--max-concurrent-requests", "64")
    if model == "fake":
        server = serve(*limits, FAKE_STEP_S="0.001", FAKE_NUM_BLOCKS="40")
    else:
        server = serve(*limits, "--max-batch-total-tokens", scale("304", "640"), is_real=True)
    mixed = Mixed(server, _prompts(random.Random(7), scale(4, 16)), seed=8)
    await mixed.ask_alone()
    until_s = time.monotonic() + seconds
    workers = asyncio.gather(*(mixed.work(until_s, most) for _ in range(NUM_WORKERS)))
    memory: list[int] = []
    while not workers.done():
        await asyncio.wait([workers], timeout=max(seconds / 60, 1))
        memory.append(resident_bytes(server.process.pid))
    await workers
    counters = (await until_idle(server))["counters"]
    assert mixed.num_compared > 0
    assert counters["failed"] == 0
    assert counters["cancelled"] > 0
    assert counters["preemptions"] > 0
    assert await metric(server, "tgi_prefix_cache_hit_tokens_total") > 0
    # What is warm after half of the time must stay constant. Until a first full collection of garbage, which
    # comes after thousands of requests, the objects of connections that have ended take up to 10 MB.
    if most < 0:
        early, late = memory[len(memory) // 2], memory[-1]
        assert abs(late - early) <= 0.02 * early, f"{early} bytes became {late}"


async def test_whatever_fails_every_request_ends_once_and_health_tells_the_truth(
    serve: Serve, scale: Scale
) -> None:
    server = serve("--max-batch-size", "8", FAKE_MODEL="faulty:3", FAKE_STEP_S="0.001", FAKE_NUM_BLOCKS="64")
    rng = random.Random(4)
    num_failed = num_whole = 0

    async def work() -> None:
        nonlocal num_failed, num_whole
        for _ in range(scale(8, 300)):
            num_tokens = rng.randrange(1, 60)
            body = {"prompt": f"{rng.random()}" * rng.randrange(1, 9), "max_tokens": num_tokens, "n": 2}
            client = await (await Streaming.start(server.port, body)).finish()
            if client.status == 200 and client.error is None:
                assert client.is_done
                assert client.finishes == {0: "length", 1: "length"}
                assert client.texts[0] == client.texts[1]
                assert len(client.texts[0]) == num_tokens
                num_whole += 1
            else:
                assert client.status in (200, 500)
                num_failed += 1

    await asyncio.gather(*(work() for _ in range(8)))
    shown = await until_idle(server)
    assert shown["counters"]["finished"] == num_whole
    assert shown["counters"]["failed"] == num_failed
    assert shown["counters"]["failed_steps"] > 0
    assert num_whole > num_failed
    server.wait_until_healthy()


async def test_a_step_that_hangs_ends_the_streams_the_health_and_the_process(
    serve: Serve, scale: Scale
) -> None:
    server = serve("--step-timeout-s", "0.5", FAKE_MODEL="hangs", FAKE_STEP_S="0.001")
    clients = [
        await Streaming.start(server.port, {"prompt": f"{i}", "max_tokens": 500})
        for i in range(scale(4, 100))
    ]
    watching = asyncio.create_task(_wait_for_503(server))
    for client in await asyncio.gather(*(client.finish() for client in clients)):
        assert client.status in (200, 500)
        assert client.error is not None or client.status == 500
    await watching
    assert await asyncio.to_thread(server.wait) != 0
    assert "has not ended" in server.output()


async def _wait_for_503(server: ServerProcess) -> None:
    await asyncio.to_thread(server.wait_until, 503)


async def test_turns_of_a_conversation_read_nothing_twice(serve: Serve, scale: Scale) -> None:
    """Check that each turn computes only its new text and less than a block of earlier tokens."""
    server = serve("--max-batch-size", "8", FAKE_STEP_S="0.001", FAKE_NUM_BLOCKS="1024")
    conversation = "You are a helpful assistant. " * 10
    computed = await metric(server, "tgi_prompt_tokens_total") - await _cached(server)
    for turn in range(scale(5, 60)):
        new = f" Question {turn}: what of it? "
        known = len(conversation)
        answer = await ask(server.port, {"prompt": conversation + new, "max_tokens": 30})
        now = await metric(server, "tgi_prompt_tokens_total") - await _cached(server)
        if turn:  # the last sampled token was never fed back, so it is new as well
            assert now - computed <= len(new) + 1 + 16
        else:
            assert now - computed == known + len(new)
        computed = now
        conversation += new + answer.texts[0]
    assert (await inside(server))["requests"] == []


async def _cached(server: ServerProcess) -> float:
    return await metric(server, "tgi_prefix_cache_hit_tokens_total")
