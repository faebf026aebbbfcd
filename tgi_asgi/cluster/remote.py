"""The engine of an ingress: sends each request to the most suitable replica, and passes its answer on.

To the API it is an ordinary engine (`types.Engine`), so a cluster shares the server's code for parsing, keys,
limits, templates, streams and errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from tgi_asgi.cluster.table import ReplicaTable, Ticket
from tgi_asgi.cluster.totals import Totals
from tgi_asgi.cluster.wire import CacheVersion, Reply, Report, WireRequest, finishes_of, unpack_events
from tgi_asgi.engine.admission import Admission
from tgi_asgi.engine.outbox import Outbox
from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.errors import (
    GenerationFailed,
    IncompleteGeneration,
    Overloaded,
    RequestAborted,
    TgiError,
    Unavailable,
)
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, GenerationRequest, Permit, RequestStats, TokenEvent

logger = logging.getLogger(__name__)

REPORT_S = 1.0
_REPORT_TIMEOUT_S = 5.0
_MAX_TRIES = 3  # per request without a token yet: another replica may have capacity, or be alive
_LONG = 16 * 1024  # prompt tokens from which a thread does the hashing, at 60 ns each


class ReplicaLost(Exception):
    """Raised by a transport when a replica has ended or cannot be reached."""


class Transport(Protocol):
    """The connection to a model's replicas."""

    def replicas(self) -> Sequence[str]:
        """Return the ids of the current replicas."""

    async def wait_for_change(self) -> None:
        """Return once the replicas differ from those of the last `replicas` call."""

    def generate(self, order: Sequence[str], request: WireRequest) -> AsyncIterator[Reply]:
        """Send a request to the first of these replicas that still exists.

        Raises:
            ReplicaLost: if it ended before its answer did.
        """

    async def call(self, replica: str, method: str, *arguments: Any) -> Any:
        """Call a method of one replica.

        Raises:
            ReplicaLost: if there is no replica of that id.
        """


