"""The shards of a model: processes of this machine, each with a part of the weights and of the cache.

```text
 rank 0   HTTP, engine, plans, draws ─► step, head, blocks to copy ─┐   pipe: ready, or why not
 rank 1   (shard_worker.py)  its heads, columns and words  ◄────────┤   its end is seen by `Shards`
 rank 2   ...                                              ◄────────┘
          all: partial sums, logits, one barrier of all threads, in memory that all have mapped
```

Rank 0 is the server's own process, which starts the others; these know no plan, but compute the arrays that
the first has made of one. A process that ends is noticed by the end of its pipe, and ends them all.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ServedConfig
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.runner.drafts import MOST_PER_STEP
from tgi_asgi.runner.kv import KvSize, step_tokens
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

_END_S = 5.0  # that a process gets to end by itself


@dataclass(frozen=True, slots=True)
class ShardJob:
    """What a process must know to compute its part, as the first has chosen it."""

    files: ModelFiles
    settings: Settings
    cut: ModelCut
    is_exact: bool  # this and the next two: as `ops.Packing`
    quantise: str | None
    has_float_prompts: bool
    kv_size: KvSize
    longest: int  # tokens of a sequence
    memory: ops.ShardMemory

    @property
    def packing(self) -> ops.Packing:
        """The arithmetic of its products."""
        return ops.Packing(self.is_exact, self.quantise, has_float_prompts=self.has_float_prompts)


def cuts_of(opened: OpenModel, settings: Settings, *, is_on_gpu: bool) -> list[ModelCut]:
    """Return what each shard has of a model; none where it is whole.

    Raises:
        ModelLoadError: it, or what the settings ask for, is not computed by several shards.
    """
    count = settings.num_shard
    if count == 1:
        return []
    refused = (
        "several GPUs, which are not served as yet" if is_on_gpu
        else "adapters, which several shards do not compute" if settings.serves_adapters
        else None
    )  # fmt: skip
    if refused is not None:
        raise ModelLoadError(f"--num-shard {count} asks for {refused}: leave it out")
    return opened.cuts(count)


def repeats_of(cuts: Sequence[ModelCut]) -> float:
    """Return how often shards have each KV head, on average."""
    if not cuts:
        return 1.0
    return max(
        sum(len(cut.kv_heads) for cut in cuts) / max((cut.kv_heads.stop for cut in cuts), default=1), 1.0
    )


def jobs_of(
    config: ServedConfig, files: ModelFiles, settings: Settings, cuts: Sequence[ModelCut],
    packing: ops.Packing, kv_size: KvSize, longest: int,
) -> list[ShardJob]:  # fmt: skip
    """Return what each process must know, the first's own included."""
    drafts = 0 if settings.speculation is None else MOST_PER_STEP
    memory = ops.ShardMemory(
        count=len(cuts), num_threads=ops.num_threads(), num_columns=config.hidden_size,
        max_tokens=step_tokens(settings), max_sequences=settings.max_batch_size,
        max_rows=settings.max_batch_size + drafts, vocab_size=config.vocab_size,
        num_groups=len(kv_size.windows), table_width=-(-longest // kv_size.block_size),
    )  # fmt: skip
    return [
        ShardJob(
            files, settings, cut, packing.is_exact, packing.quantise, packing.has_float_prompts, kv_size,
            longest, memory,
        )
        for cut in cuts
    ]  # fmt: skip


class Shards:
    """The other processes, and the memory that all share.

        shards = Shards(jobs)             # they begin to load
        shards.wait_ready()
        runner = CpuRunner(model, ..., shards=shards)

    Attributes:
        shard: what this process's program must know.
        processes: the others, once they have been started.
        on_lost: called once, from a thread, with the reason, when a process has ended before `close`.

    Raises:
        ModelLoadError: the system has no memory to share.
    """

    def __init__(self, jobs: Sequence[ShardJob]) -> None:
        first = jobs[0]
        try:
            self._fd = first.memory.create()
            group = first.memory.open(self._fd, 0)
        except (OSError, RuntimeError, AttributeError) as error:  # AttributeError: no memfd, as on macOS
            raise ModelLoadError(
                f"--num-shard: there is no memory that processes could share: {error}"
            ) from error
        self.shard = ops.Shard(group, first.cut.words.start)
        self.on_lost: Callable[[str], None] | None = None
        self._jobs = jobs[1:]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._told: queue.Queue[str | None] = queue.Queue()
        self._lock = threading.Lock()  # of what follows
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
        """Have this called when a process ends: at once if one has."""
        with self._lock:
            self.on_lost, reason = on_lost, self._reason
        if reason is not None:
            on_lost(reason)

    def close(self) -> None:
        """Let the others end, once no step runs, and wait for them. Idempotent."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        if not self.shard.group.is_given_up:
            self.shard.group.end()
        self._end_processes()

    def abandon(self) -> None:
        """End the others at once: this process will not serve."""
        with self._lock:
            self._is_closing = True
        self.shard.group.give_up()
        for process in self.processes:
            process.kill()
        self._end_processes()

    def _end_processes(self) -> None:
        for process in self.processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        """Start the processes; hear what they tell, and when they end. A thread's whole life."""
        ranks: dict[Connection, int] = {}
        for job in self._jobs:
            try:
                ranks[self._start(job)] = job.cut.rank
            except OSError as error:
                self._told.put(f"shard {job.cut.rank} cannot be started: {error}")
        os.close(self._fd)
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                try:
                    self._told.put(connection.recv())
                except (EOFError, OSError):
                    self._lose(ranks.pop(connection))
        for process in self.processes:
            process.wait()

    def _start(self, job: ShardJob) -> Connection:
        ours, theirs = Pipe()
        try:
            self.processes.append(
                subprocess.Popen(
                    # -P: what lies in the current folder is not to be found first.
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "tgi_asgi.runner.shard_worker",
                        str(theirs.fileno()),
                        str(self._fd),
                    ],
                    pass_fds=(theirs.fileno(), self._fd),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            )
        finally:
            theirs.close()
        ours.send(os.getpid())
        ours.send(job)
        return ours

    def _lose(self, rank: int) -> None:
        """Give the group up, as one of it has ended; who is told first learns why steps fail."""
        reason = f"shard {rank} of the model has ended"
        with self._lock:
            if self._is_closing or self._reason is not None:
                return
            self._reason, on_lost = reason, self.on_lost
        logger.critical(reason)
        self._told.put(reason)
        if on_lost is not None:
            on_lost(reason)
        self.shard.group.give_up()
