"""The rules of a run, tested by small runs: time limits, skips, nightly markers, network access, reports."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import skips

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
CONFTEST = """
from tests.support.reports import Reports
from tests.support.selection import Selection
from tests.support.skips import Skips
from tests.support.time_limit import TimeLimit

def pytest_configure(config):
    config.pluginmanager.register(Selection(["soak", "page"]))
    config.pluginmanager.register(TimeLimit(["soak"], grace_s=GRACE_S))
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(config.rootpath / "expected.txt"))
    elif not Reports.are_all_wanted(config):
        config.pluginmanager.register(Reports())
"""
INI = """
[pytest]
addopts = -p pytest_asyncio.plugin -p no:cacheprovider -ra
testpaths = .
asyncio_mode = auto
markers =
    thorough: ..
    faults: ..
    soak: ..
    page: ..
    demo: ..
    time_limit: ..
"""


def run(
    folder: Path, tests: str, *arguments: str, expected: str = "", ci: bool = False, grace_s: float = 10
) -> tuple[int, str]:
    """Run a test file under the rules; return the exit status and the output."""
    (folder / "conftest.py").write_text(CONFTEST.replace("GRACE_S", str(grace_s)))
    (folder / "pytest.ini").write_text(INI)
    (folder / "expected.txt").write_text(textwrap.dedent(expected))
    (folder / "test_it.py").write_text("import asyncio, pytest, socket, time\n" + textwrap.dedent(tests))
    environ = {name: value for name, value in os.environ.items() if name != "CI"}
    # Of the installed plugins, runs load those that they use, which takes half of the time.
    environ |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **({"CI": "1"} if ci else {})}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_tests_that_hang_fail_with_stacks_and_the_others_run(tmp_path: Path) -> None:
    status, output = run(
        tmp_path,
        """
        short = pytest.mark.time_limit(1)

        @short
        def test_sleeps():
            time.sleep(60)

        async def waits_for_what_never_comes():
            await asyncio.Event().wait()

        @short
        async def test_awaits():
            await asyncio.create_task(waits_for_what_never_comes())

        async def spins_in_a_task():
            while True:
                await asyncio.sleep(0)

        @short
        async def test_spins():
            spinning = asyncio.create_task(spins_in_a_task())
            while True:
                await asyncio.sleep(0)

        @pytest.fixture
        def endless():
            yield
            time.sleep(60)

        @short
        def test_never_ends(endless):
            pass

        def test_fine():
            pass
        """,
    )
    assert status == 1
    assert "3 failed, 2 passed" in output and "ERROR test_it.py::test_never_ends" in output
    assert "the test took more than 1 s" in output
    assert "in waits_for_what_never_comes" in output and "in spins_in_a_task" in output
    assert "thread MainThread:" in output


def test_stacks_that_are_long_in_coming_come_whole(tmp_path: Path) -> None:
    """On a busy machine stacks took seconds: each signal restarted them, until the run ended."""
    status, output = run(
        tmp_path,
        """
        from tests.support import time_limit

        def slow_stacks():
            time.sleep(1.5 * time_limit._AGAIN_S)
            return "all of them"

        @pytest.mark.time_limit(0.1)
        def test_hangs(monkeypatch):
            monkeypatch.setattr(time_limit, "stacks", slow_stacks)
            time.sleep(60)

        def test_fine():
            pass
        """,
    )
    assert status == 1
    assert "1 failed, 1 passed" in output and "all of them" in output


def test_a_test_may_take_its_whole_limit_if_it_returns_to_python(tmp_path: Path) -> None:
    """The process would exit after 0.3 s, if each step of 0.1 s did not postpone that."""
    status, output = run(
        tmp_path,
        """
        from tests.support import time_limit

        time_limit.CALL_S = 0.1

        @pytest.mark.time_limit(60)
        def test_sleeps():
            time.sleep(0.8)
        """,
        grace_s=0.1,
    )
    assert status == 0, output
    assert "1 passed" in output


def test_a_test_that_never_returns_to_python_ends_the_process_with_stacks(tmp_path: Path) -> None:
    status, output = run(
        tmp_path,
        """
        import signal

        @pytest.mark.time_limit(0.1)
        def test_hangs():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(60)
        """,
        grace_s=0.5,
    )
    assert status == 1
    assert "Timeout" in output and "in test_hangs" in output


@pytest.mark.parametrize(
    ("expected", "is_ci", "complaint"),
    [
        ("", False, "test_it.py::test_one was skipped, which is not expected: no such thing"),
        ("always | test_it.py::test_two* | no such *", False, "not expected"),
        ("always | test_it.py::test_one | another", False, "not expected"),
        ("always | test_it.py::test_one | no such *", True, None),
        ("machine | test_it.py::* | no such thing", True, None),
        ("missing | test_it.py::* | no such thing", False, None),
        ("missing | test_it.py::* | no such thing", True, "which may not be under CI: no such thing"),
        ("machine | * | *\nalways | test_it.py::test_two[1] | slow", False, None),
        (
            "machine | * | *\nalways | test_it.py::test_two[1] | slow",
            True,
            "no test was skipped as test_it.py",
        ),
        ("machine | * | *\nmachine | test_it.py::test_two* | slow", True, None),
    ],
)
def test_skips_are_as_the_list_has_them(
    tmp_path: Path, expected: str, is_ci: bool, complaint: str | None
) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"# A comment.\n\n{expected}\n")
    found = skips.complaints(
        [skips.Skip("test_it.py::test_one", "no such thing")], skips.read(path), is_ci=is_ci, is_whole=True
    )
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]


SKIPPED = """
    def test_one():
        pytest.skip("no such thing")

    def test_two():
        pass
    """


@pytest.mark.parametrize("ci", [False, True])
def test_a_skip_that_is_not_listed_fails_the_run(tmp_path: Path, ci: bool) -> None:
    status, output = run(tmp_path, SKIPPED, expected="missing | test_it.py::* | no such thing", ci=ci)
    assert "1 passed, 1 skipped" in output
    assert (status, "not as expected_skips.txt has it" in output) == (int(ci), ci)


def test_a_part_of_the_tests_need_not_have_every_skip(tmp_path: Path) -> None:
    expected = "always | test_it.py::test_one | no such *"
    assert run(tmp_path, SKIPPED, "-k", "two", expected=expected, ci=True)[0] == 0
    assert run(tmp_path, SKIPPED, "test_it.py::test_two", expected=expected, ci=True)[0] == 0


def test_a_module_that_is_skipped_whole_is_a_skip(tmp_path: Path) -> None:
    module = "pytest.skip('nothing here', allow_module_level=True)"
    status, output = run(tmp_path, module)
    assert "test_it.py was skipped, which is not expected: nothing here" in output
    assert status != 0


def test_the_list_of_this_tree_can_be_read_and_others_are_refused(tmp_path: Path) -> None:
    assert skips.read(skips.LIST)
    path = tmp_path / "list.txt"
    path.write_text("sometimes | test | reason\n")
    with pytest.raises(ValueError, match=r"list.txt:1 is no kind"):
        skips.read(path)


MARKED = """
    @pytest.fixture
    def demo_files():
        return 1

    @pytest.fixture
    def indirectly(demo_files):
        return demo_files

    def test_plain(): ...

    def test_fetches(indirectly): ...

    @pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.soak)])
    def test_size(size): ...

    @pytest.mark.faults
    def test_fault(): ...

    @pytest.mark.thorough
    def test_more(): ...

    @pytest.mark.page
    def test_page(demo_files): ...
    """


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("", {"test_plain", "test_fetches", "test_size[1]"}),
        ("-m 'not demo'", {"test_plain", "test_size[1]"}),
        ("-m soak", {"test_size[2]"}),
        ("-m 'soak or not soak'", {"test_plain", "test_fetches", "test_size[1]", "test_size[2]"}),
        ("-m 'thorough or not thorough'", {"test_plain", "test_fetches", "test_size[1]", "test_more"}),
        ("-m 'page and demo'", {"test_page"}),
        ("-m faults", {"test_fault"}),
        ("test_it.py -m 'not demo'", {"test_plain", "test_size[1]", "test_more", "test_fault"}),
        ("test_it.py::test_more", {"test_more"}),
    ],
)
def test_what_takes_minutes_must_be_named_and_what_fetches_is_marked(
    tmp_path: Path, chosen: str, names: set[str]
) -> None:
    _, output = run(tmp_path, MARKED, "--collect-only", "-q", *shlex.split(chosen))
    found = {line.partition("::")[2] for line in output.splitlines() if "::" in line}
    assert found == names


OUTCOMES = """
    @pytest.fixture
    def fails():
        raise ValueError("in the setup")

    @pytest.fixture
    def fails_late():
        yield
        raise ValueError("in the teardown")

    def test_passes(): ...

    def test_fails():
        assert False

    def test_skips():
        pytest.skip("no such thing")

    @pytest.mark.xfail
    def test_fails_as_expected():
        assert False

    def test_lacks_its_setup(fails): ...

    def test_has_a_bad_end(fails_late): ...
    """


COUNTING = """
reports = []

