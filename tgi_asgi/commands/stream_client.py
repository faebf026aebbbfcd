"""A client that times a /v1/completions stream of any server with OpenAI's API.

    client = Client(Address.parse("http://127.0.0.1:3000"), api_key=None)
    answer = (await client.stream("/v1/completions", {...})).read()

While a stream runs, the client only stores its bytes with their times, because the server may share the
cores. `Recording.read` parses them afterwards.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

_READ_BYTES = 64 << 10
_PORTS = {"http": 80, "https": 443}


class RequestFailed(Exception):
    """A request was refused, or its stream ended early; the message says which."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server's address: `http://host:port`, `https://...`, optionally with a path, or `unix:PATH`."""

    host: str
    port: int = 0
    prefix: str = ""
    is_tls: bool = False
    socket_path: str | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Parse a URL.

        Raises:
            ValueError: if it has none of these forms.
        """
        if url.startswith("unix:"):
            return cls("localhost", socket_path=url.removeprefix("unix:"))
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError(f"a URL must be http://HOST:PORT, https://HOST:PORT or unix:PATH, got {url!r}")
        port = parts.port or _PORTS[parts.scheme]
        return cls(parts.hostname, port, parts.path.rstrip("/"), parts.scheme == "https")

    @property
    def authority(self) -> str:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else host

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection.

        Raises:
            OSError: if no server listens there.
        """
        if self.socket_path is not None:
            return await asyncio.open_unix_connection(self.socket_path)
        tls = ssl.create_default_context() if self.is_tls else None
        return await asyncio.open_connection(self.host, self.port, ssl=tls)


@dataclass(frozen=True, slots=True)
class Answer:
    """Times and token counts of one stream.

    Attributes:
        sent_s, text_s, end_s: When the request was sent, each piece of text arrived, and the stream ended.
        num_prompt_tokens, num_tokens: Token counts as reported by the server.
    """

    sent_s: float
    text_s: tuple[float, ...]
    end_s: float
    num_prompt_tokens: int
    num_tokens: int

    @property
    def first_s(self) -> float:
        """Seconds to the first text."""
        return self.text_s[0] - self.sent_s

    @property
    def per_token_s(self) -> float | None:
        """Mean seconds per token after the first; None if there is only one."""
        return (self.text_s[-1] - self.text_s[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def pauses_s(self) -> list[float]:
        """Seconds between consecutive pieces of text: how long a reader waits."""
        return [later - sooner for sooner, later in zip(self.text_s, self.text_s[1:], strict=False)]


@dataclass(slots=True)
class Recording:
    """The bytes of one stream with their arrival times."""

    sent_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    end_s: float = 0.0

    def read(self) -> Answer:
        """Parse the recorded bytes.

        Raises:
            RequestFailed: if the stream contains an error, or no token count or text.
        """
        text_s: list[float] = []
        usage: dict[str, int] | None = None
        for at_s, event in self._events():
            message = json.loads(event)
            if "error" in message:
                raise RequestFailed(describe_error(message))
            usage = message.get("usage") or usage
            if any(choice.get("text") for choice in message.get("choices") or ()):
                text_s.append(at_s)
        if not usage or not text_s or not {"prompt_tokens", "completion_tokens"} <= usage.keys():
            raise RequestFailed("the stream has no usage or no text")
        counts = usage["prompt_tokens"], usage["completion_tokens"]
        return Answer(self.sent_s, tuple(text_s), self.end_s, *counts)

    def _events(self) -> Iterator[tuple[float, bytes]]:
        """Yield the data of each server-sent event, with the arrival time of the piece that completes it."""
        rest = b""
        for at_s, data in self.pieces:
            *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                for line in event.split(b"\n"):
                    value = line.removeprefix(b"data:").strip()
                    if line.startswith(b"data:") and value != b"[DONE]":
                        yield at_s, value


def describe_error(message: object) -> str:
    """Return the message of an error body: OpenAI's envelope, TGI's, or any other."""
    error = message.get("error", message) if isinstance(message, dict) else message
    return str(error.get("message", error) if isinstance(error, dict) else error)


class Client:
    """One connection, opened on demand and kept alive between consecutive requests."""

    def __init__(self, address: Address, api_key: str | None) -> None:
        self._address = address
        self._headers = [("Host", address.authority), ("Content-Type", "application/json")]
        if api_key:
            self._headers.append(("Authorization", f"Bearer {api_key}"))
        self._http = h11.Connection(h11.CLIENT)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> tuple[int, Any]:
        """Return an answer's status and its JSON, or None if it is not JSON.

        Raises:
            RequestFailed: if there is no complete answer.
        """
        status, body = 0, b""
        async with aclosing(self._exchange("GET", path, b"")) as events:
            async for event in events:
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += event.data
        return status, _parse(body)

    async def stream(self, path: str, body: dict[str, object]) -> Recording:
        """Send a request; return its whole stream.

        Raises:
            RequestFailed: if it was refused or the connection was lost.
        """
        recording = Recording(time.perf_counter())
        status = 0
        async with aclosing(self._exchange("POST", path, json.dumps(body).encode())) as events:
            async for event in events:
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    recording.pieces.append((time.perf_counter(), bytes(event.data)))
        recording.end_s = time.perf_counter()
        if status != 200:
            found = _parse(b"".join(data for _, data in recording.pieces))
            raise RequestFailed(f"{status}: {describe_error(found)}")
        return recording

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
            self._http = h11.Connection(h11.CLIENT)

    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncGenerator[h11.Event]:
        """Send a request and yield its answer's events; close the connection if the answer is incomplete."""
        is_whole = False
        try:
            if self._streams is None:
                self._streams = await self._address.connect()
            reader, writer = self._streams
            headers = [*self._headers, ("Content-Length", str(len(body)))]
            request = h11.Request(method=method, target=self._address.prefix + path, headers=headers)
            for sent in (request, h11.Data(data=body), h11.EndOfMessage()):
                writer.write(self._http.send(sent) or b"")
            while not is_whole:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    self._http.receive_data(await reader.read(_READ_BYTES))
                    continue
                assert isinstance(event, h11.Event)
                is_whole = isinstance(event, h11.EndOfMessage)
                yield event
            if self._http.our_state is h11.MUST_CLOSE:
                await self.close()
            else:
                self._http.start_next_cycle()
        except (OSError, h11.ProtocolError) as error:
            raise RequestFailed(str(error) or type(error).__name__) from error
        finally:
            if not is_whole:
                await self.close()


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
