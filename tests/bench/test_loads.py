"""The latency harness against a minimal server: what it sends and when, and how it reads answers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import beside_long, picture
from bench.client import Answer, Client
from bench.loads import ClosedLoop, OpenLoop, Prompts, Target, run
from bench.report import percentile, spread, table

TEMPLATE_TOKENS = 7  # that this server's chat template adds
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Write = Callable[[bytes], Awaitable[None]]


def event(payload: dict[str, Any] | str) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    data = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def token(text: str | None) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


def ending(prompt_tokens: int, tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
    return event({"choices": [], "usage": usage}) + event("[DONE]")


class Server:
    """Answers chats with `answer`; counts requests, connections and running requests."""

    def __init__(self, answer: Callable[[Write, dict[str, Any]], Awaitable[None]]) -> None:
        self._answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.num_running = 0
        self.most_running = 0
        self.url = ""
        self.tasks: list[asyncio.Task[Any] | None] = []

    @property
    def num_connections(self) -> int:
        return len(self.tasks)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.append(asyncio.current_task())

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.001)  # so that the client receives each piece separately

        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                self.num_running += 1
                self.most_running = max(self.most_running, self.num_running)
                await self._answer(write, self.bodies[-1])
                self.num_running -= 1
        writer.close()


@contextlib.asynccontextmanager
async def serving(answer: Callable[[Write, dict[str, Any]], Awaitable[None]]) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        await asyncio.gather(*(task for task in server.tasks if task is not None))


async def answer_normally(write: Write, body: dict[str, Any]) -> None:
    """Answer as llama-server does: a header that ends in 0, and the last chunk in two pieces."""
    words = sum(len(message["content"].split()) for message in body["messages"])
    await write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n")
    await write(token(None))
    for _ in range(body["max_tokens"]):
        await write(token("a"))
    await write(ending(words + TEMPLATE_TOKENS, body["max_tokens"]))
    await write(b"0\r\n")
    await write(b"\r\n")


async def test_an_answer_is_read_as_it_was_sent() -> None:
    async with serving(answer_normally) as server:
        client = Client(server.url)
        exchange = await client.chat({"messages": [{"role": "user", "content": "a b"}], "max_tokens": 3})
        client.close()
    answer = Answer.read(exchange)
    assert (answer.text, answer.num_tokens, answer.num_prompt_tokens) == ("aaa", 3, 2 + TEMPLATE_TOKENS)
    assert len(answer.token_s) == 3 and len(answer.itl_s) == 2
    assert exchange.due_s < answer.token_s[0] < answer.token_s[1] < answer.token_s[2] < answer.end_s
    assert server.bodies[0]["stream"] is True and server.bodies[0]["stream_options"] == {
        "include_usage": True
    }


async def test_tokens_that_arrive_together_have_one_time() -> None:
    async def joined(write: Write, body: dict[str, Any]) -> None:
        await write(CHUNKED + token("a") + token("b")[:9])
        await write(token("b")[9:] + token("c") + ending(1, 3) + b"0\r\n\r\n")

    async with serving(joined) as server:
        client = Client(server.url)
        answer = Answer.read(await client.chat({}))
        client.close()
    assert answer.text == "abc"
    assert answer.token_s[0] < answer.token_s[1] == answer.token_s[2]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\n", b"full"], "429.*full"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"], "not a stream"),
        ([CHUNKED, token("a"), b"0\r\n\r\n"], "no usage"),
        (
            [
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                event({"error": "gone"}),
                b"0\r\n\r\n",
            ],
            "gone",
        ),
    ],
)
async def test_what_is_not_a_complete_answer_is_an_error(pieces: Sequence[bytes], message: str) -> None:
    async def badly(write: Write, body: dict[str, Any]) -> None:
        for piece in pieces:
            await write(piece)

    async with serving(badly) as server:
        client = Client(server.url)
        exchange = await client.chat({})
        client.close()
    with pytest.raises(ValueError, match=message):
        Answer.read(exchange)


async def test_a_connection_that_the_server_drops_is_an_error() -> None:
    async def cut(write: Write, body: dict[str, Any]) -> None:
        await write(CHUNKED + token("a"))
        raise ConnectionError

    async with serving(cut) as server:
        client = Client(server.url)
        exchange = await client.chat({})
    with pytest.raises(ValueError, match="closed"):
        Answer.read(exchange)


async def test_short_prompts_are_timed_beside_long_ones() -> None:
    async def slow_if_long(write: Write, body: dict[str, Any]) -> None:
        if len(body["messages"][-1]["content"].split()) > 100:
            await asyncio.sleep(0.2)
        await answer_normally(write, body)

    options = argparse.Namespace(rate=1000.0, requests=5, long_requests=2, model="tgi")
    async with serving(slow_if_long) as server:
        seconds = await beside_long.measure(server.url, options, Prompts(40), Prompts(200))
    assert seconds["p50"] <= seconds["max"] < 0.2 <= seconds["long p50"]
    assert server.most_running > 1


async def test_a_closed_loop_keeps_as_many_requests_running_as_it_has_clients() -> None:
    async with serving(answer_normally) as server:
        measured = await run(ClosedLoop(clients=3, requests=8), Prompts(30), server.url, max_tokens=2)
    assert not measured.errors and len(measured.answers) == 8
    assert server.most_running == 3
    assert server.num_connections == 3, "connections must be kept alive"


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    release = asyncio.Event()

    async def answer_late(write: Write, body: dict[str, Any]) -> None:
        if len(server.bodies) >= 2 + 5:  # two requests measured the length of prompts
            release.set()
        if len(server.bodies) > 2:
            await release.wait()
        await answer_normally(write, body)

    async with serving(answer_late) as server:
        measured = await run(OpenLoop(rate=500, requests=5), Prompts(30), server.url, max_tokens=2)
    assert not measured.errors and len(measured.answers) == 5
    assert server.most_running == 5


async def test_prompts_have_the_length_that_the_server_counts_and_are_all_different() -> None:
    async with serving(answer_normally) as server:
        prompts = Prompts(40, shared_tokens=12)
        measured = await run(ClosedLoop(2, 6), prompts, server.url, max_tokens=2)
    assert {answer.num_prompt_tokens for answer in measured.answers} == {40}
    texts = [" ".join(message["content"] for message in body["messages"]).split() for body in server.bodies]
    assert len({tuple(text[:12]) for text in texts}) == 1
    assert len({tuple(text[12:20]) for text in texts}) == len(texts)


async def test_a_summary_counts_what_meets_the_target_and_what_failed() -> None:
    async def every_other(write: Write, body: dict[str, Any]) -> None:
        if len(server.bodies) > 2 and len(server.bodies) % 2:
            await write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        else:
            await answer_normally(write, body)

    async with serving(every_other) as server:
        measured = await run(ClosedLoop(1, 6), Prompts(30), server.url, max_tokens=4)
    easy, hard = measured.summary(Target(60_000, 60_000)), measured.summary(Target(0, 0))
    assert (easy["requests"], easy["failed"]) == (3, 3)
    assert easy["good_share"] == 1 and hard["good_share"] == 0
    assert easy["tokens_per_s"] == pytest.approx(3 * 4 / easy["seconds"], rel=0.2)
    assert "503" in easy["first_error"]


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert spread([3.0], 1e3) == {"p50": 3000, "p90": 3000, "p99": 3000}
    assert math.isnan(percentile([], 0.5))


def test_a_table_shows_what_is_missing_as_a_dash() -> None:
    assert table(("a", "b"), [(1.5, None)]).splitlines()[-1].split() == ["|", "1.5", "|", "–", "|"]  # noqa: RUF001


def test_the_picture_is_svg_with_a_curve_for_each_series(tmp_path: Path) -> None:
    path = tmp_path / "curves.svg"
    panels = {"first": {"1 client": [1.0, 2.0, 30.0], "<2>": [5.0]}, "second": {"1 client": [0.5] * 1000}}
    picture.draw(panels, path, title="a & b", unit="ms")
    root = ElementTree.fromstring(path.read_text())
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 3
