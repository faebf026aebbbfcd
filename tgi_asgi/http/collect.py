"""Gather a whole answer from the engine for the responses that are not streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tgi_asgi.errors import TgiError
from tgi_asgi.http.exchange import Exchange, while_connected
from tgi_asgi.types import Channel, TokenEvent


async def collect(exchange: Exchange, channels: Sequence[Channel]) -> list[list[list[TokenEvent]]]:
    """Wait for every choice of every channel: `result[part][choice]` is that choice's events in order.

    Raises:
        TgiError: one channel failed; the others are given up.
        ClientDisconnected: the client went away; all are given up.
    """
    exchange.channels.extend(channels)
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    gathered = _Gathered(sum(channel.request.n for channel in channels), done)
    result = []
    try:
        for channel in channels:
            sink = _Choices(gathered, channel.request.n)
            result.append(sink.events)
            channel.attach(sink)
        await while_connected(exchange, done)
    finally:
        if gathered.num_open:
            for channel in channels:
                channel.cancel()
    return result


class _Gathered:
    """How many choices are still open, over all channels."""

    __slots__ = ("done", "num_open")

    def __init__(self, num_open: int, done: asyncio.Future[None]) -> None:
        self.num_open = num_open
        self.done = done


class _Choices:
    """The sink of one channel: sorts events by choice."""

    __slots__ = ("_gathered", "events")

    def __init__(self, gathered: _Gathered, n: int) -> None:
        self._gathered = gathered
        self.events: list[list[TokenEvent]] = [[] for _ in range(n)]

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self.events[event.index].append(event)
            if event.finish is not None:
                self._gathered.num_open -= 1
        if not self._gathered.num_open and not self._gathered.done.done():
            self._gathered.done.set_result(None)

    def on_error(self, error: TgiError) -> None:
        if not self._gathered.done.done():
            self._gathered.done.set_exception(error)