class RemoteEngine:
    """A `types.Engine` whose steps are computed by replicas.

    Its capacity is that of all replicas together; without replicas its state is LOADING.
    """

    def __init__(self, transport: Transport, settings: Settings, block_size: int) -> None:
        self.on_fatal: Callable[[TgiError], None] | None = None
        self.transport = transport
        self.table = ReplicaTable(block_size)
        self.admission = Admission(settings.max_concurrent_requests, time.monotonic)
        self.channels: list[RemoteChannel] = []
        self._totals = Totals()
        self._max_per_replica = settings.max_concurrent_requests
        self._prefix_cache = settings.prefix_cache
        self.block_size = block_size
        self._is_draining = False
        self._has_drained = False  # what is left of the accepted requests is being ended
        self._watch: asyncio.Task[None] | None = None
        self._background_tasks: set[asyncio.Task[None]] = set()

    @property
    def stats(self) -> Any:
        """Counters summed over all replicas."""
        return self._totals.stats

    @property
    def state(self) -> EngineState:
        if self._is_draining:
            return EngineState.DRAINING
        return EngineState.READY if self.table.replicas else EngineState.LOADING

    def describe(self) -> dict[str, Any]:
        """Return what is known about the replicas, for people to read."""
        replicas = [
            {
                "id": each.name,
                "open": each.num_open,
                "open_by_others": each.num_foreign,
                "load_tokens": each.load,
                "cached_blocks": each.num_blocks,
                "missed_reports": each.num_missed,
            }
            for each in self.table.replicas.values()
        ]
        requests = [channel.request.request_id for channel in self.channels]
        return {"replicas": replicas, "requests": requests}

    def start(self) -> None:
        """Start watching the replicas."""
        self._watch = asyncio.create_task(self._keep_watching(), name="replicas")

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new and let all who hold a permit finish; after the timeout, end the rest."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.admission.is_idle.wait()
        self._end_all()

    async def stop(self) -> None:
        """End every request with an error now."""
        self._is_draining = True
        self._end_all()
        tasks = [task for task in (self._watch, *self._background_tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end_all(self) -> None:
        self._has_drained = True
        message = "the server is shutting down"
        for channel in list(self.channels):
            channel.refuse(IncompleteGeneration(message) if channel.has_begun else Unavailable(message))

    def acquire(self, n: int, tenant: str | None = None, *, is_accepted: bool = False) -> Permit:
        """Admit n choices, or n more of an accepted call; raises `Overloaded` or `Unavailable`.

        As in an engine, a key with fewer choices than another displaces that key's newest request without a
        token.
        """
        goes_on = is_accepted and self._is_draining and not self._has_drained
        if self.state is not EngineState.READY and not goes_on:
            raise Unavailable("No replica can be reached", retry_after_s=2)
        self.admission.make_room(n, tenant, self._waiting_newest_first)
        return self.admission.acquire(n, tenant)

    def _waiting_newest_first(self) -> list[RemoteChannel]:
        return [channel for channel in reversed(self.channels) if not channel.has_begun]

    def submit(self, request: GenerationRequest, permit: Permit) -> RemoteChannel:
        """Send a request; its permit is released at its end, or at once if this raises.

        Raises:
            Unavailable: if the server has drained for as long as it may.
        """
        if self._has_drained:
            permit.release()
            raise Unavailable("the server is shutting down")
        channel = RemoteChannel(self, request, permit)
        self.channels.append(channel)
        return channel

    def closed(self, channel: RemoteChannel) -> None:
        """Remove a request that has ended."""
        self.channels.remove(channel)

    def abort(self, request_id: str) -> int:
        """End the requests with this id, with an error; return their number."""
        error = RequestAborted("the request was aborted")
        named = [channel for channel in self.channels if channel.request.request_id == request_id]
        return sum(channel.refuse(error) for channel in named)

    def reset_prefix_cache(self) -> int:
        """Make all replicas drop their cached prompts; return their number of blocks by the last reports."""
        num_blocks = 0
        for replica in self.table.replicas.values():
            num_blocks += replica.num_blocks
            replica.forget()
            task = asyncio.create_task(self._call_if_alive(replica.name, "reset_prefix_cache"))
            self._background_tasks.add(task)
            task.add_done_callback(self._background_tasks.discard)
        return num_blocks

    async def _call_if_alive(self, replica: str, method: str) -> None:
        with contextlib.suppress(ReplicaLost):
            await self.transport.call(replica, method)

    def digests(self, request: GenerationRequest) -> list[bytes]:
        """Return the digests of a prompt's full blocks as an engine computes them; none if not shared."""
        if not self._prefix_cache or request.needs_all:
            return []
        root = root_digest(None if request.adapter is None else request.adapter.key, request.cache_salt)
        chain = HashChain(root, self.block_size, request.images)
        ids = request.prompt_ids
        return [chain.digest(index, ids) for index in range(len(ids) // self.block_size)]

    def drop(self, replica: str) -> None:
        """Remove a replica that is gone."""
        self.table.drop(replica)
        self._totals.retire(replica)
        self._totals.sum_up()

    async def _keep_watching(self) -> None:
        while True:
            try:
                await self.refresh()
                async with asyncio.timeout(REPORT_S):
                    await self.transport.wait_for_change()
            except TimeoutError:
                pass
            except Exception:
                logger.exception("watching the replicas failed")
                await asyncio.sleep(REPORT_S)

    async def refresh(self) -> None:
        """Request a report from every replica."""
        names = self.transport.replicas()
        for gone in self.table.replicas.keys() - set(names):
            self.drop(gone)
        await asyncio.gather(*map(self._request_report, names))
        self._totals.sum_up()
        self.admission.capacity = self._max_per_replica * max(len(self.table.replicas), 1)

    async def _request_report(self, name: str) -> None:
        known = self.table.replicas.get(name)
        version = CacheVersion() if known is None else known.cache_version
        try:
            async with asyncio.timeout(_REPORT_TIMEOUT_S):
                report: Report = await self.transport.call(name, "report", version)
        except ReplicaLost:
            self.drop(name)
        except Exception as error:  # of one replica; the others' reports count
            if not isinstance(error, TimeoutError):
                logger.warning("replica %s does not report", name, exc_info=error)
            if known is not None:
                known.num_missed += 1
        else:
            if report.replica != name:  # the replica is gone, and another one answered
                self.drop(name)
                return
            self.table.update(report)
            self._totals.update(name, report.stats)


class RemoteChannel(Outbox):
    """A `types.Channel`: a request that a replica computes, with a buffer for its events."""

    def __init__(self, engine: RemoteEngine, request: GenerationRequest, permit: Permit) -> None:
        super().__init__(request)
        self.stats = RequestStats(time.monotonic())
        self.permit = permit
        self.has_begun = False
        self._engine = engine
        self._num_open = request.n
        self._is_ended = False
        self._task = asyncio.create_task(self._run(), name=f"request {request.request_id}")

    def cancel(self) -> None:
        """Cancel the request; it ends with `IncompleteGeneration` unless it has ended already."""
        self.refuse(IncompleteGeneration("the request was cancelled"))

    def refuse(self, error: TgiError) -> bool:
        """End the request with an error; return whether it was still running."""
        if self._is_ended:
            return False
        self._end(error)
        self._task.cancel()
        return True

    async def _run(self) -> None:
        try:
            error = await self._generate()
            if error is None and self._num_open:
                error = IncompleteGeneration("Incomplete generation")
        except Exception:
            logger.exception("sending request %s to a replica failed", self.request.request_id)
            error = GenerationFailed("the request failed on its way to a replica")
        if not self._is_ended:
            self._end(error)

    async def _generate(self) -> TgiError | None:
        """Follow an answer to its end, on the next best replica if the best has no capacity."""
        engine, request = self._engine, self.request
        size = len(request.prompt_ids)
        hashed = engine.digests(request) if size < _LONG else asyncio.to_thread(engine.digests, request)
        digests = hashed if isinstance(hashed, list) else await hashed
        adapter = None if request.adapter is None else request.adapter.name
        wired = WireRequest.of(request, self.permit.tenant)
        tried: list[str] = []
        error: TgiError | None = None
        while len(tried) < _MAX_TRIES:
            order = engine.table.order(digests, size, adapter, without=tried)
            if not order:
                break
            tried.append(order[0])
            ticket = engine.table.send(order[0], digests, size)
            try:
                error = await self._follow(order, wired, ticket)
            except ReplicaLost as lost:
                logger.warning("request %s: replica %s is lost: %s", request.request_id, order[0], lost)
                engine.drop(order[0])
                if self.has_begun:
                    return GenerationFailed("the replica that computed this answer was lost")
                error = None
            else:
                if self.has_begun or not isinstance(error, Overloaded | Unavailable):
                    return error
            finally:
                ticket.end()
        return error or Unavailable("No replica can be reached", retry_after_s=2)

    async def _follow(self, order: Sequence[str], wired: WireRequest, ticket: Ticket) -> TgiError | None:
        """Pass on what a replica answers; return the request's error if it fails there."""
        async with contextlib.aclosing(self._engine.transport.generate(order, wired)) as replies:  # type: ignore[type-var]
            async for reply in replies:
                if reply.error is not None:
                    return reply.error
                if reply.stats is not None:
                    reply.stats.fill(self.stats)
                ticket.begin()
                self._push(unpack_events(reply.events))
        return None

    def _push(self, events: list[TokenEvent]) -> None:
        self.has_begun = True
        finishes = finishes_of(events)
        self.stats.generated_tokens += len(events)
        self.stats.finishes += finishes
        self._num_open -= len(finishes)
        self._events += events
        if self._num_open == 0:
            self._close()
        self.flush()

    def _end(self, error: TgiError | None) -> None:
        self._error = error
        self._close()
        self.flush()

    def _close(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self.permit.release(has_run=self.has_begun)
            self._engine.closed(self)
