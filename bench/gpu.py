"""All that a GPU can show, in one command and under nine minutes: builds, checks, measures, compares.

    python -m bench.gpu [--out FOLDER] [--only STAGE,...] [--dry-run]

Each stage is a process with a deadline: one that fails, hangs or crashes is reported, and the others go on.
The result is one JSON object, in a file and as the last line of the output; the exit status is 1 unless all
is well. Needs torch with CUDA, nvcc and compute-sanitizer; no network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "tgi-gpu-1"
TOTAL_S = 9 * 60
_ROOT = Path(__file__).parents[1]
_LISTS = ("checks", "ops", "step", "skipped")
_OBJECTS = ("device", "ceilings", "build", "sanitizer")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run."""

    name: str
    deadline_s: float


STAGES = (
    Stage("build", 180),
    Stage("ceilings", 30),
    Stage("checks", 100),
    Stage("operators", 80),
    Stage("step", 90),
    Stage("sanitizer", 60),
)


def empty_result() -> dict[str, Any]:
    """Return a result in which nothing has happened."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    start: dict[str, Any] = {"schema": SCHEMA, "commit": _commit(), "utc": now}
    return (
        start | {name: {} for name in _OBJECTS} | {name: [] for name in _LISTS} | {"wall_s": 0.0, "ok": False}
    )


def run(stages: Sequence[Stage], out: Path, total_s: float = TOTAL_S) -> dict[str, Any]:
    """Run stages in turn, and write the result after each."""
    result, start = empty_result(), time.monotonic()
    for stage in stages:
        deadline = min(stage.deadline_s, total_s - (time.monotonic() - start))
        command = [sys.executable, "-m", "bench.gpu_stages", stage.name]
        why = "no time was left" if deadline <= 0 else run_stage(command, deadline, result)
        if why is not None:
            result["skipped"].append({"what": stage.name, "why": why})
        result["wall_s"] = round(time.monotonic() - start, 1)
        result["ok"] = is_ok(result)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{stage.name}: {why or 'done'} ({result['wall_s']} s)", flush=True)
    return result


def run_stage(command: Sequence[str], deadline_s: float, result: dict[str, Any]) -> str | None:
    """Run a stage's process and merge what it reported; return why it did not end well, or None.

    It appends lines of `[name, value]` to a file whose name is its last argument; what it had written when it
    was killed counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        try:
            done = subprocess.run(
                [*command, str(report)], cwd=_ROOT, timeout=deadline_s, capture_output=True, text=True
            )
            words = (done.stderr.strip() or done.stdout.strip()).splitlines()
            why = None if done.returncode == 0 else f"exit status {done.returncode}: {' '.join(words[-3:])}"
        except subprocess.TimeoutExpired:
            why = f"not done after {deadline_s:.0f} s"
        for line in report.read_text().splitlines():
            name, value = json.loads(line)
            result[name].append(value) if name in _LISTS else result[name].update(value)
    return why


def is_ok(result: dict[str, Any]) -> bool:
    """Tell whether everything ran, every check passed, and no sanitizer found anything."""
    return (
        not result["skipped"]
        and bool(result["checks"])
        and all(check["ok"] for check in result["checks"])
        and all(found in ("clean", "refused") for found in result["sanitizer"].values())
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=_ROOT / "bench" / "results")
    parser.add_argument("--only", help="stages, with commas between; default: all")
    parser.add_argument("--dry-run", action="store_true", help="run nothing; write a result that says so")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else [stage.name for stage in STAGES]
    stages = [stage for stage in STAGES if stage.name in names]
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out / f"gpu-{_device_name()}-{_commit()}.json"
    if options.dry_run:
        result = empty_result()
        result["skipped"] = [{"what": stage.name, "why": "dry run"} for stage in stages]
        out.write_text(json.dumps(result, indent=1) + "\n")
    else:
        result = run(stages, out)
    print(json.dumps(result))
    return 0 if result["ok"] or options.dry_run else 1


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _device_name() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    lines = done.stdout.split("\n") if done.returncode == 0 else [""]
    return lines[0].strip().lower().replace(" ", "-") or "none"


if __name__ == "__main__":
    sys.exit(main())
