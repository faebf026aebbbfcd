"""Fail a run if a test skips that `tests/expected_skips.txt` does not list.

If skips were only printed, a fixture that no longer finds its data would silence its tests unnoticed. A line
of the file contains a kind, a pattern of node ids and a pattern of reasons, with `*` for anything:

    always   skipped on every machine
    machine  depends on the processor or the system, and on compilers for others
    missing  a program, a package or the network is missing, which is not allowed if CI is set

In a complete run with CI set, an `always` line that no skip matches also fails the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, cast, get_args

import pytest

LIST = Path(__file__).parents[1] / "expected_skips.txt"
Kind = Literal["always", "machine", "missing"]


@dataclass(frozen=True, slots=True)
class Expected:
    """A line of the list."""

    kind: Kind
    test: str
    reason: str

    def matches(self, skip: Skip) -> bool:
        pairs = ((skip.test, self.test), (skip.reason, self.reason))
        return all(fnmatchcase(text, pattern.replace("[", "[[]")) for text, pattern in pairs)


@dataclass(frozen=True, slots=True)
class Skip:
    """A skipped test and its reason."""

    test: str
    reason: str


def read(path: Path) -> list[Expected]:
    """Read a list.

    Raises:
        ValueError: if a line is malformed.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split("|", 2)]
        if len(parts) != 3 or parts[0] not in get_args(Kind):
            raise ValueError(f"{path}:{number} is no kind, test and reason with | between them: {line}")
        found.append(Expected(cast(Kind, parts[0]), parts[1], parts[2]))
    return found


def complaints(
    skips: Sequence[Skip], expected: Sequence[Expected], *, is_ci: bool, is_whole: bool
) -> list[str]:
    """Return messages about unlisted skips and, for a complete run under CI, about lines without a skip."""
    found = []
    for skip in skips:
        kinds = {line.kind for line in expected if line.matches(skip)}
        if not kinds:
            found.append(f"{skip.test} was skipped, which is not expected: {skip.reason}")
        elif is_ci and kinds == {"missing"}:
            found.append(f"{skip.test} was skipped, which may not be under CI: {skip.reason}")
    if is_ci and is_whole:
        found += [
            f"no test was skipped as {line.test}: {line.reason}"
            for line in expected
            if line.kind == "always" and not any(line.matches(skip) for skip in skips)
        ]
    return found


class Skips:
    """Compare a run's skips with the list."""

    def __init__(self, path: Path = LIST) -> None:
        self._expected = read(path)
        self._skips: list[Skip] = []
        self._complaints: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "wasxfail"):
            self._note(report)

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skips.append(Skip(report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._complaints = complaints(
            self._skips,
            self._expected,
            is_ci=bool(os.environ.get("CI")),
            is_whole=_is_whole(session) and not session.shouldstop and not session.shouldfail,
        )
        if self._complaints and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._complaints:
            terminalreporter.section(f"not as {LIST.name} has it", red=True)
            for line in self._complaints:
                terminalreporter.write_line(line)


def _is_whole(session: pytest.Session) -> bool:
    config = session.config
    chosen = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf")  # `lf` belongs to a plugin
    is_chosen = any(config.getoption(name, None) for name in chosen)
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not is_chosen
