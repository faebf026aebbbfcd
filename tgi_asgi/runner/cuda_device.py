"""The device interface of the CUDA runner: kernels, pinned memory, copies, events, graphs and free memory.

Tests substitute an emulated device here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.ops.cuda_errors import is_out_of_memory
from tgi_asgi.runner.plan import DeviceLost

logger = logging.getLogger(__name__)

_cuda: Any = torch.cuda
# Least number of prompt tokens in a step: a GPU computes products of about 200 tokens in the time that it
# needs to read the weights.
MIN_CHUNK = 512


class Event(Protocol):
    """A point in the device's work; submitting it again moves it."""

    def synchronize(self) -> None:
        """Wait, without the GIL, until the device has reached the event; return at once if it is nowhere."""


class Copy(NamedTuple):
    """A copy of the first bytes of a tensor, between pinned memory and the device."""

    target: Tensor
    source: Tensor
    num_bytes: int


class Prepared(Protocol):
    """Commands that native code can submit.

    Attributes:
        address: That of their `DeviceCalls` (csrc/bindings/device_calls.h), valid as long as the object.
    """

    address: int


# What a device does: a copy, an event that it reaches, a graph, or the launches of a Python call.
Command = Copy | Event | Callable[[], None]


class Device(Protocol):
    """A device that computes in the order of the calls.

    Attributes:
        backend: Backend of `torch.distributed`, for devices that compute a model together.
    """

    backend: ClassVar[str]
    device: torch.device

    def __init__(self, index: int) -> None:
        """Use the device of this index, which is the rank of its shard."""

    @staticmethod
    def count() -> int:
        """Return the number of devices."""

    def pinned(self, num_bytes: int) -> Tensor:
        """Return host memory [num_bytes] uint8 that is copied to and from the device asynchronously."""

    def event(self) -> Event:
        """Return a new event."""

    def submit(self, commands: Sequence[Command]) -> None:
        """Begin to do these in order, after everything called so far; does not wait for the device.

        Raises:
            Exception: what a call raises, or an error of the device; later commands are not submitted.
        """

    def prepared(self, commands: Sequence[Command]) -> Prepared:
        """Return commands, the last of them an event, for a thread that has entered to submit later."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Return a command that does everything `call` does, at the cost of one launch.

        `call` uses fixed buffers and never waits for the device.
        """

    def enter_thread(self) -> None:
        """Prepare the calling thread, which must make all further calls."""

    def is_lost(self, error: Exception) -> bool:
        """Return whether the error means that nothing can succeed on this device any more."""

    def limit_memory(self, share: float) -> None:
        """Let this process use at most this share of the device's memory, whatever else is free."""

    def free_bytes(self) -> int:
        """Return the free memory in bytes, as far as this process may use it."""

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return the most bytes of memory that a call adds to what is in use."""


class CudaDevice:
    """A CUDA device through torch; the runner's work has its own stream."""

    backend: ClassVar[str] = "nccl"

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self._stream = _cuda.Stream(self.device)
        self._extension: Any = importlib.import_module("tgi_asgi._cuda")
        self._graph_memory: Any = None  # one pool: graphs run one at a time and share their temporary memory
        self._memory_share = 1.0

    @staticmethod
    def count() -> int:
        """Return torch's count, which honours CUDA_VISIBLE_DEVICES."""
        return torch.cuda.device_count()

    def pinned(self, num_bytes: int) -> Tensor:
        """Return pinned memory, as described in `Device.pinned`."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def event(self) -> Event:
        """Return an event of the extension."""
        event: Event = self._extension.Event()
        return event

    def submit(self, commands: Sequence[Command]) -> None:
        """Submit to the thread's current stream, in one call without the GIL.

        Each time that a thread releases the GIL it may have to wait 5 ms for it.
        """
        self._extension.submit(commands)

    def prepared(self, commands: Sequence[Command]) -> Prepared:
        """Read the commands now, so that submitting them needs no GIL."""
        prepared: Prepared = self._extension.Prepared(commands)
        return prepared

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Capture a CUDA graph; a call before the capture lets libraries allocate what they need."""
        call()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are checked: NCCL's own thread queries events at any time.
        with torch.cuda.graph(
            graph, pool=self._graph_memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            call()
        self._graph_memory = self._graph_memory or graph.pool()
        replay: Callable[[], None] = graph.replay
        if hasattr(graph, "raw_cuda_graph_exec"):  # later torch: submitted without the GIL
            replay = self._extension.Graph(graph, graph.raw_cuda_graph_exec())
        return replay

    def enter_thread(self) -> None:
        """Make the runner's stream current, after synchronising with work already on the device."""
        torch.cuda.set_device(self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.set_stream(self._stream)

    def is_lost(self, error: Exception) -> bool:
        """Ask the device itself: errors that end its context are returned by every call, others are not.

        A launch with wrong arguments fails alone; an illegal address fails every later call until the process
        ends (CUDA Runtime API, cudaErrorIllegalAddress). The messages do not distinguish the two.
        """
        if is_out_of_memory(error):
            return False
        try:
            torch.cuda.synchronize(self.device)
        except Exception as again:
            logger.error("the device is lost: %s", again)
            return True
        return False

    def limit_memory(self, share: float) -> None:
        """Let torch fail beyond the share, and count only what is left of it."""
        self._memory_share = share
        torch.cuda.set_per_process_memory_fraction(share, self.device)

    def free_bytes(self) -> int:
        """Ask the driver, after torch has released its cached memory."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        left = int(total * self._memory_share) - torch.cuda.memory_reserved(self.device)
        return max(min(int(free), left), 0)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Ask torch's allocator, what it wastes included."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        call()
        return int(torch.cuda.max_memory_reserved(self.device) - before)


def register_kernels() -> None:
    """Register `torch.ops.tgi_cuda`, if the extension was built with CUDA."""
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("tgi_asgi._cuda")


@contextlib.contextmanager
def must_fit() -> Iterator[None]:
    """Turn out-of-memory errors of the GPU into one that says what to change.

    Raises:
        ModelLoadError: if the GPU ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error.__cause__ if isinstance(error, DeviceLost) else error):
            raise
        raise ModelLoadError(
            "the model does not fit the GPU's memory: use a smaller one, lower --max-batch-prefill-tokens "
            f"or --max-batch-size, free memory, or raise --cuda-memory-fraction if it is below 1 ({error})"
        ) from error
