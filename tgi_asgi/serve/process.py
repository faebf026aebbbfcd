"""Process-level concerns: one engine per parent, standard streams, the file limit, how the process ends.

Used by `app.py` (under another server) and `server.py` (under the native one); imports nothing else of the
project but `errors`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
from typing import NoReturn

from tgi_asgi.errors import ModelLoadError

logger = logging.getLogger(__name__)

MAX_FILES = 65536
MIN_FILES = 64  # a server without clients has about 30 open
FLUSH_S = 1.0  # time for a stream's last events to be sent once generation has ended

_claim: socket.socket | None = None  # held until the process ends; the kernel then frees the name


def claim_parent() -> None:
    """Raise if this process is a second worker of the same parent, because it would load the model again.

    Several servers started from one shell are legitimate, so only children spawned by `multiprocessing`
    (hypercorn's and uvicorn's workers) compete. The claim is a socket in Linux's abstract namespace, named
    after the parent. Other systems have no such namespace, so nothing is checked there.

    Raises:
        ModelLoadError: if another worker of this parent holds the claim.
    """
    global _claim
    if _claim is not None or multiprocessing.parent_process() is None or sys.platform != "linux":
        return
    # Process ids are unique only within a PID namespace, and containers may share a network namespace.
    namespace = os.readlink("/proc/self/ns/pid")
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0tgi-asgi/{namespace}/{os.getppid()}")
    except OSError:
        claim.close()
        raise ModelLoadError(
            "this is a second worker, and each worker loads the model: start hypercorn with --workers 0"
        ) from None
    _claim = claim


def open_standard_streams() -> None:
    """Make all standard streams usable: closed ones read and write nothing, and output takes any text.

    Otherwise `sys.stdout` or `sys.stderr` is None, and a socket or file gets the number of the closed stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, that of the stream
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, "w" if number else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8; stderr escapes by default
        sys.stdout.reconfigure(errors="backslashreplace")


def end_on_signals() -> None:
    """End quietly on SIGINT from now on, and on SIGTERM if this is the init process of its PID namespace.

    The kernel ignores SIGTERM to such a process, a container's first, until it has a handler. One that is
    stopped while it imports libraries or downloads a model would run on until it is killed.
    """

    def end(number: int, frame: object) -> None:
        end_process(None, 128 + number)

    signal.signal(signal.SIGINT, end)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, end)


def shorten_waits_for_gil() -> None:
    """Let a thread wait 1 ms for the GIL instead of 4.4 (p90 under load)."""
    sys.setswitchinterval(0.001)


def say(text: str) -> None:
    """Print text for people. A full disk or a reader that has gone (`| head`) must not stop the server."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def end_process(reason: str | None, code: int, *, is_logged: bool = False) -> NoReturn:
    """End the process now, with `reason` as its last line, without waiting for threads.

    A loading thread inside a download or an extension cannot be interrupted; a normal exit would wait for it.

    Args:
        is_logged: Whether the reason is a line of the log: of a JSON log, each line is an object.
    """
    if reason is not None and is_logged:
        logger.log(logging.ERROR if code else logging.INFO, reason)
    elif reason is not None:
        with contextlib.suppress(OSError):  # a closed pipe or a full disk must not change the exit code
            print(f"tgi-asgi: {reason}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def raise_file_limit() -> None:
    """Raise the file descriptor limit to what the system grants, at most `MAX_FILES`.

    Each connection uses one. Shells and container runtimes set it to 1,024 by default, for programs that use
    `select`.

    Raises:
        ModelLoadError: if that leaves none for connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if wanted < MIN_FILES:
        raise ModelLoadError(
            f"the process may open {wanted} files (ulimit -Hn): it needs {MIN_FILES} or more"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
