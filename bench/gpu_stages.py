"""The stages of bench/gpu.py, each run as a process of its own: `python -m bench.gpu_stages STAGE REPORT`.

Times are medians of CUDA events over inputs that rotate past the L2 cache.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROOT = Path(__file__).parents[1]
_L2_BYTES = 256 << 20  # more than any cache: inputs together are at least this
_RUNS = 21
Report = Callable[[str, Any], None]
DEVICE = torch.device("cuda")
STEPS = (  # sequences, context, weights
    (1, 1024, "bf16"), (64, 1024, "bf16"), (256, 1024, "bf16"), (16, 1024, "bf16"), (16, 8192, "bf16"),
    (1, 1024, "int4"), (16, 1024, "int4"), (1, 8192, "bf16"),
)  # fmt: skip


def build(report: Report) -> None:
    """Build the extension for the GPU that is there."""
    start = time.monotonic()
    environment = os.environ | {"TGI_CUDA": "1", "MAX_JOBS": str(os.cpu_count())}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=_ROOT, env=environment, check=True)
    report("build", {"s": round(time.monotonic() - start, 1)})


def ptxas(report: Report) -> None:
    """Say what the assembler made of each kernel."""
    from tests.cuda import nvcc_check

    nvcc = nvcc_check.find_nvcc()
    assert nvcc is not None, "there is no nvcc"
    kernels, complaints = nvcc_check.compile_all(nvcc)
    rows = [
        {
            "kernel": kernel.name, "arch": kernel.architecture, "regs": kernel.registers,
            "smem": kernel.shared_bytes, "spill": kernel.spill_bytes,
        }
        for kernel in kernels
    ]  # fmt: skip
    report("build", {"ptxas": rows})
    assert not complaints, complaints[0]


def ceilings(report: Report) -> None:
    """Measure what the device can do: copying, reading, multiplying."""
    properties = torch.cuda.get_device_properties(0)
    report(
        "device",
        {
            "name": properties.name, "sms": properties.multi_processor_count, "l2": properties.L2_cache_size,
            "torch": torch.__version__, "cuda": torch.version.cuda,
        },
    )  # fmt: skip
    report("ceilings", measure_ceilings())


def measure_ceilings() -> dict[str, float]:
    """Return bytes a second of copying (read and written) and reading, and FLOP a second in bfloat16."""
    big = torch.randn(1 << 28, device=DEVICE)
    other = torch.empty_like(big)
    copy_us = time_us([lambda: other.copy_(big)])[0]
    read_us = time_us([lambda: big.sum()])[0]
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_us = time_us([lambda: torch.mm(a, b)])[0]
    return {
        "copy": 2 * big.nbytes / copy_us * 1e6,
        "read": big.nbytes / read_us * 1e6,
        "bf16": 2 * 8192**3 / product_us * 1e6,
    }


def checks(report: Report) -> None:
    """Hold every operator to its float64 reference on real sizes.

    A row's `worst_rel` is what came nearest to its limit, `tol`: of a whole tensor, its worst element against
    the largest, or a probability. A limit of 0 is equality.
    """
    from tests.cuda import cases
    from tests.cuda.gpu_device import GpuDevice
    from tests.reference.compare import measured

    torch.manual_seed(0)
    device, failed = GpuDevice(DEVICE), 0
    everything = sorted((*cases.small(), *cases.large()), key=_kind)
    for (operator, dtype), members in itertools.groupby(everything, key=_kind):
        whys, calls = [], [check for _, _, check in members]
        with measured() as distances:
            for check in calls:
                try:
                    check(device)
                except Exception as error:
                    whys.append(str(error)[:300])
        failed += len(whys)
        row = {"op": operator, "dtype": dtype, "cases": len(calls), "ok": not whys}
        report("checks", row | _nearest(distances) | {"why": whys[0] if whys else None})
    assert not failed, f"{failed} cases failed"


def _nearest(distances: Sequence[Any]) -> dict[str, float | None]:
    """Return the distance that came nearest to its limit, or beyond; None where it is no number."""
    if not distances:
        return {"worst_rel": None, "tol": None}
    nearest = max(distances, key=lambda distance: (distance.share, distance.limit))
    error = float(f"{nearest.error:.3g}")
    return {"worst_rel": error if math.isfinite(error) else None, "tol": float(f"{nearest.limit:.3g}")}


def _kind(case: Any) -> tuple[str, str]:
    return case[0], str(case[1]).removeprefix("torch.")


def operators(report: Report) -> None:
    """Time each kernel in Llama-3-8B's shapes against its floor, and against the fastest peer that runs."""
    from bench.gpu_operators import measurements

    limits = measure_ceilings()
    for name, shape, num_bytes, kind, calls, peers in measurements():
        us, spread = time_us(calls)
        floor = num_bytes / limits[kind] * 1e6
        row = {"op": name, "shape": shape, "us": round(us, 2), "spread": round(spread, 3), "bytes": num_bytes}
        row |= {"floor_us": round(floor, 2), "of_floor": round(floor / us, 3)}
        report("ops", row | compare(us, peers))


