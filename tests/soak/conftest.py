"""Servers for the soak tests: the real command and engine, with a fake runner that computes nothing.

Each test of this folder runs at both sizes of `scale`. Figures that tests measure are printed at the end of
pytest's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.soak.lag import reporting_lag
from tests.support.scale import Scale
from tests.support.server_process import ServerProcess

Serve = Callable[..., ServerProcess]
Report = Callable[[str], None]
REPORTED = pytest.StashKey[list[str]]()


@pytest.fixture(autouse=True)
def _at_both_sizes(scale: Scale) -> None:
    """Parametrise every test with `scale`, so that every test also runs outside `make soak`."""


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Return a function that reports figures that no assertion can judge, whether or not the test passes."""
    lines, name = request.config.stash.setdefault(REPORTED, []), request.node.name
    return lambda text: lines.append(f"{name}: {text}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(REPORTED, []):
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def serve(report: Report) -> Iterator[Serve]:
    """Start servers: `serve("--max-batch-size", "8", FAKE_STEP_S="0.001")`; `is_real`: the demo model."""
    with ExitStack() as stack:

        def start(*arguments: str, is_real: bool = False, **environ: str) -> ServerProcess:
            command = ("tgi_asgi",) if is_real else ("tests.server.fake_server", "--model-id", "fake")
            local = ("--hostname", "127.0.0.1", "--debug-endpoints")
            server = stack.enter_context(ServerProcess(*command, *local, *arguments, environ=environ))
            server.wait_until_healthy()
            stack.enter_context(reporting_lag(server.url, report))
            return server

        yield start
