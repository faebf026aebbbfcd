"""Everything to run on a GPU in one command: builds, checks, measurements, comparisons.

    python -m bench.gpu --only build,ceilings,checks,step [--out FOLDER]  # first: some four minutes
    python -m bench.gpu --only operators,engine,peers                     # builds first if nothing is built
    python -m bench.gpu --only memcheck                                   # a sanitizer's tool a call
    python -m bench.gpu --wheels wheels --only served,models              # what these import, as wheels
    pip download --only-binary=:all: --dest wheels $(python -m bench.gpu --requirements)   # the same Python

Each stage is a process with a deadline: one that fails, hangs or crashes is reported, and the others
continue. All together are cut off after --limit-s (570). The result is one JSON object in a file, which is
rewritten whenever a stage reports something, so killing this command loses nothing; a short table is printed
after each stage. The exit status is 1 unless all is well. The machine needs torch with CUDA, numpy, pytest,
ninja, pybind11 and nvcc, and no network.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "tgi-gpu-2"
TOTAL_S = 570  # within a call of ten minutes
INSTALL_S = 40
_GRACE_S = 3.0
_POLL_S = 0.25
_LOG_CHARS = 2000
_ROOT = Path(__file__).parents[1]
_LISTS = ("checks", "ops", "step", "runs", "profile", "skipped")
_OBJECTS = ("device", "ceilings", "build", "sanitizer")
_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_PACKAGES = _ROOT / "build" / "gpu-packages"  # the contents of --wheels, only for these stages
_WITH_PACKAGES = {"served", "models", "modules"}
_FOR_TESTS = "pytest|pytest-asyncio|pytest-xdist|hypothesis|transformers|httpx|gguf|compressed-tensors|peft"


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run."""

    name: str
    deadline_s: float
    is_needed: bool = True  # for `ok`; comparisons with other projects are not needed
    group: int = 1  # the stages of a group fit into one call


STAGES = (  # ordered by value, except where later stages depend on earlier ones
    Stage("build", 240, group=0),  # the first of every call
    Stage("ceilings", 30),
    Stage("checks", 150),
    Stage("step", 150),
    Stage("operators", 150, is_needed=False, group=2),
    Stage("engine", 120, group=2),
    Stage("peers", 60, is_needed=False, group=2),
    Stage("served", 90, is_needed=False, group=3),
    Stage("models", 120, is_needed=False, group=3),
    Stage("modules", 200, is_needed=False, group=8),
    *(Stage(tool, 300, group=4 + index) for index, tool in enumerate(_TOOLS)),
    Stage("profiler", 60, is_needed=False, group=3),
)


