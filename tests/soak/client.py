"""Streaming clients over raw sockets, cheap enough for a thousand of them in one process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tests.support.server_process import ServerProcess

TIMEOUT_S = 300.0  # limit for everything; the machine may be busy


class Streaming:
    """One request, and the part of its answer that has been read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.texts: dict[int, str] = {}  # by choice
        self.finishes: dict[int, str] = {}
        self.error: dict[str, Any] | None = None
        self.is_done = False  # whether [DONE] was received
        self.began_s = time.monotonic()
        self.first_s: float | None = None  # from the start to the first event

    @classmethod
    async def start(cls, port: int, body: dict[str, Any], path: str = "/v1/completions") -> Streaming:
        """Connect and send a request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = json.dumps({"stream": True, "temperature": 0, **body}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        return cls(reader, writer)

    async def head(self) -> int:
        """Read status and headers."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
        }
        return self.status

    async def events(self) -> AsyncIterator[str]:
        """Read and record the stream's events, and yield their data."""
        async for line in self._reader:
            if not line.startswith(b"data:"):
                continue  # empty lines and chunk framing
            self.first_s = self.first_s or time.monotonic() - self.began_s
            data = line[5:].strip().decode()
            self._take(data)
            yield data

    async def finish(self) -> Streaming:
        """Read everything within `TIMEOUT_S`, then close the connection."""
        async with asyncio.timeout(TIMEOUT_S):
            if not self.status:
                await self.head()
            async for _ in self.events():
                pass
        self.leave()
        return self

    def leave(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        self.error = self.error or event.get("error")
        for choice in event.get("choices", ()):
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["finish_reason"] is not None:
                assert index not in self.finishes, "a choice has ended twice"
                self.finishes[index] = choice["finish_reason"]


async def ask(port: int, body: dict[str, Any]) -> Streaming:
    """Send a request and read its whole answer."""
    return await (await Streaming.start(port, body)).finish()


async def inside(server: ServerProcess) -> dict[str, Any]:
    """Return the contents of `/debug/engine`."""
    async with httpx.AsyncClient(verify=False) as client:
        shown: dict[str, Any] = (await client.get(f"{server.url}/debug/engine", timeout=TIMEOUT_S)).json()
    return shown


async def metric(server: ServerProcess, name: str) -> float:
    """Return one sample of `/metrics`, by name and labels as `/metrics` writes them."""
    async with httpx.AsyncClient(verify=False) as client:
        text = (await client.get(f"{server.url}/metrics", timeout=TIMEOUT_S)).text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))


async def until_idle(server: ServerProcess) -> dict[str, Any]:
    """Wait until the engine holds no request; check that it holds nothing else either."""
    async with asyncio.timeout(TIMEOUT_S):
        while (shown := await inside(server))["requests"]:
            await asyncio.sleep(0.02)
    assert shown["blocks"]["used"] == 0
    assert shown["permits"]["taken"] == 0
    counters = shown["counters"]
    assert counters["accepted"] == counters["finished"] + counters["failed"] + counters["cancelled"]
    return shown


def percentile(values: list[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
