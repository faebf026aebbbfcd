"""The stages of bench/gpu.py that build, check and time kernels; those of gpu_runs.py run whole models."""

from __future__ import annotations

import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_apart, gpu_shards, gpu_timing
from bench.gpu_timing import Call, time_calls
from tgi_asgi.runner.cuda_device import CudaDevice

_ROOT = Path(__file__).parents[1]
_OPERATOR_S = 60  # one whose kernel hangs leaves time for the others
_FOUND = 9  # exit status of a sanitizer that found something
_FINDINGS = ("=========     at ", "Race reported")  # a line of each: racecheck's have their own form
Report = Callable[[str, Any], None]


def build(report: Report) -> None:
    """Build the extension for the installed GPU."""
    start = time.monotonic()
    environment = os.environ | {"TGI_CUDA": "1", "MAX_JOBS": str(os.cpu_count())}
    environment.setdefault("TORCH_CUDA_ARCH_LIST", _architecture(torch.cuda.get_device_capability()))
    # The longest file of the CPU's kernels, which are not measured here, takes 28 s; at -O3 it takes 50 s.
    environment.setdefault("CXXFLAGS", "-O2")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=_ROOT, env=environment, check=True)
    seconds = round(time.monotonic() - start, 1)
    report("build", {"s": seconds, "for": environment["TORCH_CUDA_ARCH_LIST"]})


def _architecture(capability: tuple[int, int]) -> str:
    """Return the target architecture: only this GPU (a third of the time), with Hopper's instructions."""
    name = ".".join(map(str, capability))
    return f"{name}a" if capability == (9, 0) else name


