"""All kernel sets that this machine runs, operator by operator: share of the set's peak and of bandwidth.

    python -m bench.kernel_sets --out bench/results/kernels-zen4.json

Runs `bench.kernels` for each set (TGI_ISA) and model: the default one, and Llama 1B's shape in several
formats (--models). Sets take turns, `--rounds` times; for each operator the fastest round is kept, with that
round's peak and bandwidth. Unknown flags go to `bench.kernels`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import command_line, commit, emit, machine, table
from bench.shapes import SHAPES
from tgi_asgi import _C

ROOT = Path(__file__).parent.parent
SLOW = ("portable", "amx_model")  # never selected for serving
DEFAULT = "default"


def measure(name: str, model: str, arguments: list[str]) -> dict[str, Any]:
    """Return the output of `bench.kernels` for a model with one kernel set."""
    chosen = [] if model == DEFAULT else ["--shape", model]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "bench.kernels", *chosen, *arguments, "--out", str(out)]
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "TGI_ISA": name}, stdout=subprocess.DEVNULL, check=True
        )
        record: dict[str, Any] = json.loads(out.read_text())
        return record


def fastest(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each operator's fastest round, in order, with rounded numbers."""
    rows = []
    for same in zip(*(each["operators"] for each in rounds), strict=True):
        row = min(same, key=lambda each: float(each["ms"]))
        rows.append(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        )
    return rows


def main() -> None:
    """Measure all sets and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sets = [name for name in _C.kernel_sets() if name not in SLOW]
    parser.add_argument("--sets", nargs="+", choices=_C.kernel_sets(), default=sets)
    parser.add_argument("--models", nargs="+", choices=(DEFAULT, *SHAPES), default=[DEFAULT, *SHAPES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options, arguments = parser.parse_known_args()
    record: dict[str, Any] = {
        "bench": "kernel_sets",
        "command": command_line(),
        "commit": commit(ROOT),
        "machine": machine(),
        "chosen": _C.kernel_set(),
        "runs": [],
    }
    for model in options.models:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.sets}
        for _ in range(options.rounds):
            for name in options.sets:
                rounds[name].append(measure(name, model, arguments))
        for name, found in rounds.items():
            best = max(found, key=lambda each: float(each["peak_top_per_s"]["int8"]))
            run = {"model": model, "isa": name, "threads": best["threads"]}
            run |= {"peak_top_per_s": best["peak_top_per_s"], "operators": fastest(found)}
            record["runs"].append(run)
    emit(record, options.out)
    columns = ("shape", "operator", "ms", "share_of_peak", "share_of_bandwidth")
    for run in record["runs"]:
        print(f"\n{run['model']}, {run['isa']}")
        print(table(columns, ([row[column] for column in columns] for row in run["operators"])))


if __name__ == "__main__":
    main()
