"""Starts, watches and ends the other shards of a model that is split over several processes of this machine.

```text
 shard 0   HTTP, engine, plans, sampling ─► the inputs of each step ─┐   pipe: ready, or the error
 shard 1   (shard_worker.py)  its heads, columns, vocabulary ◄───────┤   its end of file shows a lost shard
 shard 2   ...                                              ◄────────┘
```

A shard is a part of the model and the process that computes it; its rank is its number. Shard 0 is the server
itself. It starts the others, notices that one has ended by the end of file on its pipe, and then ends all of
them. `shards.py` and `cuda_shards.py` add what the shards on CPUs and on GPUs have in common.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Protocol

from tgi_asgi.errors import ModelLoadError

logger = logging.getLogger(__name__)

_END_S = 5.0  # time that a shard gets to exit by itself


class ShardJob(Protocol):
    """What a shard needs to know to compute its part; it is pickled and sent over the pipe."""

    @property
    def rank(self) -> int:
        """The shard's number."""

    @property
    def descriptors(self) -> Sequence[int]:
        """File descriptors that the shard inherits from this process."""

    def load(self, connection: Connection) -> Callable[[], None]:
        """Load the part; return the function that computes, driven by the pipe, until shard 0 stops it.

        Raises:
            ModelLoadError: if a tensor is missing or does not fit.
        """


class ShardProcesses:
    """The processes of all shards except shard 0.

        processes = ShardProcesses(jobs, give_up)        # they begin to load
        processes.wait_ready()
        processes.watch(on_lost)

    Args:
        give_up: Called once when a shard has ended prematurely; it must release everything that waits for
            that shard.

    Attributes:
        processes, connections: Of the shards started so far; `connections` in the order of ranks.
    """

    def __init__(self, jobs: Sequence[ShardJob], give_up: Callable[[str], None]) -> None:
        self._jobs, self._give_up = jobs, give_up
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self._reasons: queue.Queue[str | None] = queue.Queue()  # why a shard failed; None: it is ready
        self._lock = threading.Lock()  # protects the following attributes
        self._on_lost: Callable[[str], None] | None = None
        self._reason: str | None = None
        self._is_closing = False
        # PR_SET_PDEATHSIG kills a process when the thread that started it ends; this thread outlives them.
        self._thread = threading.Thread(target=self._watch, name="tgi-shards", daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        """Wait until all shards have loaded their parts.

        Raises:
            ModelLoadError: if one has failed, with its reason.
        """
        for _ in self._jobs:
            reason = self._reasons.get()
            if reason is not None:
                raise ModelLoadError(reason)

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call `on_lost` with the reason, from a thread, when a shard ends; at once if one already has."""
        with self._lock:
            self._on_lost, reason = on_lost, self._reason
        if reason is not None:
            on_lost(reason)

    def begin_to_close(self) -> bool:
        """Treat ending shards as expected from now on; return whether this is the first call."""
        with self._lock:
            was_closing, self._is_closing = self._is_closing, True
        return not was_closing

    def end(self) -> None:
        """Wait for the shards, which were asked to end, and kill those that do not."""
        for process in self.processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self) -> None:
        """Kill the shards at once; this process will not serve."""
        with self._lock:  # `_watch` starts none from now on
            self._is_closing = True
        for process in self.processes:
            process.kill()
        self.end()

    def _watch(self) -> None:
        """Start the shards, forward their messages and notice their end. The body of a thread."""
        ranks: dict[Connection, int] = {}
        for job in self._jobs:
            try:
                with self._lock:
                    if self._is_closing:
                        break
                    ranks[self._start(job)] = job.rank
            except OSError as error:
                self._reasons.put(f"shard {job.rank} cannot be started: {error}")
        for descriptor in {each for job in self._jobs for each in job.descriptors}:
            os.close(descriptor)
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                try:
                    self._reasons.put(connection.recv())
                except (EOFError, OSError):
                    self._lose(ranks.pop(connection))
        for process in self.processes:
            process.wait()

    def _start(self, job: ShardJob) -> Connection:
        ours, theirs = Pipe()
        # -P: do not find modules in the current directory first.
        command = [sys.executable, "-P", "-m", "tgi_asgi.runner.shard_worker", str(theirs.fileno())]
        try:
            self.processes.append(
                subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(), *job.descriptors),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            )
        finally:
            theirs.close()
        ours.send(os.getpid())
        ours.send(job)
        self.connections.append(ours)
        return ours

    def _lose(self, rank: int) -> None:
        """Give up the group after a shard ended; `on_lost` is called first, so that the cause is known."""
        reason = f"shard {rank} of the model has ended"
        with self._lock:
            if self._is_closing or self._reason is not None:
                return
            self._reason, on_lost = reason, self._on_lost
        logger.critical(reason)
        self._reasons.put(reason)
        if on_lost is not None:
            on_lost(reason)
        self._give_up(reason)
