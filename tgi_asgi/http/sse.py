"""Server-sent events, written straight from the engine's delivery.

The engine calls a stream's sink once a step; the sink renders the new frames and advances the server's
`send()` by hand. A task is made only where `send()` would block: 100 streams a step cost one wake-up of the
loop instead of a hundred. While a reader blocks, events wait unrendered and leave merged, in one send; one
that lags too far behind is cut off, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import logging
import types
from collections.abc import Coroutine, Generator, Iterable, Sequence
from typing import Any, Protocol

from tgi_asgi.errors import TgiError
from tgi_asgi.http.asgi import Header, Message
from tgi_asgi.http.exchange import Exchange
from tgi_asgi.types import Channel, TokenEvent

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
STALL_LIMIT_S = 60.0  # a send that blocks for longer: the reader has stopped reading
MAX_WAITING_EVENTS = 4096  # about 1 MB of events a stream
_STREAM_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Renderer(Protocol):
    """Makes the frames of one stream; each call returns whole events, or nothing."""

    def render(self, part: int, events: Sequence[TokenEvent]) -> bytes:
        """Return frames for the new events of the request's channel number `part`."""

    def close(self) -> bytes:
        """Return what follows the last choice's last frame."""

    def fail(self, error: TgiError) -> bytes:
        """Return what ends a stream that has begun and cannot go on."""


