"""Runs a stage of bench/gpu.py in a process of its own: `python -m bench.gpu_stages STAGE REPORT`."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys

from bench import gpu_kernels


def main(name: str, path: str) -> None:
    """Run a stage; its reports are written to the file immediately."""
    stages = {stage.__name__: stage for stage in (*gpu_kernels.STAGES, gpu_kernels.small_cases)}
    if name not in stages:  # imported only now: they need the extension, which the first stage builds
        from bench import gpu_runs, gpu_served, gpu_tests

        others = (*gpu_runs.STAGES, *gpu_served.STAGES, *gpu_tests.STAGES)
        stages = {stage.__name__: stage for stage in others}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was ended"))  # so that child processes end, too
    if name != "build":
        importlib.import_module("tgi_asgi._cuda")  # registers the operators with torch
    with open(path, "a", buffering=1) as file:
        stages[name](lambda key, value: print(json.dumps([key, value]), file=file))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage")
    parser.add_argument("report", help="file that its reports are added to")
    options = parser.parse_args()
    main(options.stage, options.report)
