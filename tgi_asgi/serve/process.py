"""What the operating system must know of a server process: one engine a parent, its files, and how it ends.

Used by `app.py` (under somebody else's server) and `server.py` (under ours); knows nothing of the rest.
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
    """Refuse to be a second worker of the same parent, which would load the model once more.

    Servers that the same shell starts side by side are legitimate, so only children that `multiprocessing`
    spawned (hypercorn's and uvicorn's workers) compete. The claim is a socket in Linux's abstract
    namespace, named after the parent; other systems have none, and nothing is checked there.

    Raises:
        ModelLoadError: another worker of this parent holds the claim.
    """
    global _claim
    if _claim is not None or multiprocessing.parent_process() is None or sys.platform != "linux":
        return
    # Process ids are unique within a namespace only, and containers may share the network's.
    namespace = os.readlink("/proc/self/ns/pid")
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0tgi-asgi/{namespace}/{os.getppid()}")
    except OSError:
        claim.close()
        raise ModelLoadError(
            "this is a second worker, and each would load the model: start hypercorn with --workers 0"
        ) from None
    _claim = claim


def end_process(reason: str | None, code: int) -> NoReturn:
    """End the process now with `reason` as its last line, without waiting for threads.

    A loading thread inside a download or an extension cannot be interrupted, and would be waited for.
    """
    if reason is not None:
        print(f"tgi-asgi: {reason}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not change the exit code
            stream.flush()
    os._exit(code)


def raise_file_limit() -> None:
    """Take as many file descriptors as the system grants, up to `MAX_FILES`: each connection is one.

    Shells and container runtimes give 1,024 by default, for programs that use `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
