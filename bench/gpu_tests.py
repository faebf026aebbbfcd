"""The stage of bench/gpu.py that runs the tests of the CUDA runner on the GPU: whole models in all families.

It needs the packages of those tests, which a machine with only torch lacks: `python -m bench.gpu --wheels`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu_stages import Report

_ROOT = Path(__file__).parents[1]
FILES = (
    "test_families", "test_expert_models", "test_runner", "test_runner_cache", "test_adapters",
    "test_prompt_attention", "test_wide_sums", "test_pooling", "test_float8_models", "test_drafts",
)  # fmt: skip
_PROCESSES = 8
_OPTIONS = (
    "-q", "-n", str(_PROCESSES), "-p", "no:cacheprovider", "-o", "filterwarnings=default",
    "-m", "models or not models",
)  # fmt: skip


def models(report: Report) -> None:
    """Run the tests of the runner, and report how many passed; those that need the emulation are skipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        files = [f"tests/cuda/{name}.py" for name in FILES]
        subprocess.run(
            [sys.executable, "-m", "pytest", *_OPTIONS, f"--junitxml={path}", *files],
            cwd=_ROOT,
            env=os.environ | {"TGI_TEST_GPU": "1"},
        )
        num_passed, failed = read_results(path)
    row = {"op": "models", "dtype": None, "cases": num_passed + len(failed), "worst_rel": None, "tol": None}
    ok = num_passed > 0 and not failed
    report("checks", row | {"ok": ok, "why": None if ok else ", ".join(failed)[:300]})
    assert ok, f"{len(failed)} tests failed, {num_passed} passed"


def read_results(path: Path) -> tuple[int, list[str]]:
    """Return the number of tests that passed, and the names of those that failed, of a report of pytest's."""
    num_passed, failed = 0, []
    for case in ElementTree.parse(path).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(case.get("name", ""))
        elif "skipped" not in outcomes:
            num_passed += 1
    return num_passed, failed


STAGES = (models,)
