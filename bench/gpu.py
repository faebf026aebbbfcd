"""All that a GPU can show, in one command and under nine minutes: builds, checks, measures, compares.

    pip download --only-binary=:all: --dest wheels $(python -m bench.gpu --requirements)  # the same Python
    python -m bench.gpu --wheels wheels [--out FOLDER] [--only STAGE,...] [--dry-run]     # with a GPU

Each stage is a process with a deadline: one that fails, hangs or crashes is reported, and the others go on.
The result is one JSON object, in a file and as the last line of the output; the exit status is 1 unless all
is well. The machine needs torch with CUDA, nvcc and compute-sanitizer; what else is imported comes as wheels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "tgi-gpu-1"
TOTAL_S = 9 * 60
INSTALL_S = 20
_GRACE_S = 3.0
_ROOT = Path(__file__).parents[1]
_LISTS = ("checks", "ops", "step", "runs", "skipped")
_OBJECTS = ("device", "ceilings", "build", "sanitizer")


_PACKAGES = _ROOT / "build" / "gpu-packages"  # what --wheels brings


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run."""

    name: str
    deadline_s: float
    is_needed: bool = True  # for `ok`; a comparison with others is not


STAGES = (  # by what they are worth, but for what the later ones need, and the served run, which is last
    Stage("build", 140),
    Stage("ceilings", 20),
    Stage("checks", 75),
    Stage("operators", 70, is_needed=False),
    Stage("step", 55),
    Stage("engine", 30),
    Stage("sanitizer", 45),
    Stage("peers", 35, is_needed=False),
    Stage("ptxas", 15, is_needed=False),
    Stage("served", 35),
)


def requirements() -> list[str]:
    """Return what the stages need but for torch: what the project does, its build, and a few of its tests."""
    needs = re.findall(r"^(?!torch\b)[^#\s;]+", (_ROOT / "requirements.txt").read_text(), re.MULTILINE)
    with open(_ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    for_tests = project["project"]["optional-dependencies"]["test"]
    for_build = [need for need in project["build-system"]["requires"] if re.match("(ninja|pybind11)>", need)]
    found = [
        *needs,
        *for_build,
        *(need for need in for_tests if re.match("(pytest|transformers|httpx)>", need)),
    ]
    return [*found, "setuptools<82"]  # as torch 2.11 wants it


def install(wheels: Path) -> str | None:
    """Unpack the wheels into a folder that the stages' processes see; return why that failed, or None."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-compile", "--upgrade"]
    command += ["--find-links", str(wheels), "--target", str(_PACKAGES)]
    return _run_group([*command, *requirements()], INSTALL_S)


def empty_result() -> dict[str, Any]:
    """Return a result in which nothing has happened."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    start: dict[str, Any] = {"schema": SCHEMA, "commit": _commit(), "utc": now}
    return (
        start | {name: {} for name in _OBJECTS} | {name: [] for name in _LISTS} | {"wall_s": 0.0, "ok": False}
    )


def run(
    stages: Sequence[Stage],
    out: Path,
    total_s: float = TOTAL_S,
    module: str = "bench.gpu_stages",
    skipped: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Run stages of a module in turn, and write the result after each; `skipped` failed before them."""
    result, start = empty_result(), time.monotonic()
    result["skipped"] += skipped
    out.write_text(json.dumps(result, indent=1) + "\n")
    for stage in stages:
        deadline = min(stage.deadline_s, total_s - (time.monotonic() - start))
        command = [sys.executable, "-m", module, stage.name]
        why = "no time was left" if deadline <= 0 else run_stage(command, deadline, result)
        if why is not None:
            result["skipped"].append({"what": stage.name, "why": why, "needed": stage.is_needed})
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
            why = _run_group([*command, str(report)], deadline_s)
        except OSError as error:
            why = str(error)
        for line in report.read_text().splitlines():
            name, value = json.loads(line)
            result[name].append(value) if name in _LISTS else result[name].update(value)
    return why


def _run_group(command: Sequence[str], deadline_s: float) -> str | None:
    """Run a process; at its deadline kill it with all that it started (compilers, servers, sanitizers)."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_PACKAGES), os.environ.get("PYTHONPATH", "")])
    }
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # it may have a server to stop, which is in a group of its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            return f"not done after {deadline_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        words = output.read().strip().splitlines()
    return None if status == 0 else f"exit status {status}: {' '.join(words[-3:])}"


def is_ok(result: dict[str, Any]) -> bool:
    """Tell whether all that is needed ran, every check passed, and no sanitizer found anything."""
    return (
        not any(skipped["needed"] for skipped in result["skipped"])
        and bool(result["checks"])
        and all(check["ok"] for check in result["checks"])
        and all(found in ("clean", "refused") for found in result["sanitizer"].values())
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=_ROOT / "bench" / "results")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install beside torch first")
    parser.add_argument("--requirements", action="store_true", help="print what the wheels are, and end")
    parser.add_argument("--only", help="stages, with commas between; default: all")
    parser.add_argument("--dry-run", action="store_true", help="run nothing; write a result that says so")
    options = parser.parse_args(arguments)
    if options.requirements:
        print(*requirements())
        return 0
    names = options.only.split(",") if options.only else [stage.name for stage in STAGES]
    stages = [stage for stage in STAGES if stage.name in names]
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out / f"gpu-{_device_name()}-{_commit()}.json"
    if options.dry_run:
        result = empty_result()
        result["skipped"] = [{"what": stage.name, "why": "dry run", "needed": True} for stage in stages]
        out.write_text(json.dumps(result, indent=1) + "\n")
    else:
        why = None if options.wheels is None else install(options.wheels)
        skipped = [] if why is None else [{"what": "wheels", "why": why, "needed": True}]
        result = run(stages, out, TOTAL_S - (0 if options.wheels is None else INSTALL_S), skipped=skipped)
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
