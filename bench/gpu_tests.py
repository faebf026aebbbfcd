"""The stages of bench/gpu.py that run tests on the GPU: whole models of all families, and modules.

They need the packages of these tests, which a machine with only torch lacks: `python -m bench.gpu --wheels`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu_kernels import Report

_ROOT = Path(__file__).parents[1]
FILES = (
    "test_families", "test_expert_models", "test_runner", "test_runner_cache", "test_adapters",
    "test_prompt_attention", "test_wide_sums", "test_pooling", "test_float8_models", "test_drafts",
)  # fmt: skip
MODULE_FILES = ("test_direct", "test_paged", "test_modules")
_PROCESSES = 8
_OPTIONS = ("-q", "-n", str(_PROCESSES), "-p", "no:cacheprovider", "-o", "filterwarnings=default")
_ALL = ("-m", "models or not models")


def models(report: Report) -> None:
    """Run the tests of the runner, and report how many passed; those that need the emulation are skipped."""
    _run(report, "models", FILES, _ALL)


def modules(report: Report) -> None:
    """Run the usual tests of modules of `transformers`; all architectures would take too long."""
    _run(report, "modules", MODULE_FILES, ())


def _run(report: Report, name: str, files: Sequence[str], options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        paths = [f"tests/cuda/{file}.py" for file in files]
        subprocess.run(
            [sys.executable, "-m", "pytest", *_OPTIONS, *options, f"--junitxml={path}", *paths],
            cwd=_ROOT,
            env=os.environ | {"TGI_TEST_GPU": "1"},
        )
        num_passed, failed = read_results(path)
    row = {"op": name, "dtype": None, "cases": num_passed + len(failed), "worst_rel": None, "tol": None}
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


STAGES = (models, modules)