def pytest_runtest_logreport(report):
    reports.append(report)

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(reports)} reports")
"""


@pytest.mark.parametrize(("arguments", "num_reports"), [([], 7), (["--durations=3"], 17)])
def test_a_worker_reports_every_outcome_and_no_setup_that_passed(
    tmp_path: Path, arguments: list[str], num_reports: int
) -> None:
    (tmp_path / "counting.py").write_text(COUNTING)
    distributed = ["-p", "xdist.plugin", "-p", "counting", "-n", "1"]
    expected = "always | test_it.py::test_skips | no such thing"
    status, output = run(tmp_path, OUTCOMES, *distributed, *arguments, expected=expected)
    assert status == 1
    assert "1 failed, 2 passed, 1 skipped, 1 xfailed, 2 errors" in output
    assert "in the setup" in output and "in the teardown" in output
    assert f"{num_reports} reports" in output


def test_only_tests_that_are_marked_reach_other_machines(tmp_path: Path) -> None:
    status, output = run(
        tmp_path,
        """
        ELSEWHERE = ("192.0.2.1", 80)  # reserved for documentation

        def reach(address):
            with socket.socket() as own:
                own.settimeout(0.01)
                own.connect(address)

        def test_elsewhere():
            reach(ELSEWHERE)

        def test_by_name():
            reach(("example.invalid", 80))

        def test_here():
            with socket.create_server(("127.0.0.1", 0)) as listener:
                reach(listener.getsockname())

        @pytest.mark.demo
        def test_marked():
            with pytest.raises(OSError):
                reach(ELSEWHERE)
        """,
    )
    assert status == 1
    assert "2 failed, 2 passed" in output
    assert "a test without the marker `demo` connects to 192.0.2.1" in output
