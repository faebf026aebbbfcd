"""What the CUDA runner needs of its device beside the operators: pinned memory, events, graphs, free memory.

A seam: tests put an emulated device in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_cuda: Any = torch.cuda


class Event(Protocol):
    """A point in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device is there, without the GIL."""


class Device(Protocol):
    """A device that computes in the order of the calls.

    Attributes:
        backend: of `torch.distributed`, for devices that compute a model together.
    """

    backend: ClassVar[str]
    device: torch.device

    def __init__(self, index: int) -> None:
        """Take the device of this number, which is the rank of the process that has it."""

    @staticmethod
    def count() -> int:
        """Return how many devices there are."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Return host memory [num_bytes] uint8 that copies to and from the device need not wait for."""

    def record(self) -> Event:
        """Mark the end of what was called so far."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Return something that does all of what `call` does, at the cost of one launch.

        `call` works on fixed buffers and never waits for the device.
        """

    def enter_thread(self) -> None:
        """Prepare the calling thread, which will make all calls from now on."""

    def is_lost(self, error: Exception) -> bool:
        """Tell whether the error means that nothing can succeed on this device any more."""

    def free_bytes(self) -> int:
        """Return the memory that is free."""


class CudaDevice:
    """A CUDA device as torch has it; the runner's work has a stream of its own."""

    backend: ClassVar[str] = "nccl"

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self._stream = _cuda.Stream(self.device)
        self._graph_memory: Any = None  # one pool: graphs run one at a time, and share what they use inside

    @staticmethod
    def count() -> int:
        """Ask torch, which sees those of CUDA_VISIBLE_DEVICES."""
        return torch.cuda.device_count()

    def pinned(self, num_bytes: int) -> Tensor:
        """Return pinned memory, as `Device.pinned` says."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def record(self) -> Event:
        """Record an event on the runner's stream."""
        event: Event = _cuda.Event(blocking=True)
        _cuda.current_stream().record_event(event)
        return event

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Capture a CUDA graph; the first call, outside of it, lets libraries allocate what they need."""
        call()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What this thread may not call is watched: NCCL's own asks for events whenever it likes.
        with torch.cuda.graph(
            graph, pool=self._graph_memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            call()
        self._graph_memory = self._graph_memory or graph.pool()
        return graph.replay

    def enter_thread(self) -> None:
        """Make the runner's stream the thread's, after what others have begun to put on the device."""
        torch.cuda.set_device(self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.set_stream(self._stream)

    def is_lost(self, error: Exception) -> bool:
        """Ask the device itself: errors that end its context come back with every call, others do not.

        A launch with wrong arguments fails alone, an illegal address all that follows until the process ends
        (CUDA Runtime API, cudaErrorIllegalAddress). Their texts do not tell.
        """
        if isinstance(error, torch.OutOfMemoryError):
            return False
        try:
            torch.cuda.synchronize(self.device)
        except Exception as again:
            logger.error("the device is lost: %s", again)
            return True
        return False

    def free_bytes(self) -> int:
        """Ask the driver, after torch has given back what it keeps."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free)
