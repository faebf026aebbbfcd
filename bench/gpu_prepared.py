"""Times of a GPU's prepared steps: writing them on the event loop, and asking the device for them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from tests.cuda.emulated_device import DeviceCall, DeviceCalls
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_device import Prepared


class _Timed:
    """Prepared commands whose submission is timed. ctypes takes the GIL around it, not within."""

    def __init__(self, prepared: Prepared, times: list[float]) -> None:
        self._prepared = prepared  # keeps the calls
        inner = DeviceCalls.from_address(prepared.address)
        self._calls = DeviceCalls(
            inner.self, DeviceCall(timed(times, inner.submit)), ctypes.cast(inner.wait, DeviceCall)
        )
        self.address = ctypes.addressof(self._calls)


def timed(times: list[float], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the call, which appends its seconds."""

    def measured(*given: Any) -> Any:
        start = time.perf_counter()
        result = call(*given)
        times.append(time.perf_counter() - start)
        return result

    return measured


def watch_pushes(runner: CudaRunner, pushes: list[float]) -> None:
    """Append the seconds that each step takes on the event loop, if it is prepared there."""
    steps = runner._prepared_steps
    assert steps is not None, "this runner prepares no steps"
    steps.push = timed(pushes, steps.push)  # type: ignore[method-assign]


def watch(runner: CudaRunner, pushes: list[float], submits: list[float]) -> None:
    """The same, and what the launcher's thread takes for it; being watched, it needs the GIL."""
    watch_pushes(runner, pushes)
    steps = runner._prepared_steps
    assert steps is not None
    prepared = steps._device.prepared
    steps._device.prepared = lambda commands: _Timed(prepared(commands), submits)  # type: ignore[method-assign]
