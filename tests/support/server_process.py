"""A server in its own process, as users start it: its address, its output, its exit code.

with ServerProcess("tgi-asgi", "--model-id", "model.gguf") as server:
    server.wait_until_healthy()
    httpx.get(server.url + "/info")
    server.signal(); assert server.wait() == 0
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.support.forked import KEPT_VARIABLES, ROOT, Process, start_forked

NEW_INTERPRETER = (sys.executable, "-m")  # as `program`: for tests of what a start imports or reads
START_TIMEOUT_S = 120.0  # the machine may be busy; a start takes 2 seconds
EXIT_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0
# httpx reads the machine's certificates for each client, also for plain HTTP: 47 ms of processor time each.
PLAIN_CLIENT = partial(httpx.Client, verify=False)


def free_port() -> int:
    """Return a port that has no listener at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """One run of `python -m <command>` with a free port in $PORT.

    It does not inherit settings from this process's environment; pass them in `environ`. `client` makes the
    HTTP client, for servers not reached over plain TCP. `program` is the program that runs the command, in
    the folder `cwd`; without one, the command runs in a fork of a process that has imported the server.
    """

    def __init__(
        self,
        *command: str,
        environ: dict[str, str] | None = None,
        port: int | None = None,
        client: Callable[[], httpx.Client] = PLAIN_CLIENT,
        program: Sequence[str] = (),
        cwd: Path = ROOT,
    ) -> None:
        self.client = client
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        base = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT_VARIABLES or name.startswith("PIP_")
        }
        environ = {**base, "PYTHONUNBUFFERED": "1", "PORT": str(self.port), **(environ or {})}
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed by __exit__
        self.process: Process
        if program:
            self.process = subprocess.Popen(
                [*program, *command], cwd=cwd, env=environ, stdout=self._output, stderr=subprocess.STDOUT
            )
        else:
            self.process = start_forked(command, environ, stdout=self._output, stderr=self._output)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if error is not None:
            print(self.output(), file=sys.stderr)
        self._output.close()

    def output(self) -> str:
        """Return what the server has written so far to stdout and stderr."""
        self._output.seek(0)
        return self._output.read()

    def wait_until(self, status: int) -> httpx.Response:
        """Wait until `/health` answers with this status; fail if the process ends first."""
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_s:
            with contextlib.suppress(httpx.TransportError), self.client() as client:
                answer = client.get(self.url + "/health", timeout=5)
                if answer.status_code == status:
                    return answer
            assert self.process.poll() is None, f"the server ended:\n{self.output()}"
            time.sleep(0.02)
        raise AssertionError(f"no {status} from /health:\n{self.output()}")

    def wait_until_healthy(self) -> None:
        """Wait until the model is loaded."""
        self.wait_until(200)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Send a request on a connection of its own."""
        with self.client() as client:
            return client.get(self.url + path, timeout=ANSWER_TIMEOUT_S, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """Send a request on a connection of its own."""
        with self.client() as client:
            return client.post(self.url + path, timeout=ANSWER_TIMEOUT_S, **options)

    @contextlib.contextmanager
    def stream(self, path: str, body: object) -> Iterator[httpx.Response]:
        """Post a body on a connection of its own; yield the answer, which has begun."""
        with (
            self.client() as client,
            client.stream("POST", self.url + path, json=body, timeout=ANSWER_TIMEOUT_S) as answer,
        ):
            yield answer

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process to end; return its exit code."""
        return self.process.wait(EXIT_TIMEOUT_S)
