"""A process that is a shard of a model: loads its part and computes what shard 0 sends.

`python -m tgi_asgi.runner.shard_worker PIPE`, where PIPE is a descriptor; only `shard_processes.py` starts
it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

from tgi_asgi.errors import TgiError

_PR_SET_PDEATHSIG = 1


def main(pipe: int) -> int:
    """Serve as a shard until shard 0 ends; return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # shard 0 drains, and needs this one meanwhile
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(pipe)
    try:
        parent: int = connection.recv()
        if os.getppid() != parent:  # the parent ended before prctl took effect
            return 1
        job = connection.recv()
    except EOFError:
        return 1
    try:
        follow = job.load(connection)
    except TgiError as error:
        connection.send(f"shard {job.rank}: {error}")
        return 1
    except Exception as error:
        traceback.print_exc()
        connection.send(f"shard {job.rank}: {type(error).__name__}: {error}")
        return 1
    connection.send(None)
    try:
        follow()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # cleanup may wait for devices, and shard 0 waits for this process to end
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
