"""The LoRA adapters that requests may name: loaded in a thread, kept in memory up to a limit, unloaded.

    adapters = Adapters(load, [AdapterSource("sql", "/adapters/sql")], max_loaded=16)
    await adapters.start()
    lease = await adapters.lease("sql")           # lease.adapter goes into the request
    ...
    lease.release()

Everything except `load` runs on one event loop. An adapter that a request holds stays in memory until the
request releases it, even if the name is removed or replaced meanwhile.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from tgi_asgi.errors import InvalidRequest, ModelLoadError, Overloaded, Unavailable, UnknownAdapter
from tgi_asgi.formats.sources import AdapterSource
from tgi_asgi.types import Adapter

logger = logging.getLogger(__name__)

_WAIT_S = 30.0  # for an adapter that is being reloaded
_PAUSE_S = 30.0  # after a failure, before the next attempt


class Loaded(Protocol):
    """The return value of `load`: `models.adapters.LoadedAdapter`."""

    @property
    def weights(self) -> object: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def rank(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class _State(enum.Enum):
    """Where an adapter is.

    ```text
    QUEUED ──► READING ─────────► IN_MEMORY
                │    ▲ lease          │ memory is needed,
          fails ▼    │                │ or the name is gone
               UNLOADED ◄─────────────┘
    ```
    """

    QUEUED = "queued"  # until its turn to be read for the first time
    READING = "reading"
    IN_MEMORY = "in memory"
    UNLOADED = "unloaded"


class _Entry:
    """An adapter that requests can name.

    Attributes:
        state: Changed by the methods only.
        task: The task that reads it: in the state READING.
        adapter: The adapter: in the state IN_MEMORY.
        key: Key of its contents; None: it has never been read.
        failure: Why the last attempt to read it failed; None: it did not.
        retry_s: Before then, a failed adapter is not read again.
        num_users: Number of leases, and of requests that wait for it to be read.
        used: Turn number of its last lease; turn numbers only grow.
    """

    __slots__ = (
        "adapter", "failure", "idle", "key", "num_users", "retry_s", "source", "state", "task", "used",
    )  # fmt: skip

    def __init__(self, source: AdapterSource) -> None:
        self.source = source
        self.state = _State.QUEUED
        self.task: asyncio.Task[None] | None = None
        self.adapter: Adapter | None = None
        self.key: str | None = None
        self.failure: Exception | None = None
        self.retry_s = 0.0
        self.num_users = 0
        self.used = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def is_read_first(self) -> bool:
        """Whether it has not been read yet, so that it may turn out to be unreadable."""
        is_coming = self.state in (_State.QUEUED, _State.READING)
        return is_coming and self.key is None and self.failure is None

    def begin(self, task: asyncio.Task[None]) -> None:
        """Note the task that reads it."""
        self.state, self.task = _State.READING, task

    def succeed(self, adapter: Adapter) -> None:
        """Note that it has been read."""
        self.state, self.task, self.adapter = _State.IN_MEMORY, None, adapter
        self.key, self.failure = adapter.key, None

    def fail(self, error: Exception, retry_s: float) -> None:
        """Note that it could not be read."""
        self.state, self.task = _State.UNLOADED, None
        self.failure, self.retry_s = error, retry_s

    def unload(self) -> None:
        """Drop the adapter from memory."""
        self.state, self.adapter = _State.UNLOADED, None

    def enter(self) -> None:
        """Add a user; while there is one, the adapter is not unloaded."""
        self.num_users += 1
        self.idle.clear()

    def leave(self) -> None:
        """Remove a user."""
        self.num_users -= 1
        if not self.num_users:
            self.idle.set()


class Lease:
    """A request's reference to an adapter, which stays in memory until the release."""

    __slots__ = ("_entry", "adapter")

    def __init__(self, entry: _Entry, adapter: Adapter) -> None:
        self.adapter = adapter
        self._entry: _Entry | None = entry
        entry.enter()

    def release(self) -> None:
        """Release the reference. Idempotent."""
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.leave()