class EventStream:
    """One streamed response over one or more channels.

        await EventStream(exchange, renderer).run([engine.submit(request, permit)])

    The headers leave with the first frame, so a failure before it is an ordinary error response. The
    response ends exactly once: with the renderer's closing frames, or (a reader that has stalled, a bug) by
    closing the connection.
    """

    __slots__ = (
        "_ended",
        "_exchange",
        "_failure",
        "_headers",
        "_is_over",
        "_is_started",
        "_last_send_s",
        "_loop",
        "_num_open",
        "_num_waiting",
        "_renderer",
        "_send",
        "_sending",
        "_timer",
        "_waiting",
    )

    def __init__(self, exchange: Exchange, renderer: Renderer, headers: Iterable[Header] = ()) -> None:
        self._exchange = exchange
        self._renderer = renderer
        self._headers = headers
        self._send = exchange.send
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._num_open = 0  # choices that have not finished
        self._waiting: dict[int, list[TokenEvent]] = {}  # by part, while a send blocks
        self._num_waiting = 0
        self._failure: bytes | None = None  # closing frames of a failed stream, while a send blocks
        self._sending: asyncio.Task[None] | None = None
        self._is_started = False
        self._is_over = False  # nothing may be sent any more
        self._last_send_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, channels: Sequence[Channel]) -> None:
        """Stream until every choice has finished, and watch for the client's leaving meanwhile.

        Raises:
            TgiError: the engine refused or failed before the first frame; nothing was sent.
            ClientDisconnected: the client went away.
        """
        exchange = self._exchange
        exchange.channels.extend(channels)
        self._num_open = sum(channel.request.n for channel in channels)
        watch = asyncio.ensure_future(exchange.wait_for_disconnect())
        watch.add_done_callback(self._on_disconnect)
        try:
            for part, channel in enumerate(channels):
                channel.attach(_Part(self, part))
            await self._ended
        finally:
            self._is_over = True
            if self._num_open:
                for channel in channels:
                    channel.cancel()
            watch.cancel()
            if self._timer is not None:
                self._timer.cancel()
            if self._sending is not None:
                self._sending.cancel()

    def on_events(self, part: int, events: Sequence[TokenEvent]) -> None:
        """Take new events of one channel; never blocks or raises."""
        if self._is_over or self._failure is not None:  # what another channel still tells does not count
            return
        for event in events:
            if event.finish is not None:
                self._num_open -= 1
        try:
            if self._sending is None:
                frames = self._renderer.render(part, events)
                if self._num_open == 0:
                    frames += self._renderer.close()
                if frames or self._num_open == 0:
                    self._write(frames)
                return
        except Exception as error:
            logger.exception("request %s: cannot render events", self._exchange.request_id)
            self._exchange.error = error
            self._abandon()
            return
        self._waiting.setdefault(part, []).extend(events)
        self._num_waiting += len(events)
        if self._num_waiting > MAX_WAITING_EVENTS:
            self._abandon(f"the reader is {self._num_waiting} tokens behind")

    def on_error(self, error: TgiError) -> None:
        """Take the failure of one channel: it is the failure of the whole request."""
        if self._is_over or self._failure is not None:
            return
        self._exchange.error = error
        for channel in self._exchange.channels:
            channel.cancel()
        self._num_open = 0
        if not self._is_started:
            self._is_over = True
            self._ended.set_exception(error)
            return
        self._failure = self._renderer.fail(error)
        if self._sending is None:
            self._flush()

    def _write(self, frames: bytes) -> None:
        """Send frames, the last ones if no choice is open; carry on in a task if that would block."""
        is_last = self._num_open == 0
        if self._timer is None:
            self._timer = self._loop.call_later(KEEP_ALIVE_S, self._tick)
        self._last_send_s = self._loop.time()
        message = {"type": "http.response.body", "body": frames, "more_body": not is_last}
        sending = self._send(message) if self._is_started else self._start(message)
        try:
            blocker = sending.send(None)
        except StopIteration:
            if is_last:
                self._finish()
            return
        except Exception as error:  # a server may raise for a client that has gone
            self._abandon(f"sending failed: {error!r}")
            return
        self._sending = self._loop.create_task(_carry_on(sending, blocker))
        self._sending.add_done_callback(lambda task: self._on_sent(task, is_last))

    async def _start(self, first: Message) -> None:
        self._is_started = True
        self._exchange.status = 200
        headers = [*_STREAM_HEADERS, *self._headers, *self._exchange.response_headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(first)

    def _on_sent(self, task: asyncio.Task[None], was_last: bool) -> None:
        self._sending = None
        if task.cancelled() or self._is_over:
            return
        error = task.exception()
        if error is not None:
            self._abandon(f"sending failed: {error!r}")
        elif was_last:
            self._finish()
        else:
            self._flush()

    def _flush(self) -> None:
        """Send what waited while a send blocked."""
        waiting, self._waiting, self._num_waiting = self._waiting, {}, 0
        try:
            frames = b"".join(self._renderer.render(part, events) for part, events in waiting.items())
            if self._failure is not None:
                frames += self._failure
            elif self._num_open == 0:
                frames += self._renderer.close()
            if frames or self._num_open == 0:
                self._write(frames)
        except Exception as error:
            logger.exception("request %s: cannot render events", self._exchange.request_id)
            self._exchange.error = error
            self._abandon()

    def _finish(self) -> None:
        self._is_over = True
        if not self._ended.done():
            self._ended.set_result(None)

    def _abandon(self, reason: str | None = None) -> None:
        """Cut the stream off: the connection closes without the closing frames, as a failure must look."""
        if reason is not None:
            logger.warning("request %s: stream cut off: %s", self._exchange.request_id, reason)
        self._exchange.is_disconnected = True
        for channel in self._exchange.channels:
            channel.cancel()
        self._finish()

    def _on_disconnect(self, watch: asyncio.Future[None]) -> None:
        if watch.cancelled() or self._is_over:
            return
        if self._num_open == 0 and self._sending is not None and not self._waiting:
            return  # everything is on its way: a server reports the end of the response like this, too
        self._is_over = True
        if not self._ended.done():
            self._ended.set_exception(self._exchange.disconnect())

    def _tick(self) -> None:
        """Send a comment after 15 s of silence; give a reader up that has not read for a minute."""
        silent_s = self._loop.time() - self._last_send_s
        if self._sending is not None and silent_s >= STALL_LIMIT_S:
            self._abandon(f"the reader has not read for {STALL_LIMIT_S:.0f} s")
            return
        delay_s = KEEP_ALIVE_S - silent_s
        if delay_s <= 0.0:
            delay_s = KEEP_ALIVE_S
            if self._sending is None and not self._is_over:
                self._write(b":\n\n")
        self._timer = self._loop.call_later(delay_s, self._tick)


class _Part:
    """The sink of one channel."""

    __slots__ = ("_part", "_stream")

    def __init__(self, stream: EventStream, part: int) -> None:
        self._stream = stream
        self._part = part

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self._stream.on_events(self._part, events)

    def on_error(self, error: TgiError) -> None:
        self._stream.on_error(error)


async def _carry_on(coroutine: Coroutine[Any, Any, None], blocker: Any) -> None:
    """Go on, as a task, with a coroutine that was advanced by hand up to where it waits for `blocker`."""
    await _resume(coroutine, blocker)


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None], blocker: Any) -> Generator[Any, Any, None]:
    try:
        while True:
            try:
                value = yield blocker
            except BaseException as error:  # a cancellation belongs to where the coroutine waits
                blocker = coroutine.throw(error)
            else:
                blocker = coroutine.send(value)
    except StopIteration:
        return