def requirements() -> list[str]:
    """Return the stages' requirements except torch: the project's, its build's, and those of a few tests."""
    needs = re.findall(r"^(?!torch\b)[^#\s;]+", (_ROOT / "requirements.txt").read_text(), re.MULTILINE)
    with open(_ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    for_tests = project["project"]["optional-dependencies"]["test"]
    for_build = [need for need in project["build-system"]["requires"] if re.match("(ninja|pybind11)>", need)]
    found = [
        *needs,
        *for_build,
        *(need for need in for_tests if re.match(f"({_FOR_TESTS})>", need)),
    ]
    return [*found, "setuptools<82"]  # required by torch 2.11


def install(wheels: Path) -> str | None:
    """Unpack the wheels into a folder that only those stages use; return why that failed, or None."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-compile", "--upgrade"]
    command += ["--find-links", str(wheels), "--target", str(_PACKAGES)]
    return _run_group([*command, *requirements()], INSTALL_S)[0] or None


def empty_result(commit: str = "unknown") -> dict[str, Any]:
    """Return an empty result."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    start: dict[str, Any] = {"schema": SCHEMA, "commit": commit, "utc": now}
    return (
        start | {name: {} for name in _OBJECTS} | {name: [] for name in _LISTS} | {"wall_s": 0.0, "ok": False}
    )


def run(
    stages: Sequence[Stage],
    out: Path,
    total_s: float = TOTAL_S,
    module: str = "bench.gpu_stages",
    skipped: Sequence[dict[str, Any]] = (),
    commit: str = "unknown",
) -> dict[str, Any]:
    """Run stages of a module in turn; `skipped` lists stages that failed before them.

    The result is written whenever a stage reports; a running stage is listed as skipped, as if this process
    had been killed at that moment.
    """
    result, start = empty_result(commit), time.monotonic()
    result["skipped"] += skipped

    def write() -> None:
        result["wall_s"] = round(time.monotonic() - start, 1)
        result["ok"] = is_ok(result)
        write_whole(out, result)

    for stage in stages:
        deadline = min(stage.deadline_s, total_s - (time.monotonic() - start))
        running = {"what": stage.name, "why": "it was running when all was ended", "needed": stage.is_needed}
        result["skipped"].append(running)
        write()
        why, log = "no time was left", ""
        if deadline > 0:
            why, log = run_stage([sys.executable, "-m", module, stage.name], deadline, result, write)
        if why:
            running.update({"why": why} | ({"log": log} if log else {}))
        else:
            result["skipped"].remove(running)
        write()
        print(f"{stage.name}: {why or 'done'} ({result['wall_s']} s)", flush=True)
        print("".join(table(result, stage.name)), end="", flush=True)
    write()
    return result


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """Write a result atomically: readers find a complete file even if this process is killed."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def run_stage(
    command: Sequence[str],
    deadline_s: float,
    result: dict[str, Any],
    changed: Callable[[], None] = lambda: None,
) -> tuple[str, str]:
    """Run a stage's process and merge its reports as they arrive; return why it ended badly, and its log.

    Both are empty if it ended well. The process appends lines of `[name, value]` to the file that its last
    argument names; lines that it wrote before being killed count.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        with report.open() as file:

            def merge() -> None:
                for name, value in _whole_lines(file):
                    result[name].append(value) if name in _LISTS else result[name].update(value)
                    changed()

            try:
                return _run_group([*command, str(report)], deadline_s, merge)
            except OSError as error:
                return str(error), ""
            finally:
                merge()


def _whole_lines(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the lines that a process has completed since the last call."""
    while True:
        at = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(at)
            return
        name, value = json.loads(line)
        yield name, value


def _run_group(
    command: Sequence[str],
    deadline_s: float,
    poll: Callable[[], None] = lambda: None,
    environment: dict[str, str] | None = None,
) -> tuple[str, str]:
    """Run a process; at its deadline kill it and its children (compilers, servers, sanitizers).

    Return why it did not end well, and the end of its output; both are empty if it did.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=os.environ | _environment(command) | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end, status = time.monotonic() + deadline_s, None
        try:
            while status is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(_POLL_S, max(end - time.monotonic(), 0.01)))
                poll()
            if status is None:
                process.terminate()  # it may have a server to stop, which is in another process group
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        log = output.read().strip()
    if status == 0:
        return "", ""
    if status is None:
        return f"not done after {deadline_s:.0f} s", log[-_LOG_CHARS:]
    return f"exit status {status}: {' '.join(log.splitlines()[-3:])}", log[-_LOG_CHARS:]


def _environment(command: Sequence[str]) -> dict[str, str]:
    """Return extra environment variables of a stage: if it has packages, these come first in the path."""
    packages = [str(_PACKAGES)] if _WITH_PACKAGES & set(command) else []
    return {"PYTHONPATH": os.pathsep.join([*packages, str(_ROOT), os.environ.get("PYTHONPATH", "")])}


def is_ok(result: dict[str, Any]) -> bool:
    """Return whether all needed stages ran, every check passed, and no sanitizer found anything."""
    return (
        not any(skipped["needed"] for skipped in result["skipped"])
        and all(check["ok"] for check in result["checks"])
        and all(row.get("same_bits", True) for row in result["step"])
        and all(result["sanitizer"].get(tool, "clean") in ("clean", "refused") for tool in _TOOLS)
    )


_HOST = ("push_us", "launch_us")  # of the event loop, and of the launcher's thread
_COLUMNS = {  # of the tables: the key that a stage reports under, and the columns shown
    "checks": ("checks", ("op", "dtype", "cases", "worst_rel", "tol", "ok")),
    "step": (
        "step",
        ("batch", "context", "weights", "kv", "prompt", "draw", "graph", "dependent", "us", "floor_us",
         "of_floor"),
    ),
    "operators": ("ops", ("op", "shape", "us", "spread", "of_floor", "peer", "vs_peer")),
    "engine": (
        "runs",
        ("what", "weights", "kv", "draw", "batch", "prompt", "us", "tokens_per_s", *_HOST, "gpu_busy"),
    ),
    "peers": ("runs", ("what", "compiled", "batch", "us", "tokens_per_s")),
    "served": (
        "runs", ("model", "clients", "requests", "failed", "tokens_per_s", "first_ms", "gap_ms", "start_s")
    ),
    "profiler": ("profile", ("batch", "weights", "draw", "us", "count", "kernel")),
}  # fmt: skip
_WHATS = {"engine": ("ttft", "decode", "mixed", "engine"), "peers": ("transformers",), "served": ("served",)}


def table(result: dict[str, Any], stage: str) -> Iterator[str]:
    """Yield a stage's results as lines; each ends where the next is to begin."""
    if stage in _OBJECTS and result[stage]:
        yield f"  {json.dumps(result[stage])}\n"
    if stage in _TOOLS and stage in result["sanitizer"]:
        yield f"  {result['sanitizer'][stage]}\n"
    if stage not in _COLUMNS:
        return
    key, columns = _COLUMNS[stage]
    rows = [row for row in result[key] if row.get("what") in _WHATS.get(stage, (row.get("what"),))]
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row, cell in zip(({}, *rows), cells, strict=True):
        line = "  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip()
        yield f"  {line}{'  ! ' + row['why'][:100] if row.get('why') else ''}\n"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]


