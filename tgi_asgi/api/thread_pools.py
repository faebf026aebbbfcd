"""Threads for slow work of requests, and the turns in which API keys get them."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ThreadPool:
    """Threads for one purpose, to which the event loop delegates slow work."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix=f"tgi-{name}")
        self._queue = FairQueue(2 * size)  # so that no thread waits for the event loop between two calls

    def begin(self) -> None:
        """Start all threads; otherwise each starts when it is first needed.

        Raises:
            RuntimeError: if the system does not allow so many.
        """
        gate = threading.Event()
        try:
            for _ in range(self._size):
                self._executor.submit(gate.wait)
        finally:
            gate.set()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in one of the threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, _cleared, lambda: function(*args, **kwargs))

    async def run_for(
        self, tenant: str | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function in one of the threads; tenants take turns, whoever has asked more often."""
        await self._queue.enter(tenant)
        try:
            return await self.run(function, *args, **kwargs)
        finally:
            self._queue.leave()

    def start(self, function: Callable[[], None]) -> None:
        """Call a function in one of the threads; nobody waits for it."""
        with suppress(RuntimeError):  # the threads have ended already, and the process will
            self._executor.submit(function)

    def free(self, objects: list[object]) -> None:
        """Free objects in a thread; half a million small ones take 40 ms."""
        self.start(objects.clear)

    def close(self, *, waits: bool = False) -> None:
        """Shut down the threads; drop queued work."""
        self._executor.shutdown(wait=waits, cancel_futures=True)


def _cleared(work: Callable[[], T]) -> T:
    """Run some work; if it fails, free its frames' objects in this thread, not in the event loop.

    Raises:
        RuntimeError: for a panic in a library written in Rust, such as `tokenizers`: it is not an
            `Exception`, which is what a failed request's handlers catch.
    """
    try:
        return work()
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise
    except BaseException as panic:
        traceback.clear_frames(panic.__traceback__)
        raise RuntimeError(f"{type(panic).__name__}: {panic}") from panic


class FairQueue:
    """Lets a few callers work at a time; those of different tenants take turns, and wait in order within one.

        await queue.enter(tenant)
        try:
            ...
        finally:
            queue.leave()

    Otherwise a key that sends a hundred requests, each of which takes a second, would keep the next key's
    request waiting for all of them.
    """

    def __init__(self, max_active: int) -> None:
        self._num_free = max_active  # if any, nobody waits
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}  # in the order of their turns

    async def enter(self, tenant: str | None) -> None:
        """Wait for this caller's turn."""
        if self._num_free:
            self._num_free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # its turn has come meanwhile
                self.leave()
            raise

    def leave(self) -> None:
        """End a caller's work; the next tenant's first caller that still waits has its turn."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            callers = self._waiting[tenant]
            future = callers.popleft()
            is_turn = not future.done()  # those that were cancelled use up no turn of their tenant
            if is_turn or not callers:
                del self._waiting[tenant]
            if is_turn:
                if callers:
                    self._waiting[tenant] = callers  # after all others
                future.set_result(None)
                return
        self._num_free += 1
