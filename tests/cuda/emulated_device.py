"""The runner's device for tests: kernels emulated, everything done at once, graphs as rigid as CUDA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
# What waits for the device, or copies from memory that is not pinned: CUDA captures none of it.
_FORBIDDEN = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.lift_fresh.default,
    _aten.masked_select.default,
}  # fmt: skip


class Event:
    """The end of work that is done already."""

    def synchronize(self) -> None:
        pass


class EmulatedDevice:
    """A `Device` of emulated kernels: everything happens at once.

    Attributes:
        captured, replayed: how many graphs were made, and how often one of them ran.
        failure: what replaying a graph raises, if anything.
    """

    backend: ClassVar[str] = "gloo"

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cpu")
        self.captured = 0
        self.replayed = 0
        self.failure: Exception | None = None

    @staticmethod
    def count() -> int:
        return 2

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def record(self) -> Event:
        return Event()

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

    def free_bytes(self) -> int:
        return 1 << 30


class Graph(TorchDispatchMode):
    """Remembers the operators called, with the very tensors and numbers they were called with.

        with Graph() as graph:
            call()
        graph.replay()  # no Python of `call` runs again: what it decided and read then stays as it was

    Raises:
        AssertionError: an operator that a CUDA graph cannot have.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _FORBIDDEN, f"{func} cannot be captured"
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Call all again; results come to where they were the first time."""
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for work in pytree.tree_leaves(again):
                if isinstance(work, torch.ScriptObject):  # a collective, which no stream puts in order here
                    work.wait()  # type: ignore[attr-defined]
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # no view, nor in place
                    old.copy_(new)
