"""GPU timing for bench/gpu_*.py: medians of CUDA events over inputs that rotate past the L2 cache.

A short kernel takes no longer than its launch, and a call has up to four of them, so calls of less than 50 us
are timed 20 at a time inside a CUDA graph.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = torch.device("cuda")
L2_BYTES = 256 << 20  # more than any cache: the total size of the inputs is at least this
SHORT_US = 50.0
CALLS_A_GRAPH = 20
_RUNS = 21
_WARM_UP = 3
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of a call."""

    us: float  # the median
    spread: float  # interquartile range of all runs, relative to the median
    in_graph: bool = False  # timed among others in a CUDA graph, without launches

    def row(self) -> dict[str, Any]:
        """Return the timing in the form of a result."""
        return {"us": round(self.us, 2), "spread": round(self.spread, 3), "in_graph": self.in_graph}


def time_calls(calls: Sequence[Call], *, may_capture: bool = True) -> Timing:
    """Return the time of one of `calls`, which do the same on different data and are made in turn.

    With `may_capture` short calls are timed inside a graph, unless they cannot be captured.
    """
    turn = in_turn(calls)
    for _ in range(min(_WARM_UP, len(calls))):
        turn()
    synchronize()
    single = _time(turn)
    if not may_capture or single.us >= SHORT_US:
        return single

    def many() -> None:
        for _ in range(CALLS_A_GRAPH):
            turn()

    try:
        replay = capture(many)
    except RuntimeError:  # it, or a library that it uses, waits for the device
        return single
    replay()
    together = _time(replay)
    return Timing(together.us / CALLS_A_GRAPH, together.spread, in_graph=True)


def in_turn(calls: Sequence[Call]) -> Call:
    """Return a call that makes these in turn, so that none finds its inputs in the cache."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def copies_past_l2(num_bytes: int) -> int:
    """Return the number of input sets of this size that together exceed any cache."""
    return max(1, min(_RUNS, -(-L2_BYTES // max(num_bytes, 1))))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return random numbers on the device, never zeros, which need less power."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def _time(call: Call) -> Timing:
    events = [(make_event(), make_event()) for _ in range(_RUNS)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    synchronize()
    times = sorted(begin.elapsed_time(end) * 1e3 for begin, end in events)
    middle = statistics.median(times)
    return Timing(middle, (times[len(times) * 3 // 4] - times[len(times) // 4]) / max(middle, 1e-9))


# The functions that a test without a GPU replaces.


def make_event() -> Any:
    """Return an event that can be timed."""
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


def free_memory() -> None:
    """Return the memory of what is no longer used to the device.

    A recorded step refers to itself, so only the collector frees it: five models of one run after another
    would not fit otherwise.
    """
    gc.collect()
    torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait until the device has finished all its work."""
    torch.cuda.synchronize()


def capture(call: Callable[[], object]) -> Call:
    """Return the replay of a CUDA graph of a call, which must have been called before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
