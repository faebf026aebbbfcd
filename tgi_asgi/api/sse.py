"""Streamed answers: engine events in, frames out; detects clients that disconnect or stall.

The engine calls a stream's sink once per step. If the server offers a way to write a frame without waiting
(`DIRECT_WRITE`; `serve/` adds one to hypercorn), the sink renders and writes at once: 100 streams then cost
one wake-up of the event loop per step, not a hundred. Everything else is sent by the request's own task, as
ASGI middleware and servers expect: the first frame and the last, the backlog of a slow reader (kept
unrendered, then merged into one send), and frames that are slow to render, which a thread produces.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from tgi_asgi.api.asgi import Header, Message
from tgi_asgi.api.budgets import KeptAnswer
from tgi_asgi.api.call import Call, Renderer
from tgi_asgi.api.exchange import Exchange
from tgi_asgi.errors import TgiError
from tgi_asgi.types import TokenEvent

logger = logging.getLogger(__name__)

# Key in ASGI's `extensions` under which a server offers a function that writes a chunk of the body, not the
# last one, if it need not wait; it returns whether it has.
DIRECT_WRITE = "tgi_asgi.direct_write"
KEEP_ALIVE_S = 15.0
STALL_LIMIT_S = 60.0  # longest blocking send before the reader counts as stalled
MAX_WAITING_EVENTS = 4096  # about 1 MB of events per stream
# A thread renders the end of a stream with more than this times `slow_beyond` events in all, because the end
# may repeat the whole answer.
_LONG = 4
_STREAM_HEADERS: tuple[Header, ...] = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


class EventStream:
    """One streamed response over an exchange's channels.

        exchange.channels.append(engine.submit(request, permit))
        await EventStream(exchange, call, renderer, headers).run()

    The headers are sent with the first frame, or after `--first-event-timeout` with a comment; an earlier
    failure is an ordinary error response. The response ends exactly once: with the renderer's closing frames,
    or by closing the connection (after a stalled reader or a bug).
    """

    __slots__ = (
        "_channels", "_deadline", "_end", "_exchange", "_failure", "_headers", "_is_busy", "_is_over",
        "_is_started", "_keep_alive", "_last_send_s", "_loop", "_num_events", "_num_open", "_num_waiting",
        "_ready", "_renderer", "_slow_beyond", "_slow_jobs", "_waiting", "_woken", "_write",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, call: Call, renderer: Renderer, headers: Iterable[Header]) -> None:
        self._exchange = exchange
        self._renderer = renderer
        self._headers = [(b"content-type", call.stream_type), *_STREAM_HEADERS, *headers]
        self._keep_alive = call.keep_alive
        extensions = exchange.scope.get("extensions") or {}
        self._write: Callable[[bytes], bool] | None = extensions.get(DIRECT_WRITE)
        self._loop = asyncio.get_running_loop()
        self._channels = exchange.channels
        self._num_open = 0  # unfinished choices
        self._waiting: dict[int, list[TokenEvent]] = {}  # unrendered events, by job index
        self._num_waiting = 0
        self._num_events = 0  # total so far
        self._ready = b""  # rendered frames not sent yet
        self._slow_beyond = MAX_WAITING_EVENTS
        self._slow_jobs: set[int] = set()
        self._failure: TgiError | None = None  # the request's failure; later events are ignored
        self._end: BaseException | None = None  # ends the stream at once, without closing frames
        self._is_started = False
        self._is_busy = False  # the request's task is rendering or sending
        self._is_over = False  # nothing may be sent any more
        self._woken: asyncio.Future[None] = self._loop.create_future()
        self._deadline: asyncio.Timeout | None = None  # of the send in progress
        self._last_send_s = self._loop.time()

    async def run(
        self,
        *,
        slow_beyond: int = MAX_WAITING_EVENTS,
        begins_slowly: bool = False,
        kept: KeptAnswer | None = None,
    ) -> None:
        """Stream until every choice has finished, and watch for a disconnect meanwhile.

        Args:
            slow_beyond: Number of events at once above which a thread renders them.
            begins_slowly: Whether a thread also renders the first events of each channel. For a large request
                it always renders these and the last ones, which repeat the request or the whole answer.
            kept: What the renderer keeps of the answer, which grows with each token.

        Raises:
            TgiError: if the engine refused or failed before the first frame; nothing was sent.
            ClientDisconnected: if the client disconnected.
        """
        exchange, channels = self._exchange, self._channels
        self._slow_beyond = slow_beyond
        self._slow_jobs = set(range(len(channels) if begins_slowly or exchange.is_large else 0))
        self._num_open = sum(channel.request.n for channel in channels)
        watch = asyncio.ensure_future(exchange.wait_for_disconnect())
        watch.add_done_callback(self._on_disconnect)
        try:
            if kept is not None:
                kept.begin(self.on_error)
            for job_index, channel in enumerate(channels):
                sink = _JobSink(self, job_index) if kept is None else _KeptJobSink(self, job_index, kept)
                channel.attach(sink)
            while await self._send_more():
                pass
        except _CutOff:
            pass
        finally:
            self._is_over = True
            self._end = None  # once raised, its frames refer to this stream
            exchange.cancel_channels()
            watch.cancel()

    @property
    def has_all(self) -> bool:
        """Whether no more events count: every choice has finished, or the request has failed."""
        return self._num_open == 0

    def on_events(self, job_index: int, events: Sequence[TokenEvent]) -> None:
        """Accept new events of one channel; never blocks or raises."""
        if self._is_over or self._failure is not None:  # events of other channels after the end are ignored
            return
        for event in events:
            if event.finish is not None:
                self._num_open -= 1
        self._num_events += len(events)
        if self._may_write(job_index, len(events)):
            self._write_now(job_index, events)
            return
        self._waiting.setdefault(job_index, []).extend(events)
        self._num_waiting += len(events)
        if self._num_waiting > MAX_WAITING_EVENTS:
            self._stop(self._cut_off(f"the reader is {self._num_waiting} tokens behind"))
        elif not self._is_busy:
            self._wake()

    def on_error(self, error: TgiError) -> None:
        """Accept the failure of one channel, which fails the whole request."""
        if self._is_over or self._failure is not None:
            return
        self._exchange.error = self._failure = error
        self._exchange.cancel_channels()
        self._num_open = 0
        self._wake()

    def _may_write(self, job_index: int, num_events: int) -> bool:
        """Return whether events may be rendered and written here: they are few, and no earlier ones wait."""
        return (
            self._write is not None
            and self._is_started
            and self._num_open > 0
            and not (self._is_busy or self._waiting or self._ready)
            and num_events * len(self._channels) <= self._slow_beyond  # over all channels, per step
            and job_index not in self._slow_jobs
        )

    def _write_now(self, job_index: int, events: Sequence[TokenEvent]) -> None:
        assert self._write is not None
        try:
            frames = _without_line_breaks(self._renderer.render(job_index, events))
            if frames and self._write(frames):
                self._last_send_s = self._loop.time()
                return
        except Exception as error:
            self._stop(error)
            return
        if frames:
            self._ready = frames
            self._wake()

    async def _send_more(self) -> bool:
        """Wait for something to send and send it; return whether more follows."""
        await self._wait()
        if self._failure is not None and not self._is_started:
            raise self._failure
        self._is_busy = True
        is_last = self._num_open == 0
        frames = await self._take_frames(is_last)
        if self._end is not None:  # set while a thread rendered
            raise self._end
        if frames or is_last:
            await self._send(frames, is_last)
        self._is_busy = False
        return not is_last

    async def _wait(self) -> None:
        """Return once there is something to send: frames, the end, or a comment after a silence.

        Raises:
            BaseException: if the stream must end without closing frames.
        """
        while self._end is None and not (self._waiting or self._ready or self._num_open == 0):
            try:
                async with asyncio.timeout_at(self._silent_until()):
                    await self._woken
            except TimeoutError:
                # Events may have arrived since the timer fired, and must not be overwritten.
                is_silent = not (self._ready or self._waiting)
                if is_silent and self._loop.time() >= (self._silent_until() or 0.0):
                    self._ready = self._keep_alive
            finally:
                self._woken = self._loop.create_future()
        if self._end is not None:
            raise self._end

    def _silent_until(self) -> float | None:
        """Return when to fill a silence, or None for never."""
        first_s = self._exchange.context.settings.first_event_timeout_s
        silence_s = KEEP_ALIVE_S if self._is_started else first_s
        return self._last_send_s + silence_s if silence_s and self._keep_alive else None

    async def _take_frames(self, is_last: bool) -> bytes:
        """Render waiting events, in a thread if that is slow; new events wait meanwhile."""
        waiting, self._waiting = self._waiting, {}
        num_events, self._num_waiting = self._num_waiting, 0
        ready, self._ready = self._ready, b""
        failure = self._failure
        is_slow = num_events > self._slow_beyond or not self._slow_jobs.isdisjoint(waiting)
        if is_last:
            is_slow |= self._exchange.is_large or self._num_events > _LONG * self._slow_beyond
        self._slow_jobs -= waiting.keys()

        def render() -> bytes:
            frames = [ready, *(self._renderer.render(job, events) for job, events in waiting.items())]
            waiting.clear()  # in this thread: freeing 4,096 events with 20 alternatives each takes 4 ms
            if failure is not None:
                frames.append(self._renderer.fail(failure))
            elif is_last:
                frames.append(self._renderer.close())
            return _without_line_breaks(b"".join(frames))

        return await self._exchange.context.text_threads.run(render) if is_slow else render()

    async def _send(self, frames: bytes, is_last: bool) -> None:
        exchange = self._exchange
        message: Message = {"type": "http.response.body", "body": frames, "more_body": not is_last}
        try:
            async with asyncio.timeout(STALL_LIMIT_S) as self._deadline:
                if not self._is_started:
                    self._is_started = True
                    exchange.status = 200
                    headers = [*self._headers, *exchange.response_headers]
                    await exchange.send({"type": "http.response.start", "status": 200, "headers": headers})
                await exchange.send(message)
        except Exception as error:  # some servers raise after a disconnect
            if self._end is not None:
                raise self._end from None
            is_stalled = self._deadline is not None and self._deadline.expired()
            stalled = f"the reader has not read for {STALL_LIMIT_S:.0f} s"
            raise self._cut_off(stalled if is_stalled else f"sending failed: {error!r}") from None
        finally:
            self._deadline = None
        self._last_send_s = self._loop.time()

    def _cut_off(self, why: str) -> _CutOff:
        logger.warning("request %s: stream cut off: %s", self._exchange.request_id, why)
        self._exchange.is_disconnected = True
        return _CutOff()

    def _stop(self, reason: BaseException) -> None:
        """End the stream now, whatever the request's task is doing."""
        self._is_over = True
        self._end = reason
        self._exchange.cancel_channels()
        self._wake()
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(self._loop.time())

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def _on_disconnect(self, watch: asyncio.Future[None]) -> None:
        if watch.cancelled() or self._is_over:
            return
        if self._num_open == 0 and self._is_busy and not self._waiting:
            return  # all is being sent; servers also report the response's end like this
        self._stop(self._exchange.note_disconnect())


