"""The runner's device for tests: emulated kernels, synchronous execution, graphs as rigid as CUDA's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tgi_asgi.runner.cuda_device import Command, Copy

_aten: Any = torch.ops.aten
# Operators that wait for the device, or copy from memory that is not pinned: CUDA cannot capture them.
_FORBIDDEN = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.lift_fresh.default,
    _aten.masked_select.default,
}  # fmt: skip


class Event:
    """The end of work that is already finished."""

    def synchronize(self) -> None:
        pass


DeviceCall = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_libc = ctypes.CDLL(None)
_libc.strdup.restype = ctypes.c_void_p


class DeviceCalls(ctypes.Structure):
    """The struct of csrc/bindings/device_calls.h."""

    _fields_ = (("self", ctypes.c_void_p), ("submit", DeviceCall), ("wait", DeviceCall))


class Prepared:
    """Calls that submit commands, and then wait for the last, as native code makes them."""

    def __init__(self, submit: Callable[[], None], wait: Callable[[], None]) -> None:
        self._calls = DeviceCalls(None, _as_native(submit), _as_native(wait))
        self.address = ctypes.addressof(self._calls)


def _as_native(call: Callable[[], None]) -> Any:
    """Return a C function that makes a call and returns null, or the text of what it raises."""

    def function(this: Any) -> Any:
        try:
            call()
        except Exception as error:
            return _libc.strdup(str(error).encode())
        return None

    return DeviceCall(function)


class EmulatedDevice:
    """A `Device` of emulated kernels, which runs everything synchronously.

    Attributes:
        captured, replayed: Number of graphs that were captured, and number of replays.
        failure: Exception that replaying a graph raises, if any.
        peak: What `peak_bytes` says.
    """

    backend: ClassVar[str] = "gloo"

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cpu")
        self.captured = 0
        self.replayed = 0
        self.failure: Exception | None = None
        self.memory_share = 0.0
        self.peak = 0

    @staticmethod
    def count() -> int:
        return 2

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def event(self) -> Event:
        return Event()

    def submit(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Copy):
                _make(command)
            elif not isinstance(command, Event):
                command()  # type: ignore[operator]

    def prepared(self, commands: Sequence[Command]) -> Prepared:
        *_, event = commands
        assert isinstance(event, Event)
        return Prepared(lambda: self.submit(commands), event.synchronize)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        call()
        with Graph() as graph:
            call()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            if self.failure is not None:
                raise self.failure
            graph.replay()

        return replay

    def enter_thread(self) -> None:
        torch.set_num_threads(1)

    def is_lost(self, error: Exception) -> bool:
        return "CUDA error" in str(error)

    def limit_memory(self, share: float) -> None:
        self.memory_share = share

    def free_bytes(self) -> int:
        return 1 << 30

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return self.peak


def _make(copy: Copy) -> None:
    target, source = (tensor.view(torch.uint8).flatten() for tensor in (copy.target, copy.source))
    assert target.data_ptr() == copy.target.data_ptr(), "a target without gaps"
    assert copy.num_bytes <= min(len(target), len(source)), "within both"
    target[: copy.num_bytes].copy_(source[: copy.num_bytes])


class Graph(TorchDispatchMode):
    """Records the operators called, with the exact tensors and numbers that they were called with.

    As in a CUDA capture, our kernels do not run meanwhile. torch's operators do, because their outputs are
    needed.

        with Graph() as graph:
            call()
        graph.replay()  # does not run the Python of `call` again: its decisions and reads stay as they were

    Raises:
        AssertionError: if an operator cannot be part of a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _FORBIDDEN, f"{func} cannot be captured"
        is_only_launched = func.namespace == "tgi_cuda" and not func._schema.returns
        out = None if is_only_launched else func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Call everything again; results are written to the original outputs."""
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for work in pytree.tree_leaves(again):
                if isinstance(work, torch.ScriptObject):  # a collective, which no stream orders here
                    work.wait()  # type: ignore[attr-defined]
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                # Neither a view nor in place.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
