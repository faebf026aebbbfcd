"""A client of OpenAI's streaming chat that parses nothing while it runs, because the server shares its cores.

It stores the received bytes with their arrival times; `Answer.read` parses them when the run is over.
HTTP/1.1 over plain sockets with kept-alive connections; works with any server that implements the API.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_LAST_CHUNK = b"\n0\r\n\r\n"  # including the end of the line before: a header may end in 0 as well


@dataclass(slots=True)
class Exchange:
    """One request and the raw bytes of its answer, each piece with its arrival time."""

    due_s: float  # when it was meant to be sent; open-loop latency is measured from here
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The parsed contents of an exchange.

    Attributes:
        due_s, end_s: When it was to be sent, and when its last byte arrived.
        token_s: When each chunk with text arrived; a chunk is one token, or a few if a server joins them.
        num_prompt_tokens, num_tokens: As the server counted them.
        num_cached_tokens: Cached tokens of the prompt, if the server reports them.
    """

    due_s: float
    end_s: float
    token_s: tuple[float, ...]
    num_prompt_tokens: int
    num_tokens: int
    text: str
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to the first text."""
        return self.token_s[0] - self.due_s

    @property
    def itl_s(self) -> list[float]:
        """Times between chunks."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.token_s[-1] - self.token_s[0]) / max(self.num_tokens - 1, 1)

    @classmethod
    def read(cls, exchange: Exchange) -> Answer:
        """Parse an exchange.

        Raises:
            ValueError: if the request failed, or the answer is not a complete stream.
        """
        if exchange.error is not None:
            raise ValueError(exchange.error)
        head, _, body = b"".join(data for _, data in exchange.pieces).partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise ValueError(f"{head.splitlines()[0].decode()}: {body[:300].decode(errors='replace')}")
        if b"transfer-encoding: chunked" not in head.lower():
            raise ValueError("the answer is not a stream")
        times = _Times(exchange.pieces, skip=len(head) + 4)
        token_s, text, usage = [], [], None
        for stop, event in _events(body):
            if event == b"[DONE]":
                continue
            message = json.loads(event)
            if "error" in message:
                raise ValueError(str(message["error"]))
            usage = message.get("usage") or usage
            delta = (message.get("choices") or [{}])[0].get("delta", {}).get("content")
            if delta:
                token_s.append(times.of(stop))
                text.append(delta)
        if usage is None or not token_s:
            raise ValueError("the stream has no usage or no text")
        counts = (usage["prompt_tokens"], usage["completion_tokens"])
        num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return cls(exchange.due_s, exchange.pieces[-1][0], tuple(token_s), *counts, "".join(text), num_cached)


class _Times:
    """Returns when a byte of the body arrived; must be asked in ascending order."""

    def __init__(self, pieces: list[tuple[float, bytes]], skip: int) -> None:
        self._pieces = iter(pieces)
        self._stop = -skip
        self._time_s = 0.0

    def of(self, position: int) -> float:
        while self._stop < position:
            self._time_s, data = next(self._pieces)
            self._stop += len(data)
        return self._time_s


def _events(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the data of each server-sent event, and the end of its last chunk within the body."""
    position, rest = 0, b""
    while position < len(body):
        line = body.index(b"\r\n", position)
        start = line + 2
        stop = start + int(body[position:line].split(b";")[0], 16)
        *events, rest = (rest + body[start:stop]).replace(b"\r\n", b"\n").split(b"\n\n")
        position = stop + 2
        yield from ((stop, event[5:].strip()) for event in events if event.startswith(b"data:"))


class _Connection(asyncio.Protocol):
    """One socket: sends a request and records when the bytes of the answer arrive."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._num_left: int | None = None  # bytes of a body with a stated length
        self._tail = b""
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            return
        self._exchange.pieces.append((time.perf_counter(), data))
        if len(self._exchange.pieces) == 1:
            self._num_left = _body_length(data)
        elif self._num_left is not None:
            self._num_left -= len(data)
        # The marker may arrive in two pieces.
        self._tail = (self._tail + data[-len(_LAST_CHUNK) :])[-len(_LAST_CHUNK) :]
        if self._tail == _LAST_CHUNK or (self._num_left is not None and self._num_left <= 0):
            self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._finish("the connection was closed")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def send(self, request: bytes, exchange: Exchange, timeout_s: float) -> None:
        assert self._transport is not None
        self._exchange, exchange.error = exchange, None
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._done, timeout_s)
        except TimeoutError:
            exchange.error = f"no answer within {timeout_s} s"
            self.close()
        self._exchange = None

    def _finish(self, error: str | None) -> None:
        if self._exchange is not None and self._done is not None and not self._done.done():
            self._exchange.error = error
            self._done.set_result(None)


def _body_length(data: bytes) -> int | None:
    """Return how many bytes of a body with Content-Length are still to come after the first piece."""
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1]) - len(body)
    return None


class Client:
    """Sends chat requests to one server.

    client = Client("http://127.0.0.1:3000")
    exchange = await client.chat({"messages": [...], "max_tokens": 64})
    answer = Answer.read(exchange)
    """

    def __init__(self, url: str, *, timeout_s: float = 300.0) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = parts.path.rstrip("/") + "/v1/chat/completions"
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def chat(self, body: dict[str, Any], *, due_s: float | None = None) -> Exchange:
        """Send one streaming request and return when its answer has ended, successfully or not."""
        payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        exchange = Exchange(time.perf_counter() if due_s is None else due_s)
        is_reused = True
        while is_reused and not exchange.pieces:  # the server may have closed a connection as it was taken
            is_reused = any(connection.is_open for connection in self._idle)
            try:
                connection = await self._connect()
            except OSError as error:
                exchange.error = str(error)
                break
            await connection.send(head.encode() + payload, exchange, self._timeout_s)
            if connection.is_open:
                self._idle.append(connection)
        return exchange

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port)
        return connection