class Adapters:
    """The adapters that requests may name; see the module's docstring.

    Args:
        load: Reads an adapter, in a thread; raises `ModelLoadError`.
        sources: Adapters that can be requested from the start.
        max_loaded: Maximum number of adapters in memory, including those being read.
        taken: Names that no adapter can have.
    """

    def __init__(
        self,
        load: Callable[[AdapterSource], Loaded],
        sources: Iterable[AdapterSource] = (),
        *,
        max_loaded: int,
        taken: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._max_loaded = max_loaded
        self._taken = frozenset(taken)
        self._clock = clock
        self._entries = {source.name: _Entry(source) for source in sources}
        self._nameless: set[_Entry] = set()  # will replace another once read, or leave once unused
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = itertools.count(1)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tgi-adapters")

    def start(self) -> asyncio.Task[None]:
        """Begin to read the given adapters; a failure affects only that adapter and is logged.

        All are read, even if memory holds fewer, to find out which of them cannot be served. The returned
        task ends when all have been read.
        """
        return self._spawn(self._read_in_turn(list(self._entries.values())))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Names that can be requested, in the order of arrival: in memory, or reloaded on request."""
        return list(self.keys)

    @property
    def keys(self) -> dict[str, str]:
        """The content key of each adapter in `names`."""
        return {name: entry.key for name, entry in self._entries.items() if entry.key is not None}

    @property
    def num_loaded(self) -> int:
        """Number of adapters in memory or being read, including those that leave once they are unused."""
        entries = (*self._entries.values(), *self._nameless)
        return sum(entry.state in (_State.READING, _State.IN_MEMORY) for entry in entries)

    async def lease(self, name: str) -> Lease:
        """Return a reference to an adapter, which is reloaded first if it was unloaded.

        Raises:
            UnknownAdapter: if there is none of that name.
            Unavailable: if it is being read for the first time, or reading it takes long.
            InvalidRequest: if it could not be read.
            Overloaded: if all adapters that memory may hold are in use.
        """
        entry = self._find(name, param="model")
        while entry.adapter is None:
            entry.enter()  # otherwise the next adapter that is read may unload it before this one goes on
            try:
                await self._wait(entry)
            finally:
                entry.leave()
            entry = self._find(name, param="model")  # it may have been removed or replaced
        entry.used = next(self._turns)
        return Lease(entry, entry.adapter)

    async def add(self, name: str, location: str) -> None:
        """Read an adapter; from then on it can be requested.

        Raises:
            InvalidRequest: if the name is taken, or the adapter could not be read.
            Overloaded: if all adapters that memory may hold are in use.
        """
        if name in self._entries or name in self._taken:
            raise InvalidRequest(f"The name '{name}' is taken", param="lora_name")
        entry = self._entries[name] = _Entry(AdapterSource(name, location))
        await self._finish(self._read_first(entry))
        _check(entry)

    async def replace(self, name: str, location: str) -> None:
        """Read an adapter that replaces the one of this name; return once the old one is no longer used.

        Until the new adapter has been read, or if it cannot be read, the name means the old one. If there is
        no old one, this is `add`.

        Raises:
            InvalidRequest: if it could not be read.
            Overloaded: if all adapters that memory may hold are in use; memory must hold both.
            UnknownAdapter: if the name was removed meanwhile.
        """
        if name not in self._entries:
            await self.add(name, location)
            return
        entry = _Entry(AdapterSource(name, location))
        self._nameless.add(entry)
        await self._finish(self._read_and_swap(entry))
        _check(entry)

    async def remove(self, name: str) -> None:
        """Remove an adapter at once for new requests; return when no request holds it any more.

        Raises:
            UnknownAdapter: if there is none of that name.
        """
        entry = self._find(name, param="lora_name")
        del self._entries[name]
        self._nameless.add(entry)
        await self._finish(self._leave(entry))

    def close(self) -> None:
        """Shut the thread down and cancel all pending work."""
        entries = (*self._entries.values(), *self._nameless)
        for task in (*self._tasks, *(entry.task for entry in entries)):
            if task is not None:
                task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _find(self, name: str, *, param: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownAdapter(name, param=param)
        return entry

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Await work that continues even if the awaiting task is cancelled."""
        await asyncio.shield(self._spawn(work))

    async def _read_in_turn(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            if self._entries.get(entry.source.name) is entry:
                await self._begin(entry)

    async def _read_first(self, entry: _Entry) -> None:
        """Read an adapter that already has its name, and take the name back if that fails."""
        try:
            await self._begin(entry)
        finally:
            if entry.key is None and self._entries.get(entry.source.name) is entry:
                del self._entries[entry.source.name]

    async def _read_and_swap(self, entry: _Entry) -> None:
        """Read an adapter, give it the name of another, and wait until that one is unused."""
        name = entry.source.name
        try:
            await self._begin(entry)
        finally:
            self._nameless.discard(entry)
        if entry.failure is not None:
            return
        old = self._entries.get(name)
        if old is None:
            entry.failure = UnknownAdapter(name, param="lora_name")
            return
        self._entries[name] = entry
        self._nameless.add(old)
        await self._leave(old)

    async def _leave(self, entry: _Entry) -> None:
        """Unload an adapter that has lost its name, once it is unused."""
        try:
            if entry.task is not None:
                await asyncio.wait({entry.task})
            await entry.idle.wait()
        finally:
            entry.unload()
            self._nameless.discard(entry)

    async def _wait(self, entry: _Entry) -> None:
        """Load an adapter that is not in memory; return once it is, or another adapter has its name.

        Raises:
            Unavailable, InvalidRequest, Overloaded: as `lease`.
        """
        if entry.is_read_first:
            raise Unavailable(f"The adapter '{entry.source.name}' is loading", retry_after_s=2)
        task = entry.task
        if task is None:
            if entry.failure is not None and self._clock() < entry.retry_s:
                raise _client_error(entry)
            task = self._begin(entry)
        await asyncio.wait({task}, timeout=_WAIT_S)
        if entry.adapter is None and self._entries.get(entry.source.name) is entry:
            if task.done() and entry.failure is not None:  # not that of an earlier attempt
                raise _client_error(entry)
            raise Unavailable(f"The adapter '{entry.source.name}' is loading", retry_after_s=2)

    def _begin(self, entry: _Entry) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._read(entry))
        entry.begin(task)
        return task

    async def _read(self, entry: _Entry) -> None:
        source, begun_s = entry.source, self._clock()
        try:
            self._unload_unused()
            loop = asyncio.get_running_loop()
            loaded = await loop.run_in_executor(self._executor, self._load, source)
        except Exception as error:
            entry.fail(error, self._clock() + (0.0 if isinstance(error, Overloaded) else _PAUSE_S))
            if isinstance(error, ModelLoadError):
                logger.error("adapter %r: %s", source.name, error)
            elif isinstance(error, Overloaded):
                logger.warning("adapter %r not loaded: all adapters in memory are in use", source.name)
            else:
                logger.exception("adapter %r could not be read", source.name)
            return
        key = loaded.digest.hex()
        entry.succeed(Adapter(source.name, key, self._shared(key, loaded.weights)))
        entry.used = next(self._turns)
        logger.info(
            "adapter %r: rank %d, %.1f MB, read in %.1f s",
            source.name, loaded.rank, loaded.num_bytes / 1e6, self._clock() - begun_s,
        )  # fmt: skip

    def _shared(self, key: str, weights: object) -> object:
        """Return the weights in memory with the same contents, if there are any: a step counts contents."""
        for entry in (*self._entries.values(), *self._nameless):
            if entry.adapter is not None and entry.adapter.key == key:
                return entry.adapter.weights
        return weights

    def _unload_unused(self) -> None:
        """Unload unused adapters until there is room for the one that is about to be read.

        Raises:
            Overloaded: if all are in use.
        """
        while self.num_loaded > self._max_loaded:
            unused = [
                entry for entry in self._entries.values() if entry.adapter is not None and not entry.num_users
            ]
            if not unused:
                raise Overloaded(f"All {self._max_loaded} adapters that memory may hold are in use")
            oldest = min(unused, key=lambda entry: entry.used)
            oldest.unload()
            logger.info("adapter %r unloaded; it is reloaded on request", oldest.source.name)


def _check(entry: _Entry) -> None:
    """Raise the reason why an adapter could not be read, if any; this one is for the administrator."""
    if isinstance(entry.failure, ModelLoadError):
        message = f"The adapter '{entry.source.name}' cannot be served: {entry.failure.message}"
        raise InvalidRequest(message, param="lora_path")
    if entry.failure is not None:
        raise entry.failure


def _client_error(entry: _Entry) -> Exception:
    """Return the error for a client; the reason, which may name files, is only in the log."""
    if isinstance(entry.failure, Overloaded):
        return Overloaded(entry.failure.message)
    return InvalidRequest(
        f"The adapter '{entry.source.name}' could not be loaded; the server's log says why",
        param="model",
        code="adapter_not_loaded",
    )
