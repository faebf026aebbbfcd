"""`make nightly`'s script: all parts run even if one fails; the table and exit status report failures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAKEFILE = """
good:
\t@echo good of CI=$$CI
bad:
\t@seq 100; exit 3
last:
\t@echo last
"""


def nightly(folder: Path, *parts: str) -> tuple[int, str]:
    (folder / "Makefile").write_text(MAKEFILE)
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "nightly", *parts],
        cwd=folder,
        env={**os.environ, "MAKE": "make"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def test_parts_after_one_that_fails_run_and_the_table_names_it(tmp_path: Path) -> None:
    status, output = nightly(tmp_path, "good", "bad", "none", "last")
    assert status == 1
    assert "good of CI=1" in output
    table = output[output.index("part  ") :].splitlines()[1:]
    assert [re.fullmatch(r"(\S+) +\d+\.\d  (\w+)", line).groups() for line in table] == [  # type: ignore[union-attr]
        ("good", "passed"), ("bad", "FAILED"), ("none", "FAILED"), ("last", "passed"),
    ]  # fmt: skip
    assert (tmp_path / "build/nightly/bad.log").read_text().startswith("1\n2\n")
    assert output.index("\n== the end of build/nightly/bad.log") < output.index("part  ")


def test_when_all_pass_the_status_is_0_and_without_parts_it_is_2(tmp_path: Path) -> None:
    assert nightly(tmp_path, "good", "last")[0] == 0
    assert nightly(tmp_path)[0] == 2


def test_every_nightly_part_is_a_target_and_every_nightly_marker_has_one() -> None:
    text = (ROOT / "Makefile").read_text().replace("-m pytest $(SPREAD) ", "-m pytest ")
    found = re.search(r"^NIGHTLY = ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert found is not None
    parts = found[1].replace("\\\n", " ").split()
    assert len(parts) == len(set(parts)) > 5
    assert set(parts) <= set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    markers = re.search(r"^nightly_markers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert markers is not None
    for marker in re.findall(r'"(\w+)"', markers[1]):
        recipes = [text.split(f"\n{part}:", 1)[1].split("\n\n")[0] for part in parts]
        commands = [re.search(rf"-m pytest (\S*) ?-m '?{marker} ", recipe) for recipe in recipes]
        folders = [command[1] for command in commands if command]
        assert len(folders) == 1, marker
        for path in (ROOT / "tests").rglob("test_*.py"):
            writes_tests = path.name == "test_pytest_plugins.py"  # its marks are in their sources
            if not writes_tests and re.search(rf"mark\.{marker}\b", path.read_text("utf-8")):
                assert path.is_relative_to(ROOT / folders[0]), f"no part runs {path}"