def _without_line_breaks(frames: bytes) -> bytes:
    """Return frames of JSON with U+2028, U+2029 and U+0085 escaped.

    JSON may contain them as they are, but clients that read by httpx's `iter_lines` (huggingface_hub, ollama)
    take them for ends of lines. All other characters that end a line are escaped by every JSON encoder.
    """
    # Most frames have neither of their first bytes. Looking for one byte takes 20 ns, `replace` takes 200.
    if 0xE2 in frames:
        frames = frames.replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029")
    return frames.replace(b"\xc2\x85", rb"\u0085") if 0xC2 in frames else frames


class _CutOff(Exception):
    """Ends a stream without closing frames; the closed connection shows the client a failure."""


class _JobSink:
    """The sink of one channel."""

    __slots__ = ("_job_index", "_stream")

    def __init__(self, stream: EventStream, job_index: int) -> None:
        self._stream = stream
        self._job_index = job_index

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self._stream.on_events(self._job_index, events)

    def on_error(self, error: TgiError) -> None:
        self._stream.on_error(error)


class _KeptJobSink(_JobSink):
    """The sink of a channel whose tokens the renderer keeps."""

    __slots__ = ("_kept",)

    def __init__(self, stream: EventStream, job_index: int, kept: KeptAnswer) -> None:
        super().__init__(stream, job_index)
        self._kept = kept

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self._kept.add_tokens(len(events))
        super().on_events(events)
        if self._stream.has_all:  # it only has to be sent, which a slow reader may delay
            self._kept.end()
