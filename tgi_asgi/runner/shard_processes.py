"""The processes of this machine that compute a model together with the server: started, watched, ended.

```text
 rank 0   HTTP, engine, plans, draws ─► what they need for a step ──┐   pipe: ready, or why not
 rank 1   (shard_worker.py)  its heads, columns and words  ◄────────┤   its end is seen here
 rank 2   ...                                              ◄────────┘
```

Rank 0 is the server's own process, which starts the others. A process that ends is noticed by the end of its
pipe, and ends them all. `shards.py` and `cuda_shards.py` have what CPUs and GPUs share beside.
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

_END_S = 5.0  # that a process gets to end by itself


class ProcessJob(Protocol):
    """What a process must know to compute its part; it is pickled on its way there."""

    @property
    def rank(self) -> int:
        """Which shard it is."""

    @property
    def descriptors(self) -> Sequence[int]:
        """The descriptors that it has from here."""

    def load(self, connection: Connection) -> Callable[[], None]:
        """Load the part; return what computes until rank 0 wants no more, by what comes over the pipe.

        Raises:
            ModelLoadError: a tensor is missing, or does not fit.
        """


class ShardProcesses:
    """The processes of all ranks but the first.

        processes = ShardProcesses(jobs, give_up)        # they begin to load
        processes.wait_ready()
        processes.watch(on_lost)

    Args:
        give_up: called once, when a process has ended before its time: nothing may wait for it any more.

    Attributes:
        processes, connections: once they have been started; those of `connections` in the order of ranks.
    """

    def __init__(self, jobs: Sequence[ProcessJob], give_up: Callable[[str], None]) -> None:
        self._jobs, self._give_up = jobs, give_up
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self._told: queue.Queue[str | None] = queue.Queue()
        self._lock = threading.Lock()  # of what follows
        self._on_lost: Callable[[str], None] | None = None
        self._reason: str | None = None
        self._is_closing = False
        # A process is killed with the thread that has started it (PR_SET_PDEATHSIG): this one outlives them.
        self._thread = threading.Thread(target=self._watch, name="tgi-shards", daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        """Wait until all have loaded their parts.

        Raises:
            ModelLoadError: one has not, for the reason that it gives.
        """
        for _ in self._jobs:
            reason = self._told.get()
            if reason is not None:
                raise ModelLoadError(reason)

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Have this called with the reason, from a thread, when a process ends: at once if one has."""
        with self._lock:
            self._on_lost, reason = on_lost, self._reason
        if reason is not None:
            on_lost(reason)

    def begin_to_close(self) -> bool:
        """Take it from now on that processes end; return whether that is new."""
        with self._lock:
            was_closing, self._is_closing = self._is_closing, True
        return not was_closing

    def end(self) -> None:
        """Wait for those that have been told to end, and kill those that do not."""
        for process in self.processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self) -> None:
        """End them at once: this process will not serve."""
        for process in self.processes:
            process.kill()
        self.end()

    def _watch(self) -> None:
        """Start the processes; hear what they tell, and when they end. A thread's whole life."""
        ranks: dict[Connection, int] = {}
        for job in self._jobs:
            try:
                ranks[self._start(job)] = job.rank
            except OSError as error:
                self._told.put(f"shard {job.rank} cannot be started: {error}")
        for descriptor in {each for job in self._jobs for each in job.descriptors}:
            os.close(descriptor)
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                try:
                    self._told.put(connection.recv())
                except (EOFError, OSError):
                    self._lose(ranks.pop(connection))
        for process in self.processes:
            process.wait()

    def _start(self, job: ProcessJob) -> Connection:
        ours, theirs = Pipe()
        # -P: what lies in the current folder is not to be found first.
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
        """Give the group up, as one of it has ended; who is told first learns why steps fail."""
        reason = f"shard {rank} of the model has ended"
        with self._lock:
            if self._is_closing or self._reason is not None:
                return
            self._reason, on_lost = reason, self._on_lost
        logger.critical(reason)
        self._told.put(reason)
        if on_lost is not None:
            on_lost(reason)
        self._give_up(reason)
