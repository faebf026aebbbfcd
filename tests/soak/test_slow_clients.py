"""Clients that read or write slowly must not affect other clients."""

from __future__ import annotations

import asyncio

from tests.soak.client import TIMEOUT_S, Streaming, ask, inside, until_idle
from tests.soak.conftest import Serve
from tests.support.scale import Scale


async def test_bodies_and_heads_that_trickle_hold_nothing_but_their_connection(
    serve: Serve, scale: Scale
) -> None:
    """Check that hundreds of slow senders go unnoticed; their limits are 60 s (test_asgi.py) and 75 s."""
    server = serve("--max-concurrent-requests", "4", FAKE_STEP_S="0.001")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    slow = []
    for index in range(scale(20, 400)):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head if index % 2 else head + b'content-length: 1000\r\n\r\n{"prompt": ')
        slow.append(writer)
    answers = await asyncio.gather(*(ask(server.port, {"prompt": "x", "max_tokens": 5}) for _ in range(4)))
    assert all(answer.is_done for answer in answers)
    assert (await inside(server))["permits"]["taken"] == 0
    for writer in slow:
        writer.transport.abort()
    await until_idle(server)


async def test_a_reader_that_pauses_gets_every_token(serve: Serve, scale: Scale) -> None:
    num_tokens = scale(300, 3500)
    server = serve("--max-total-tokens", "4000", FAKE_STEP_S="0.0005", FAKE_NUM_BLOCKS="1024")
    client = await Streaming.start(server.port, {"prompt": "x", "max_tokens": num_tokens})
    await client.head()
    async with asyncio.timeout(TIMEOUT_S):
        while (await inside(server))["requests"]:
            await asyncio.sleep(0.05)
    await client.finish()
    assert len(client.texts[0]) == num_tokens
    assert client.is_done
