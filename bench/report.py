"""Formatting of results: percentiles, tables, JSON files, and a description of the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Clouds use one name for all generations of a processor.
_GENERATION = (("cpu family", "family"), ("model", "model"))
RESULTS = Path(__file__).parent / "results"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed; NaN if there are none."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> dict[str, float]:
    """Return p50, p90 and p99 of values times `scale`."""
    return {
        name: round(percentile(values, share) * scale, digits)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


def median(values: Iterable[float], digits: int = 2) -> float:
    """Return the median, rounded; NaN if there are no values."""
    found = list(values)
    return round(statistics.median(found), digits) if found else math.nan


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format rows as a Markdown table, which is also readable in a terminal."""
    cells = [list(head), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"  # noqa: RUF001  # an en dash: "no such figure"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores that this process may use, memory, kernel."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in cpuinfo)}
    flags = set(fields.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    memory = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    generation = ", ".join(f"{name} {fields[key]}" for key, name in _GENERATION if key in fields)
    return {
        "cpu": " ".join(
            [fields.get("model name", platform.machine()), *([f"({generation})"] if generation else [])]
        ),
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in wanted if flag in flags],
        "l3": fields.get("cache size"),
        "memory_gib": round(int(memory.split()[1]) / (1 << 20), 1),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit(tree: Path = RESULTS.parents[1]) -> str:
    """Return the commit of a tree of this project, marked if files other than results differ from it."""
    git = ["git", "-C", str(tree)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!bench/results"], check=False)
    return name.stdout.strip() + ("-dirty" if changed.returncode else "")


def numbers(kind: type[Any]) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated lists for argparse; an empty text is an empty list."""
    return lambda text: [kind(word) for word in text.split(",") if word]


def command_line() -> str:
    """Return the command that runs this program, without machine-specific folders."""
    module = Path(sys.argv[0]).stem
    return " ".join(["python -m", f"bench.{module}", *map(_without_folders, sys.argv[1:])])


def _without_folders(word: str) -> str:
    """Return an argument without the folders of its path, or of several with colons between them."""
    if "/" not in word or "://" in word:
        return word
    return ":".join(Path(part).name for part in word.split(":"))


def emit(record: dict[str, Any], out: Path | None) -> None:
    """Print a run's JSON object on one line; keep it in a file too, if one is named."""
    print(json.dumps(record))
    if out is not None:
        save(record, out)


def save(record: dict[str, Any], out: Path) -> None:
    """Write a JSON object to a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
