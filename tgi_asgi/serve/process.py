"""Process-level concerns of a server: one engine per parent, the file limit, and how the process ends.

Used by `app.py` (under another server) and `server.py` (under the native one); imports nothing else of the
project but `errors`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import socket
import sys
from typing import NoReturn

from tgi_asgi.errors import ModelLoadError

MAX_FILES = 65536

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


def end_process(reason: str | None, code: int) -> NoReturn:
    """End the process now, with `reason` as its last line, without waiting for threads.

    A loading thread inside a download or an extension cannot be interrupted; a normal exit would wait for it.
    """
    if reason is not None:
        print(f"tgi-asgi: {reason}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not change the exit code
            stream.flush()
    os._exit(code)


def raise_file_limit() -> None:
    """Raise the file descriptor limit to what the system grants, at most `MAX_FILES`; each connection uses
    one.

    Shells and container runtimes set it to 1,024 by default, for programs that use `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
