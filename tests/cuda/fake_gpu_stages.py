"""Stages for the test of bench/gpu.py: `python -m tests.cuda.fake_gpu_stages STAGE REPORT`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def main(name: str, path: str) -> None:
    """Report something, then end as the stage's name says."""
    with open(path, "a", buffering=1) as file:

        def report(key: str, value: object) -> None:
            print(json.dumps([key, value]), file=file)

        if name == "good":
            report("checks", {"ok": True, "op": "good"})
            report("ceilings", {"read": 1})
        elif name == "broken":
            sys.exit("it broke")
        elif name == "hanging":
            report("checks", {"ok": True, "op": "before the hang"})
            late = f"/tmp/tgi-fake-stage/{os.getppid()}"
            subprocess.run(["sh", "-c", f"sleep 4; touch {late}"], check=True)
            time.sleep(60)
        elif name == "waiting":
            report("checks", {"ok": True, "op": "before the end"})
            while os.getppid() != 1:  # until the parent has ended
                time.sleep(0.1)
        elif name == "step":
            row = {
                "batch": 64,
                "context": 1024,
                "weights": "bf16",
                "kv": "fp8",
                "prompt": 512,
                "draw": "top-p",
            }
            report("step", row | {"graph": True, "dependent": False, "us": 3512.04, "of_floor": 0.873})
            report("step", {"batch": 1, "context": 1024, "why": "out of memory"})
        elif name == "crashing":
            os.kill(os.getpid(), 11)
        else:
            time.sleep(3)  # past the time at which the hanging stage's child would have written
            report("runs", {"what": name})


if __name__ == "__main__":
    main(*sys.argv[1:])
