"""A process that is a shard of a model: loads its part, and computes what the first shard sends.

`python -m tgi_asgi.runner.shard_worker PIPE`, a descriptor; started by `shard_processes.py` alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


def main(pipe: int) -> int:
    """Serve as a shard until the first one ends; return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the first drains, and needs this one for it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(pipe)
    try:
        parent: int = connection.recv()
        if os.getppid() != parent:  # it has ended before it could be watched
            return 1
        job = connection.recv()
    except EOFError:
        return 1
    try:
        follow = job.load(connection)
    except Exception as error:
        connection.send(f"shard {job.rank}: {error}")
        return 1
    connection.send(None)
    try:
        follow()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # what it leaves may wait for devices, and the first shard waits for its end
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
