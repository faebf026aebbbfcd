"""One replica: the engine, the model and its adapters, without HTTP; ingresses send it prepared requests.

Does not depend on Ray: `serving.py` makes it an actor, and tests call it directly.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from typing import cast

from tgi_asgi.api.served import Served
from tgi_asgi.app import App, Loader, create_app
from tgi_asgi.assembly import load_model
from tgi_asgi.cluster.totals import snapshot
from tgi_asgi.cluster.wire import (
    CacheVersion,
    Description,
    Reply,
    Report,
    WireRequest,
    WireStats,
    finishes_of,
    join_digests,
    pack_events,
)
from tgi_asgi.engine.adapters import Adapters
from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.journal import BlockJournal
from tgi_asgi.errors import GenerationFailed, TgiError
from tgi_asgi.serve.process import end_process
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, GenerationRequest, Lease, TokenEvent

logger = logging.getLogger(__name__)

# Combined cost of a reply on both sides. A stream waits this long times the number of streams before it sends
# again. All streams together therefore send at most 2,000 replies a second, each with all tokens since the
# last.
_REPLY_S = 0.0005


class Replica:
    """Serves the requests of ingresses.

        replica = await Replica.start("a", Settings(model_id="model.gguf"))
        async for reply in replica.generate(request): ...

    Args:
        name: The id by which ingresses know it.
    """

    def __init__(self, name: str, app: App, served: Served) -> None:
        self.name = name
        self._app = app
        self._served = served
        self._engine = cast(Engine, served.engine)
        self._adapters = cast("Adapters | None", served.adapters)
        self._life = secrets.token_hex(8)
        self._num_streams = 0
        self._journal = BlockJournal()
        self._engine.scheduler.resumable.journal = self._journal

    @classmethod
    async def start(cls, name: str, settings: Settings, loader: Loader = load_model) -> Replica:
        """Load the model; the process ends if the engine dies later.

        Raises:
            BaseException: if the model cannot be loaded.
        """
        loaded: asyncio.Future[Served] = asyncio.get_running_loop().create_future()
        app = create_app(settings, loader)
        app.on_ready, app.on_fatal = loaded.set_result, loaded.set_exception
        app.start()
        served = await loaded
        app.on_fatal = lambda error: end_process(str(error), 1)
        return cls(name, app, served)

    async def stop(self) -> None:
        """End running requests with an error, and release all resources."""
        await self._app.stop()

    def check(self) -> None:
        """Raise if the engine is dead."""
        if self._app.context.state is EngineState.DEAD:
            raise GenerationFailed("the engine has failed")

    def describe(self) -> Description:
        """Return what an ingress needs to know about the model."""
        served, size = self._served, self._engine.scheduler.tables.block_size
        return Description(
            served.tokenizer, served.chat_template, served.info, served.image_processor,
            self._adapters is not None, size,
        )  # fmt: skip

    def report(self, known: CacheVersion) -> Report:
        """Return the replica's status, and how its cache changed since the version that an ingress knows."""
        journal, stats = self._journal, self._engine.stats
        changes = journal.since(known.number) if known.life == self._life else None
        is_whole = changes is None
        if changes is None:
            changes = dict.fromkeys(self._engine.scheduler.resumable.known, True)
        return Report(
            self.name,
            CacheVersion(self._life, journal.end),
            is_whole,
            join_digests(digest for digest, is_found in changes.items() if is_found),
            join_digests(digest for digest, is_found in changes.items() if not is_found),
            stats.accepted - stats.finished - stats.failed - stats.cancelled,
            snapshot(stats),
            {} if self._adapters is None else self._adapters.keys,
            has_states=self._engine.scheduler.tables.states is not None,
        )

    async def generate(self, wired: WireRequest) -> AsyncIterator[Reply]:
        """Yield an answer as it is generated; it ends with a finish of every choice, or an error.

        A reader that stops early cancels the request.
        """
        lease: Lease | None = None
        self._num_streams += 1
        try:
            if wired.adapter is not None:
                assert self._adapters is not None, (
                    "an ingress sends adapters' requests to replicas with adapters"
                )
                lease = await self._adapters.lease(wired.adapter)
            request = await self._request(wired, lease)
            permit = self._engine.acquire(request.n, wired.tenant)
            channel = self._engine.submit(request, permit)
            mailbox = _Mailbox()
            channel.attach(mailbox)
            num_open, is_first = request.n, True
            try:
                while num_open:
                    events = await mailbox.take()
                    num_open -= len(finishes_of(events))
                    has_stats = is_first or not num_open
                    yield Reply(
                        self.name, pack_events(events), WireStats.of(channel.stats) if has_stats else None
                    )
                    is_first = False
                    if num_open:
                        await asyncio.sleep(self._num_streams * _REPLY_S)
            finally:
                channel.cancel()
        except TgiError as error:
            yield Reply(self.name, error=error)
        finally:
            self._num_streams -= 1
            if lease is not None:
                lease.release()

    async def _request(self, wired: WireRequest, lease: Lease | None) -> GenerationRequest:
        grammar = None
        if wired.grammar is not None:
            grammar = await asyncio.to_thread(self._served.grammars.compile, wired.grammar)
        ids = list(wired.request.prompt_ids)
        adapter = None if lease is None else lease.adapter
        return replace(wired.request, prompt_ids=ids, grammar=grammar, adapter=adapter)

    async def add_adapter(self, name: str, location: str) -> TgiError | None:
        """Read an adapter; return the error if that fails."""
        return await _error_of(self._served_adapters().add(name, location))

    async def replace_adapter(self, name: str, location: str) -> TgiError | None:
        """Read an adapter that replaces the one of this name; return the error if that fails."""
        return await _error_of(self._served_adapters().replace(name, location))

    async def remove_adapter(self, name: str) -> TgiError | None:
        """Unload an adapter; return the error if that fails."""
        return await _error_of(self._served_adapters().remove(name))

    def _served_adapters(self) -> Adapters:
        assert self._adapters is not None, "an ingress calls only replicas that serve adapters"
        return self._adapters

    def reset_prefix_cache(self) -> int:
        """Drop all cached prompts; return the number of blocks dropped."""
        return self._engine.reset_prefix_cache()


async def _error_of(work: Awaitable[None]) -> TgiError | None:
    """Return the error, because an actor's exceptions lose their type on the way."""
    try:
        await work
    except TgiError as error:
        return error
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # a panic in a library written in Rust is not an `Exception`
        # The ingress undoes the change on the other replicas.
        logger.exception("changing an adapter failed")
        return TgiError(f"A replica failed with {type(error).__name__}; its log says why")
    return None


class _Mailbox:
    """A channel's sink: buffers events that have not been sent yet."""

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._error: TgiError | None = None
        self._has_news = asyncio.Event()

    def on_events(self, events: Sequence[TokenEvent]) -> None:
        self._events.extend(events)
        self._has_news.set()

    def on_error(self, error: TgiError) -> None:
        self._error = error
        self._has_news.set()

    async def take(self) -> list[TokenEvent]:
        """Wait for events and return them; after the last one, raise the request's error."""
        await self._has_news.wait()
        events, self._events = self._events, []
        if not events and self._error is not None:
            raise self._error
        if self._error is None:
            self._has_news.clear()
        return events
