"""Start a server as its users do, wait until it answers, stop it, and measure its memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent
MIB = 1 << 20


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A server process and all its child processes.

        with Server.ours(["--model-id", "model.gguf"]) as server:
            ... server.url ...

    Attributes:
        start_s: Seconds from exec until `/health` returned 200.

    Raises:
        SystemExit: if it ends, or does not become healthy within `timeout_s`; its last output is printed.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        environ: Mapping[str, str] | None = None,
        timeout_s: float = 300,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # stop() closes
        started_s = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environ or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait(started_s + timeout_s)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - started_s

    @classmethod
    def ours(cls, arguments: Sequence[str] = (), *, environ: Mapping[str, str] | None = None) -> Self:
        """Start this project's server on a free port."""
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "tgi_asgi",
            "--hostname",
            "127.0.0.1",
            "--port",
            str(port),
            *arguments,
        ]
        return cls(command, port, environ=environ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process with SIGTERM, and what is left of its group by force. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        # vLLM's workers outlive a server that is ended while it loads, and would slow the next one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def memory_mib(self, kind: str = "Pss") -> float:
        """Return the current memory of its processes.

        Args:
            kind: "Pss", in which pages that several processes share count once, or "Rss".
        """
        return sum(_memory_kib(pid, kind) for pid in _family(self._process.pid)) / 1024

    def _wait(self, give_up_s: float) -> None:
        while True:
            if self._is_healthy():
                return
            if self._process.poll() is not None or time.perf_counter() > give_up_s:
                self._log.seek(0)
                raise SystemExit(f"the server did not start:\n{self._log.read()[-3000:]}")
            time.sleep(0.02)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:  # 503
            error.close()
            return False
        except OSError:  # not there yet
            return False


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _family(int(child))
    return found


def _memory_kib(pid: int, kind: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(kind + ":"):
                return int(line.split()[1])
    return 0
