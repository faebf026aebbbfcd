"""Host time of a GPU's steps: the time to launch operators that do nothing, and the parts of decode steps.

    python -m bench.gpu_host [--batch 32] [--prompt 512] [--weights int4] [--context 131072] [--pause-ms 4]
                             [--busy-us 500]
    python -m bench.gpu_host --gpu          # the parts of decode steps, with a GPU and its driver

The first needs no GPU, only g++: csrc/bindings/cuda is compiled together with operators, copies and graphs
that cost nothing. Prints one JSON object: the number of operators in a mixed step of Llama-3-8B's shape and
the median microseconds to launch them all; and for decode steps of 1 to 256 sequences the medians, with
quartiles, of preparing the step on the event loop (`push`), from the plan until the device has the step
(`reach`), and until the engine has its result (`turn`), on a device that takes no time. `--context` is the
length of their sequences; `bytes` is the median of what a step uploads. On a GPU, `submit` is what copies and
graphs take on the launcher's thread. With `--busy-us`, the event loop has other work for that long after each
plan, as for the tokens of the step before. With `--pause-ms`, nothing happens for that long after each step,
as while a GPU computes; the next step then takes several times as long, probably because caches are cold.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import importlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bench import gpu_model, gpu_prepared, gpu_timing
from bench.engine import Engine
from bench.gpu_model import SHAPE, StepKind
from tests.emulation import program
from tgi_asgi.ops.cuda_kv import CudaKvFormat
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.ops.step_limits import StepLimits
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import Command, Copy, CudaDevice, Device, Event, Prepared
from tgi_asgi.runner.cuda_steps import CudaStepSpec
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.load import LoadedModel

# An operator returns the tensor that it has written, if any.
_NOTHING = """
#include <time.h>
#include <torch/library.h>

extern "C" {
__attribute__((visibility("default"))) int64_t reached_ns;  // when the device had the last graph

__attribute__((visibility("default"))) void note_reach() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  reached_ns = now.tv_sec * 1000000000LL + now.tv_nsec;
}
}

