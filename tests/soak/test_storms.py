"""More clients than the server can admit, and clients that disconnect: nothing is lost or left over."""

from __future__ import annotations

import asyncio
import os
import random
import time

from tests.soak.client import Streaming, ask, inside, percentile, until_idle
from tests.soak.conftest import Report, Serve
from tests.support.fake_runner import expected_tokens
from tests.support.scale import Scale
from tests.support.server_process import ServerProcess


def expected(prompt: str, num_tokens: int) -> str:
    """Return the fake model's answer, which no other request affects."""
    return bytes(expected_tokens(list(prompt.encode()), num_tokens)).decode()


def num_files(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(serve: Serve, scale: Scale) -> None:
    num_clients, seconds = scale((50, 0.5), (500, 60.0))
    server = serve("--max-concurrent-requests", "1000", FAKE_STEP_S="0.002")
    await ask(server.port, {"prompt": "warm up", "max_tokens": 2})
    before, files_before = await until_idle(server), num_files(server)
    rng = random.Random(5)

    async def leave_somewhere(delay_s: float, num_events: int, num_choices: int) -> None:
        await asyncio.sleep(delay_s)
        body = {"prompt": f"{rng.random()}" * 3, "max_tokens": 1000, "n": num_choices}
        client = await Streaming.start(server.port, body)
        if num_events:
            await client.head()
            async for _ in client.events():
                num_events -= 1
                if not num_events:
                    break
        client.leave()

    await asyncio.gather(
        *(
            leave_somewhere(rng.uniform(0, seconds), rng.choice((0, 1, 2, 9, 60)), rng.choice((1, 1, 3)))
            for _ in range(num_clients)
        )
    )
    after = await until_idle(server)
    assert after["counters"]["failed"] == 0
    assert after["counters"]["cancelled"] > 0
    async with asyncio.timeout(30):  # connections close after their requests
        while num_files(server) > files_before or after["tasks"] > before["tasks"]:
            await asyncio.sleep(0.05)
            after = await inside(server)
    answer = await ask(server.port, {"prompt": "and then?", "max_tokens": 20})
    assert answer.texts[0] == expected("and then?", 20)


async def test_under_overload_each_gets_all_its_tokens_or_a_429_at_once(
    serve: Serve, scale: Scale, report: Report
) -> None:
    num_clients, num_running, num_tokens = scale((100, 8, 20), (1000, 64, 100))
    limits = ("--max-batch-size", str(num_running), "--max-concurrent-requests", str(2 * num_running))
    server = serve(*limits, FAKE_STEP_S="0.02", FAKE_NUM_BLOCKS="4096")
    prompts = [f"client {index:4}" for index in range(num_clients)]
    refused_s: list[float] = []

    async def run(prompt: str) -> Streaming:
        client = await Streaming.start(server.port, {"prompt": prompt, "max_tokens": num_tokens})
        if await client.head() == 429:
            refused_s.append(time.monotonic() - client.began_s)
        return await client.finish()

    clients = await asyncio.gather(*map(run, prompts))
    admitted = [
        (prompt, client) for prompt, client in zip(prompts, clients, strict=True) if client.status == 200
    ]
    for prompt, client in admitted:
        assert client.texts == {0: expected(prompt, num_tokens)}
        assert client.is_done
        assert client.error is None
    refused = [client for client in clients if client.status == 429]
    assert all(1 <= int(client.headers["retry-after"]) <= 120 for client in refused)
    assert len(admitted) + len(refused) == num_clients
    assert len(admitted) >= 2 * num_running
    assert len(refused) > 0
    assert (await until_idle(server))["counters"]["finished"] == len(admitted)
    firsts = [client.first_s for _, client in admitted if client.first_s is not None]
    report(
        f"{num_clients} clients, {len(admitted)} admitted, {len(refused)} refused; "
        f"429 p99 {percentile(refused_s, 0.99):.3f} s, first token p99 {percentile(firsts, 0.99):.3f} s"
    )
