"""The process itself: its standard streams, what it prints, and signals while it is the init process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tgi_asgi import cli
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.serve import process

STREAMS = """
import os, sys
from tgi_asgi.serve.process import end_process, open_standard_streams
open_standard_streams()
print("nobody reads this")
opened = os.open(os.devnull, os.O_RDONLY)
end_process("nor this", 7 if opened == 3 and sys.stdin.read() == "" and sys.stderr.isatty() is False else 1)
"""


@pytest.fixture
def _restored() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_closed_standard_streams_are_opened_on_the_null_device() -> None:
    shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell, sys.executable, STREAMS], check=False).returncode == 7


@pytest.mark.parametrize("number", [1, 2])
def test_a_disk_that_is_full_stops_nobody(number: int) -> None:
    script = "from tgi_asgi.serve.process import *; say('text'); end_process('reason', 3)"
    shell = f'exec "$0" -c "$1" {number}> /dev/full'
    assert subprocess.run(["sh", "-c", shell, sys.executable, script], check=False).returncode == 3


def test_text_that_the_terminal_cannot_show_is_escaped() -> None:
    script = "from tgi_asgi.serve.process import *; open_standard_streams(); say('modèle')"
    command = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(command, check=True, env=env, capture_output=True).stdout == b"mod\\xe8le\n"


def test_a_server_that_could_accept_nobody_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 20))
    with pytest.raises(ModelLoadError, match="may open 20 files"):
        process.raise_file_limit()


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("pid", "is_handled"), [(1, True), (2, False)])
def test_a_server_can_be_interrupted_from_the_start_and_an_init_process_also_terminated(
    monkeypatch: pytest.MonkeyPatch, pid: int, is_handled: bool
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: pid)
    monkeypatch.setattr(sys, "argv", ["tgi-asgi", "--version"])
    ended: list[tuple[str | None, int]] = []
    monkeypatch.setattr(process, "end_process", lambda reason, code: ended.append((reason, code)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the kernel treats it for an init process
    with pytest.raises(SystemExit):
        cli.main()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert ended == [(None, 130)] + [(None, 143)] * is_handled
