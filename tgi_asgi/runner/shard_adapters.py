"""LoRA adapters of a model that is split: each shard reads the same files, and keeps its own part.

```text
 shard 0   number, directory ──► pipe ──►  shards 1 … N - 1: a thread reads the files, keeps its part
   │  reads them, too                        │
   │  digest and size, or the reason  ◄──────┘
   ▼  if all have succeeded, steps may name the adapter by its number
   ·
   ▼  shard 0's part has no user left ──►    drops its part
```

A number is never given to another adapter. `OtherAdapters` and `SplitAdapterLoader` are shard 0's side,
`follow_adapters` is that of the others.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import socket
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.adapters import AdapterLoader, LoadedAdapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Load:
    """Read an adapter and keep this shard's part; answered by a `_Part`, or by the reason why not."""

    number: int
    directory: Path


@dataclass(frozen=True, slots=True)
class _Drop:
    """Drop the part of an adapter, if there is one. Not answered."""

    number: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What a shard has read."""

    digest: bytes
    num_bytes: int


_Answers = Future[list[_Part]]


class OtherAdapters:
    """The parts of adapters that shards other than shard 0 keep.

        others = OtherAdapters(num_others)        # others.descriptors go to the shards, in order of ranks
        parts = others.load(7, Path("/adapters/sql")).result()
        others.drop(7)

    Attributes:
        descriptors: The other ends of the pipes; whoever starts the shards closes them.
    """

    def __init__(self, num_others: int) -> None:
        pairs = [socket.socketpair() for _ in range(num_others)]
        self._connections = [Connection(ours.detach()) for ours, _ in pairs]
        self.descriptors = [theirs.detach() for _, theirs in pairs]
        self._lock = threading.Lock()  # nothing is queued after the end
        self._is_closed = False
        # Reentrant: the garbage collector may call `drop` anywhere. None: the end.
        self._work: queue.SimpleQueue[tuple[_Load, _Answers] | _Drop | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="tgi-shard-adapters", daemon=True).start()

    def load(self, number: int, directory: Path) -> _Answers:
        """Let all other shards read an adapter; the future fails with `ModelLoadError` if one cannot."""
        answers: _Answers = Future()
        with self._lock:
            if self._is_closed:
                raise ModelLoadError("the shards of the model have ended")
            self._work.put((_Load(number, directory), answers))
        return answers

    def drop(self, number: int) -> None:
        """Let them drop an adapter, after what was called before. Any thread may call this."""
        self._work.put(_Drop(number))

    def close(self) -> None:
        """Close the pipes once the shards have ended. Idempotent."""
        with self._lock:
            self._is_closed = True
        self._work.put(None)

    def _run(self) -> None:
        """Send messages and receive their answers. The body of a thread."""
        while (work := self._work.get()) is not None:
            if isinstance(work, _Drop):
                for connection in self._connections:
                    with contextlib.suppress(OSError):  # the shard has ended
                        connection.send(work)
                continue
            message, answers = work
            try:
                answers.set_result(self._ask(message))
            except ModelLoadError as error:
                answers.set_exception(error)
        for connection in self._connections:
            connection.close()

    def _ask(self, message: _Load) -> list[_Part]:
        """Return every shard's answer; all are received, even if one has failed.

        Raises:
            ModelLoadError: with the reason of the first that has failed.
        """
        parts, failures = list[_Part](), list[str]()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # noticed below
                connection.send(message)
        for rank, connection in enumerate(self._connections, 1):
            try:
                answer: _Part | str = connection.recv()
            except (EOFError, OSError):
                answer = "it has ended"
            if isinstance(answer, _Part):
                parts.append(answer)
            else:
                failures.append(f"shard {rank} of the model: {answer}")
        if failures:
            raise ModelLoadError(failures[0])
        return parts


class SplitAdapterLoader:
    """Loads adapters in all shards of a model; used like an `AdapterLoader`.

    Attributes:
        layout: Layout of shard 0's parts.
    """

    def __init__(self, own: AdapterLoader[Any], others: OtherAdapters) -> None:
        self._own, self._others = own, others
        self.layout: Any = own.layout
        self._numbers = itertools.count(1)

    def load(self, directory: Path) -> LoadedAdapter:
        """Read an adapter's directory in all shards at the same time.

        The other shards drop their parts when nothing refers to the returned weights any more.

        Raises:
            ModelLoadError: as `AdapterLoader.load`, or if shards have read different files; then no shard
                keeps it.
        """
        directory, number = directory.absolute(), next(self._numbers)
        answers = self._others.load(number, directory)
        try:
            loaded = self._own.load(directory, number)
            parts = answers.result()
            if any(part.digest != loaded.digest for part in parts):
                raise ModelLoadError(f"{directory}: the files changed while they were read")
        except BaseException:
            self._others.drop(number)
            raise
        weakref.finalize(loaded.weights, self._others.drop, number).atexit = False
        return replace(loaded, num_bytes=loaded.num_bytes + sum(part.num_bytes for part in parts))


def follow_adapters(
    descriptor: int, loader: AdapterLoader[Any], keep: Callable[[Any], None], drop: Callable[[int], None]
) -> None:
    """Start the thread of a shard other than shard 0 that reads and drops adapters as shard 0 says.

    Args:
        descriptor: One of `OtherAdapters.descriptors`.
        keep: Keeps what `loader` has read, for steps that name it.
        drop: Drops the adapter of a number, if there is one.
    """

    def run() -> None:
        with Connection(descriptor) as connection, contextlib.suppress(EOFError, OSError):
            while True:  # until shard 0 ends
                message: _Load | _Drop = connection.recv()
                if isinstance(message, _Drop):
                    drop(message.number)
                else:
                    connection.send(_answer(message, loader, keep))

    threading.Thread(target=run, name="tgi-adapters", daemon=True).start()


def _answer(message: _Load, loader: AdapterLoader[Any], keep: Callable[[Any], None]) -> _Part | str:
    try:
        loaded = loader.load(message.directory, message.number)
        keep(loaded.weights)
    except ModelLoadError as error:
        return error.message
    except Exception as error:  # such as too little memory: only this adapter fails
        logger.exception("an adapter could not be read")
        return repr(error)
    return _Part(loaded.digest, loaded.num_bytes)