def chosen(only: str | None, *, is_built: bool) -> list[Stage]:
    """Return the stages that --only names, in their order, after a build if nothing is built.

    Raises:
        SystemExit: if there is no such stage.
    """
    names = only.split(",") if only else [stage.name for stage in STAGES]
    unknown = sorted(set(names) - {stage.name for stage in STAGES})
    if unknown:
        raise SystemExit(
            f"there is no stage {', '.join(unknown)}: take {', '.join(stage.name for stage in STAGES)}"
        )
    return [stage for stage in STAGES if stage.name in names or (stage.name == "build" and not is_built)]


def is_built() -> bool:
    """Return whether both extensions exist and are newer than all sources."""
    built = [*_ROOT.glob("tgi_asgi/_C.*.so"), *_ROOT.glob("tgi_asgi/_cuda.*.so")]
    sources = [path for path in (_ROOT / "csrc").rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    return len(built) == 2 and min(path.stat().st_mtime for path in built) >= newest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=_ROOT / "bench" / "results", help="folder of the result")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels for served, models and modules")
    parser.add_argument(
        "--requirements", action="store_true", help="print the requirements of the wheels and exit"
    )
    parser.add_argument("--only", help="comma-separated stages; default: all")
    parser.add_argument(
        "--limit-s", type=float, default=TOTAL_S, help="seconds for all stages; default: %(default)s"
    )
    parser.add_argument("--commit", help="commit that the result is for; default: from git")
    parser.add_argument("--dry-run", action="store_true", help="run nothing; write a result that says so")
    options = parser.parse_args(arguments)
    if options.requirements:
        print(*requirements())
        return 0
    stages = chosen(options.only, is_built=options.dry_run or is_built())
    options.out.mkdir(parents=True, exist_ok=True)
    commit = options.commit or _commit()
    which = f"-{stages[-1].name}" if options.only else ""
    out = options.out / f"gpu-{_device_name()}-{commit}{which}.json"
    if options.dry_run:
        result = empty_result(commit)
        result["skipped"] = [{"what": stage.name, "why": "dry run", "needed": True} for stage in stages]
        write_whole(out, result)
    else:
        why = None if options.wheels is None else install(options.wheels)
        skipped = [] if why is None else [{"what": "wheels", "why": why, "needed": False}]
        left = options.limit_s - (0 if options.wheels is None else INSTALL_S)
        with awake_gpus():
            result = run(stages, out, left, skipped=skipped, commit=commit)
    print(f"{'all is well' if result['ok'] else 'not all is well'}: {out}")
    return 0 if result["ok"] or options.dry_run else 1


@contextlib.contextmanager
def awake_gpus(devices: Path = Path("/dev")) -> Iterator[None]:
    """Hold the GPUs' device files open, as a persistence daemon does.

    Without such a daemon the driver shuts a GPU down after its last process, and takes seconds to start it
    for the next one.
    """
    with contextlib.ExitStack() as opened:
        for path in devices.glob("nvidia[0-9]*"):
            with contextlib.suppress(OSError):
                opened.callback(os.close, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        yield


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:  # the sources travel, git may not
        return "unknown"
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was ended"))  # its stage ends, too
    sys.exit(main())