namespace {

void do_nothing(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  c10::IValue written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) written = (*stack)[first + i];
  }
  stack->resize(first);
  if (!op.schema().returns().empty()) stack->push_back(std::move(written));
}

}  // namespace
"""
_TORCH_S = ("mm.out", "mm.dtype_out", "addmm.dtype_out", "add_.Tensor", "copy_")
_SIZED = ("attention_workspace_bytes", "sample_workspace_bytes", "experts_max_tiles")
_BATCHES = (1, 16, 64, 256)
_CHUNK = 1024
# A decode step's time on the host depends only on the number of kernels in its graphs.
_NARROW = dataclasses.replace(SHAPE, hidden_size=256, intermediate_size=256, num_heads=4, num_kv_heads=1)


class NoDevice:
    """A `Device` whose copies are the host's, and whose graphs are empty.

    Attributes:
        uploaded: Bytes of the inputs of the step that was prepared last.
    """

    backend: ClassVar[str] = "gloo"

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cpu")
        self.uploaded = 0
        self._extension: Any = importlib.import_module("tgi_asgi._cuda")
        library = ctypes.CDLL(self._extension.__file__)
        self._graph = ctypes.cast(library.note_reach, ctypes.c_void_p).value
        self._reached_ns = ctypes.c_int64.in_dll(library, "reached_ns")

    @property
    def reached_s(self) -> float:
        """When a graph reached the device last, by `time.perf_counter`."""
        return self._reached_ns.value / 1e9

    @staticmethod
    def count() -> int:
        return 1

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def event(self) -> Event:
        event: Event = self._extension.Event()
        return event

    def submit(self, commands: Sequence[Command]) -> None:
        self._extension.submit(commands)

    def prepared(self, commands: Sequence[Command]) -> Prepared:
        inputs = itertools.takewhile(lambda command: isinstance(command, Copy), commands)
        self.uploaded = sum(cast(Copy, copy).num_bytes for copy in inputs)
        prepared: Prepared = self._extension.Prepared(commands)
        return prepared

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        graph: Callable[[], None] = self._extension.Graph(None, self._graph)
        return graph

    def enter_thread(self) -> None:
        torch.set_num_threads(1)

    def is_lost(self, error: Exception) -> bool:
        return False

    def limit_memory(self, share: float) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 30

    def peak_bytes(self, call: Callable[[], object]) -> int:
        return 0


def _module(names: list[str]) -> str:
    def registered(library: str, operators: Sequence[str], backend: str) -> str:
        implement = "torch::CppFunction::makeFromBoxedFunction<&do_nothing>()"
        lines = [f'  m.impl("{name}", {implement});' for name in operators]
        return "\n".join([f"TORCH_LIBRARY_IMPL({library}, {backend}, m) {{", *lines, "}"])

    of_ours = [registered("tgi_cuda", names, backend) for backend in ("Meta", "CPU")]
    return "\n".join([program.MODULE, _NOTHING, *of_ours, registered("aten", _TORCH_S, "Meta")])


def install() -> torch.library.Library:
    """Register operators that do nothing; they are there as long as the returned library."""
    definitions = torch.library.Library("tgi_cuda", "DEF")
    schemas = program.schemas()
    for schema in schemas:
        definitions.define(schema)
    for sized in _SIZED:
        definitions.impl(sized, lambda *sizes: 1024, "CompositeExplicitAutograd")
    switch = "set_dependent_launches"
    definitions.impl(switch, lambda is_on: None, "CompositeExplicitAutograd")
    names = [schema.partition("(")[0] for schema in schemas]
    program.install(_module([name for name in names if name not in (*_SIZED, switch)]))
    return definitions


def time_operators(options: argparse.Namespace) -> dict[str, Any]:
    """Time the launches of a mixed step."""
    gpu_timing.DEVICE = torch.device("meta")
    config = dataclasses.replace(SHAPE, layers=SHAPE.layers[:1] * options.layers)
    step = gpu_model.make_step(StepKind(options.batch, 1024, options.weights, prompt=options.prompt), config)
    for _ in range(20):
        step.call()
    times: list[float] = []
    for _ in range(options.steps):
        gpu_prepared.timed(times, step.call)()
    row = {"layers": options.layers, "batch": options.batch, "prompt": options.prompt}
    return row | {"weights": options.weights, "operators": step.num_calls, "us": _median(times)[1]}


def time_decodes(
    device: Device, layers: int, steps: int, context: int, pause_s: float = 0.0, busy_s: float = 0.0
) -> list[dict[str, Any]]:
    """Time the parts of decode steps, one step in flight, with a pause after each."""
    config = dataclasses.replace(_NARROW, layers=SHAPE.layers[:1] * layers)
    gpu_timing.DEVICE = device.device
    batch, longest = max(_BATCHES), context + steps + 64
    needs = BlockNeeds((None,), gpu_model.BLOCK, longest)
    size = KvSize((batch + 1) * -(-longest // gpu_model.BLOCK), needs, 1, "bfloat16")
    limits = StepLimits(max_tokens=_CHUNK, max_sequences=batch, max_rows=batch, max_context=longest)
    spec = CudaStepSpec(limits, CudaModes(), CudaKvFormat(gpu_model.BLOCK, torch.bfloat16))
    runner = CudaRunner(gpu_model.RandomLlama(config, longest), device, lambda free: size, spec)
    times: dict[str, list[float]] = {"push": [], "reach": [], "turn": []}
    if isinstance(device, NoDevice):
        gpu_prepared.watch_pushes(runner, times["push"])
    else:
        times = {"push": [], "submit": [], "turn": []}
        gpu_prepared.watch(runner, times["push"], times["submit"])
    try:
        return asyncio.run(_decode(runner, device, steps, context, times, pause_s, busy_s))
    finally:
        runner.close()


async def _decode(
    runner: CudaRunner,
    device: Device,
    steps: int,
    context: int,
    times: dict[str, list[float]],
    pause_s: float,
    busy_s: float,
) -> list[dict[str, Any]]:
    info = SimpleNamespace(vocab_size=SHAPE.vocab_size)
    engine, rows = Engine(cast(LoadedModel, SimpleNamespace(runner=runner, info=info))), []
    for batch in _BATCHES:
        sequences = engine.sequences(batch, _CHUNK, context - _CHUNK + steps + 20)
        await engine.prefill(sequences, _CHUNK)
        for sequence in sequences:  # their tables are longer; what the cache holds takes no time
            sequence.num_computed = context
        await engine.decode(sequences, 20)
        for part in times.values():
            part.clear()
        uploaded: list[int] = []
        for _ in range(steps):
            rows_of_step = engine.decode_rows(sequences)
            start = time.perf_counter()
            future = engine.submit(rows_of_step, [])
            _be_busy(busy_s)
            await future
            times["turn"].append(time.perf_counter() - start)
            if isinstance(device, NoDevice):
                times["reach"].append(device.reached_s - start)
                uploaded.append(device.uploaded)
            await asyncio.sleep(pause_s)
        row: dict[str, Any] = {"batch": batch, "context": context}
        if uploaded:
            row["bytes"] = int(statistics.median(uploaded))
        rows.append(row | {part: _median(us) for part, us in times.items()})
    return rows


def _be_busy(seconds: float) -> None:
    """Hold the GIL as Python does: until another thread asks for it."""
    ends_at = time.perf_counter() + seconds
    while time.perf_counter() < ends_at:
        pass


def _median(times: list[float]) -> list[float]:
    """Return the quartiles in microseconds; the second is the median."""
    return [round(quartile * 1e6, 1) for quartile in statistics.quantiles(times, n=4)]


def main() -> None:
    """Time a mixed step and decode steps, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--busy-us", type=float, default=0.0)
    parser.add_argument("--gpu", action="store_true", help="decode steps, with a GPU")
    options = parser.parse_args()
    given = (options.steps, options.context, options.pause_ms / 1e3, options.busy_us / 1e6)
    if options.gpu:
        print(json.dumps({"decode": time_decodes(CudaDevice(), options.layers, *given)}))
        return
    kept = install()
    decodes = time_decodes(NoDevice(), 1, *given)
    print(json.dumps(time_operators(options) | {"decode": decodes}))
    del kept


if __name__ == "__main__":
    main()