def compare(us: float, peers: dict[str, Callable[[], object]]) -> dict[str, Any]:
    """Time the peers of a kernel; return the fastest, the ratio to it, and why others did not run."""
    times, failed = {}, {}
    for name, call in peers.items():
        try:
            times[name] = time_us([call])[0]
        except Exception as error:  # not installed, or not for these shapes
            failed[name] = str(error)[:200]
    row: dict[str, Any] = {"peers_failed": failed} if failed else {}
    if times:
        best = min(times, key=lambda name: times[name])
        row |= {"peer": best, "peer_us": round(times[best], 2), "vs_peer": round(times[best] / us, 3)}
    return row


def step(report: Report) -> None:
    """Time decode steps of Llama-3-8B's shape with random weights, as a graph and launch by launch.

    Both also with kernels that begin while the one before still runs, whose logits must be the same bits.
    """
    from bench.gpu_model import decode_program

    read = measure_ceilings()["read"]
    for batch, context, weights in STEPS:
        call, num_bytes, num_calls = decode_program(batch, context, weights=weights)
        floor = num_bytes / read * 1e6
        results: dict[bool, Tensor] = {}  # by whether it was a graph: cuBLAS may take another kernel in one
        for is_dependent in (False, True):
            torch.ops.tgi_cuda.set_dependent_launches(is_dependent)
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = call()
            for is_graph, run in ((True, graph.replay), (False, call)):
                us = time_us([run])[0]
                is_same = torch.equal(results.setdefault(is_graph, logits.clone()), logits)
                assert is_same, "dependent launches change the logits"
                report(
                    "step",
                    {
                        "batch": batch, "context": context, "weights": weights, "graph": is_graph,
                        "dependent": is_dependent, "us": round(us, 1), "floor_us": round(floor, 1),
                        "of_floor": round(floor / us, 3), "kernels": num_calls,
                    },
                )  # fmt: skip
            del graph
        torch.ops.tgi_cuda.set_dependent_launches(False)
        del call, logits, results
        torch.cuda.empty_cache()


def sanitizer(report: Report) -> None:
    """Run the small cases under compute-sanitizer's tools."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise FileNotFoundError("there is no compute-sanitizer")
    code = (
        "import torch; from tests.cuda import cases; from tests.cuda.gpu_device import GpuDevice\n"
        "for _, _, check in cases.small(): check(GpuDevice(torch.device('cuda')))"
    )
    for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            "--kernel-name-exclude",
            "kernel_substring=at::",
        ]
        done = subprocess.run(
            [*command, sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True
        )
        text = done.stdout + done.stderr
        found = "clean" if done.returncode == 0 else text.count("=========     at ") or "refused"
        report("sanitizer", {name: found})


def time_us(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """Return the median time of a call in microseconds, and the spread (the middle half over the median).

    Calls are taken in turn, each on data of its own, so that none finds its inputs in the cache.
    """
    for call in calls[:3]:
        call()
    events = [(_event(), _event()) for _ in range(_RUNS)]
    for index, (begin, end) in enumerate(events):
        begin.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) * 1e3 for begin, end in events)
    middle = statistics.median(times)
    return middle, (times[len(times) * 3 // 4] - times[len(times) // 4]) / middle


def copies_past_l2(num_bytes: int) -> int:
    """Return how many sets of inputs of this size no cache holds together."""
    return max(1, min(_RUNS, -(-_L2_BYTES // max(num_bytes, 1))))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return random numbers on the device: never zeros, which cost a GPU less."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


STAGES = (build, ptxas, ceilings, checks, operators, step, sanitizer)


def main(name: str, path: str) -> None:
    """Run a stage, of this module or of gpu_runs; what it reports is in the file at once."""
    stages = {stage.__name__: stage for stage in STAGES}
    if name not in stages:  # imported only now: they need the extension, which the first stage builds
        from bench import gpu_runs

        stages = {stage.__name__: stage for stage in gpu_runs.STAGES}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was ended"))  # so that what it started ends, too
    with open(path, "a", buffering=1) as file:
        stages[name](lambda key, value: print(json.dumps([key, value]), file=file))


if __name__ == "__main__":
    main(*sys.argv[1:])
