"""Parts of a GPU stage in processes of their own, so that a bad kernel spoils only its own part.

After an illegal address every later call of a process fails, and a kernel that hangs never ends. A forked
process needs a second for its CUDA context; a new interpreter would first import torch for several.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def apart(call: Callable[[], _Result], limit_s: float) -> _Result:
    """Return what `call` returns in a forked process; what it reports to files is kept in any case.

    A GPU that this process has used already cannot be used by a forked one. The call is then made here,
    without a limit.

    Raises:
        RuntimeError: if the call raises, ends its process, or takes longer than `limit_s`.
    """
    if torch.cuda.is_initialized():
        return call()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(call, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            raise RuntimeError(f"it was not done after {limit_s:.0f} s")
        can_use_gpu, result, why = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with status {process.exitcode}") from None
    finally:
        receiver.close()
        process.kill()
        process.join()  # its memory on the GPU is free only then
    if not can_use_gpu:
        return call()
    if why is not None:
        raise RuntimeError(why)
    found: _Result = result
    return found


def _run(call: Callable[[], object], sender: Connection) -> None:
    """Send whether the GPU can be used here, what the call returned, and why it failed."""
    try:
        open_gpu()
    except Exception:
        sender.send((False, None, None))
        return
    try:
        sender.send((True, call(), None))
    except Exception as error:
        sender.send((True, None, str(error) or type(error).__name__))


def open_gpu() -> None:
    """Initialise CUDA in this process, which raises if its parent has; a test without a GPU replaces it."""
    torch.cuda.init()
