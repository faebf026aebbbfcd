"""Commands in forks have their own variables, output and exit code, as in new interpreters."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO

import pytest

from tests.support.commands import run_command
from tests.support.forked import start_forked


@pytest.fixture
def output() -> Iterator[IO[str]]:
    with tempfile.TemporaryFile("w+") as file:
        yield file


def test_a_fork_has_the_variables_that_it_is_given_and_no_others() -> None:
    refused = run_command(PORT="x")
    assert refused.returncode == 2
    assert "PORT='x'" in refused.stderr and not refused.stdout
    run = run_command("--env", "--model-id", "/there/is/none", MAX_BATCH_SIZE="7")
    assert run.returncode == 1
    assert "max_batch_size=7" in run.stdout
    assert run.stderr.splitlines()[-1] == "tgi-asgi: no such file or directory: /there/is/none"


def test_a_fork_that_a_signal_ends_says_which(output: IO[str]) -> None:
    environ = {"PATH": os.environ["PATH"], "PORT": "0"}
    command = ["tests.server.fake_server", "--model-id", "fake"]
    process = start_forked(command, environ, stdout=output, stderr=output)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(60) == process.poll() == -signal.SIGKILL


def test_an_exception_that_nobody_catches_has_its_traceback_and_exit_code_1(output: IO[str]) -> None:
    process = start_forked(["there.is.none"], {}, stdout=output, stderr=output)
    assert process.wait(60) == 1
    output.seek(0)
    assert "No module named 'there'" in output.read()


@pytest.mark.parametrize("name", ["PYTHONPATH", "TGI_ISA"])
def test_what_is_read_at_start_is_refused(output: IO[str], name: str) -> None:
    with pytest.raises(AssertionError, match="needs a new interpreter"):
        start_forked(["tgi_asgi"], {name: "x"}, stdout=output, stderr=output)