def ceilings(report: Report) -> None:
    """Measure the device's limits: copying, reading, multiplying."""
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
    """Return bytes per second of copying (read and written) and reading, and FLOP per second in bfloat16."""
    big = torch.randn(1 << 28, device=gpu_timing.DEVICE)
    other = torch.empty_like(big)
    copy_us = time_calls([lambda: other.copy_(big)]).us
    read_us = time_calls([lambda: big.sum()]).us
    a, b = (torch.randn(8192, 8192, device=gpu_timing.DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_us = time_calls([lambda: torch.mm(a, b)]).us
    return {
        "copy": 2 * big.nbytes / copy_us * 1e6,
        "read": big.nbytes / read_us * 1e6,
        "bf16": 2 * 8192**3 / product_us * 1e6,
    }


def checks(report: Report) -> None:
    """Compare every operator with its float64 reference at realistic sizes.

    A row's `worst_rel` is the distance that came nearest to its limit, `tol`: of a whole tensor, of its worst
    element relative to the largest, or of a probability. A limit of 0 means equality.
    """
    from tests.cuda import cases

    torch.manual_seed(0)
    failed = 0
    everything = sorted((*cases.small(), *cases.large()), key=_turn)
    for operator, members in itertools.groupby(everything, key=lambda case: case[0]):
        check = functools.partial(_check_operator, list(members), report)
        try:
            failed += gpu_apart.apart(check, _OPERATOR_S)
        except Exception as error:
            failed += 1
            row = {"op": operator, "dtype": None, "cases": 0, "ok": False, "worst_rel": None, "tol": None}
            report("checks", row | {"why": str(error)[:300]})
    failed += not gpu_shards.check(CudaDevice, report)
    assert not failed, f"{failed} cases failed"


def _check_operator(everything: Sequence[Any], report: Report) -> int:
    """Check an operator's cases, report a row for each dtype, and return how many failed."""
    from tests.cuda.gpu_device import GpuDevice
    from tests.reference.compare import measured

    device, failed = GpuDevice(gpu_timing.DEVICE), 0
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
    return failed


def _nearest(distances: Sequence[Any]) -> dict[str, float | None]:
    """Return the distance nearest to or furthest beyond its limit; None if it is not a number."""
    if not distances:
        return {"worst_rel": None, "tol": None}
    nearest = max(distances, key=lambda distance: (distance.share, distance.limit))
    error = float(f"{nearest.error:.3g}")
    return {"worst_rel": error if math.isfinite(error) else None, "tol": float(f"{nearest.limit:.3g}")}


def _turn(case: Any) -> tuple[bool, str, str]:
    """Return a key that sorts cases by kind; last is the one whose reference takes the processor minutes."""
    return (case[0] == "attention_prefill", *_kind(case))


def _kind(case: Any) -> tuple[str, str]:
    return case[0], str(case[1]).removeprefix("torch.")


def operators(report: Report) -> None:
    """Time each kernel in Llama-3-8B's shapes against its lower bound and the fastest peer that runs.

    A kernel that cannot be measured is reported, and the others continue.
    """
    from bench.gpu_operators import makers

    limits, failed = measure_ceilings(), 0
    for make in makers():
        try:
            name, shape, num_bytes, kind, calls, peers = make()
            ours = time_calls(calls)
            floor = num_bytes / limits[kind] * 1e6
            row = {"op": name, "shape": shape, "bytes": num_bytes} | ours.row()
            row |= {"floor_us": round(floor, 2), "of_floor": round(floor / ours.us, 3)}
            report("ops", row | compare(ours.us, peers))
        except Exception as error:
            failed += 1
            report("ops", {"op": make.func.__name__, "shape": str(make.args), "why": str(error)[:300]})
    assert not failed, f"{failed} could not be measured"


def compare(us: float, peers: dict[str, Call]) -> dict[str, Any]:
    """Time the peers of a kernel; return the fastest, the ratio to it, and why others did not run."""
    times, failed = {}, {}
    for name, call in peers.items():
        try:
            times[name] = time_calls([call]).us
        except Exception as error:  # not installed, or not for these shapes
            failed[name] = str(error)[:200]
    row: dict[str, Any] = {"peers_failed": failed} if failed else {}
    if times:
        best = min(times, key=lambda name: times[name])
        row |= {"peer": best, "peer_us": round(times[best], 2), "vs_peer": round(times[best] / us, 3)}
    return row


def memcheck(report: Report) -> None:
    """Check for invalid addresses."""
    _sanitize("memcheck", report)


def racecheck(report: Report) -> None:
    """Check for races in shared memory."""
    _sanitize("racecheck", report)


def synccheck(report: Report) -> None:
    """Check for barriers that not all threads reach."""
    _sanitize("synccheck", report)


def initcheck(report: Report) -> None:
    """Check for reads of uninitialised memory."""
    _sanitize("initcheck", report)


def _sanitize(name: str, report: Report) -> None:
    """Run the small cases under a tool of compute-sanitizer, excluding torch's kernels.

    Raises:
        RuntimeError: if a case fails.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise FileNotFoundError("there is no compute-sanitizer")
    options = ["--tool", name, "--error-exitcode", str(_FOUND)]
    options += ["--kernel-name-exclude", "kernel_substring=2at6native"]  # torch's, by their mangled names
    if name == "memcheck":  # torch asks drivers for functions that they may lack
        options += ["--report-api-errors", "no"]
    cases = [sys.executable, "-m", "bench.gpu_stages", small_cases.__name__, os.devnull]
    done = subprocess.run([tool, *options, *cases], cwd=_ROOT, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode == 0:
        report("sanitizer", {name: "clean"})
        return
    if done.returncode == _FOUND:
        found: int | str = max(sum(text.count(start) for start in _FINDINGS), 1)
    elif "SUMMARY: " in text:  # the tool's last line, so it ran
        raise RuntimeError(f"a case fails under {name}: {text[-2000:]}")
    else:
        found = "refused"
    report("sanitizer", {name: found, f"{name}_says": text[-2000:]})


def small_cases(report: Report) -> None:
    """Run a few small cases of each operator, for the sanitizers."""
    from tests.cuda import cases
    from tests.cuda.gpu_device import GpuDevice

    device = GpuDevice(gpu_timing.DEVICE)
    for _, _, check in cases.small():
        check(device)


STAGES = (build, ceilings, checks, operators, memcheck, racecheck, synccheck, initcheck)
