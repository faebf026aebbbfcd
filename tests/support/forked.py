"""Start commands as forks of a process that has imported the server, instead of as new interpreters.

A new interpreter takes half a second of processor time to import the server, and about a hundred tests start
one. A fork then does as `python -m` does: it runs a module as `__main__` with its own arguments, variables
and output, until the interpreter ends. It does not show what a start imports, nor what Python and extensions
read from variables when they start. Tests of these start a new interpreter.

    process = start_forked(["tgi_asgi", "--version"], environ, stdout=file, stderr=file)
    assert process.wait(10) == 0

Programs other than the server are forks of a `Parent` with their own imports.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).parent.parent.parent
KEPT_VARIABLES = frozenset({"PATH", "HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "LD_LIBRARY_PATH"})
_LONGEST_REQUEST = 1 << 20
_LONGEST_RUN_S = 300


@dataclass(frozen=True, slots=True)
class Parent:
    """A process whose forks run commands.

    Attributes:
        imported: The modules that it imports.
        late: The modules that it must not have imported, because each fork imports them if it needs them.
        path: Folders of modules, which come before those of the installed packages.
    """

    imported: tuple[str, ...]
    late: tuple[str, ...] = ()
    path: tuple[str, ...] = ()


SERVER = Parent(
    imported=(
        "hypercorn.asyncio", "tgi_asgi.app", "tgi_asgi.cli", "tgi_asgi.commands.benchmark",
        "tgi_asgi.commands.download_weights", "tgi_asgi.runner.load", "tgi_asgi.serve.server",
        "tests.support.fake_runner", "tests.support.scripted_engine", "tests.support.toy_tokenizer",
        "filelock", "yaml",  # the Hub's library needs them
    ),
    # The Hub's library reads variables when it is imported; most models are served without torch.
    late=("huggingface_hub", "torch"),
)  # fmt: skip


class Process(Protocol):
    """A started command; a `subprocess.Popen` is one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


class ForkedProcess:
    """A command in a fork. Its parent writes its id to `status`, and its exit code once it has ended."""

    def __init__(self, command: Sequence[str], status: socket.socket) -> None:
        self._command, self._status = command, status
        self.pid = int(status.recv(64))
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; it is -N if signal N ended it."""
        if self._code is None and select.select([self._status], [], [], 0)[0]:
            self._read()
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: if it still runs after `timeout` seconds.
        """
        if self._code is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self._command, timeout or 0)
            self._read()
        assert self._code is not None
        return self._code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> None:
        with self._status:
            self._code = int(self._status.recv(64))


def start_forked(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdout: IO[Any],
    stderr: IO[Any],
    parent: Parent = SERVER,
) -> ForkedProcess:
    """Run `python -m` with a command in the repository's root, with these variables and no others."""
    early = {name for name in environ if name.startswith("PYTHON") and name != "PYTHONUNBUFFERED"}
    assert not early | environ.keys() & {"TGI_ISA"}, "what is read at start needs a new interpreter"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = json.dumps({"command": list(command), "environ": dict(environ)}).encode()
    with theirs, open(os.devnull, "rb") as stdin:
        files = [theirs.fileno(), stdin.fileno(), stdout.fileno(), stderr.fileno()]
        socket.send_fds(_started(parent), [request], files)
    return ForkedProcess(command, ours)


def run_forked(
    command: Sequence[str], environ: Mapping[str, str], parent: Parent = SERVER
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with the variables in `KEPT_VARIABLES` and those in `environ`."""
    kept = {name: text for name, text in os.environ.items() if name in KEPT_VARIABLES}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start_forked(command, {**kept, **environ}, stdout=stdout, stderr=stderr, parent=parent)
        try:
            code = process.wait(_LONGEST_RUN_S)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())


@functools.cache
def _started(parent: Parent) -> socket.socket:
    """Start a parent, which ends with this process; return the socket for requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environ = {name: value for name, value in os.environ.items() if name in KEPT_VARIABLES}
    environ["OMP_NUM_THREADS"] = "1"  # a fork would lose numpy's and torch's threads
    with theirs:
        words = [str(theirs.fileno()), json.dumps(asdict(parent))]
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.forked", *words],
            cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        )  # fmt: skip

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _fork_on_request(requests: socket.socket) -> list[str]:
    """Return the command in the fork that has to run it; in the parent, exit when nobody can ask any more."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, _LONGEST_REQUEST, 4)
        _reap()
        if not message:
            sys.exit()
        if os.fork():  # a keeper, so that several commands can be waited for
            for file in files:
                os.close(file)
            continue
        requests.close()
        status, *streams = files
        if child := os.fork():
            _keep(child, socket.socket(fileno=status), streams)
        os.close(status)
        for number, file in enumerate(streams):
            os.dup2(file, number)
            os.close(file)
        request = json.loads(message)
        os.environ.clear()
        os.environ.update(request["environ"])
        command: list[str] = request["command"]
        return command


def _keep(child: int, status: socket.socket, streams: list[int]) -> None:
    """Report a child's id and, when it has ended, its exit code; then end."""
    for file in (0, 1, 2, *streams):
        os.close(file)
    status.send(b"%d" % child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status.send(b"%d" % code)
    os._exit(0)


def _reap() -> None:
    """Collect the keepers that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _main(number: str, parent: Parent) -> None:
    sys.path[1:1] = parent.path
    for name in parent.imported:
        importlib.import_module(name)
    assert sys.modules.keys().isdisjoint(parent.late)
    gc.collect()
    gc.freeze()  # otherwise each fork would look at, and thereby copy, all that was imported
    module, *arguments = _fork_on_request(socket.socket(fileno=int(number)))
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1], Parent(**json.loads(sys.argv[2])))
