"""A device whose tensors are not the host's: mixing them up fails as on a GPU, and kernels are emulated.

For torch it is a device of its own kind. Each of its tensors wraps one of the host's, which computes. An
operator refuses operands of both sides, except numbers; only a copy brings values from one side to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import make_device
from tests.emulation import bindings

NAME = "apart"
_HOST = torch.device("cpu")
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")  # their indices may be the host's


class OnDevice(Tensor):
    """A tensor of the device."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        return made

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def tolist(self) -> Any:
        """Return the values, which a GPU copies, too; a subclass would not."""
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        name = func._schema.name
        leaves = [*_leaves(args), *_leaves(given.values())]
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        is_apart = all(each.type == NAME for each in leaves if isinstance(each, torch.device))
        if name == "aten::copy_":
            is_apart = isinstance(args[0], OnDevice)
        if name not in _COPIES:
            operands = _leaves((args[0], *args[2:])) if name in _INDEXED else tensors
            there = [each for each in operands if isinstance(each, Tensor) and each.dim() > 0]
            wrong = [each for each in there if not isinstance(each, OnDevice)]
            if wrong:
                shapes = [list(each.shape) for each in wrong]
                raise RuntimeError(f"{name}: operands on the device, and on the host of shapes {shapes}")
        wrappers = {id(each.host): each for each in tensors if isinstance(each, OnDevice)}
        args = _on_host(args)
        given = {key: _on_host(value) for key, value in given.items()}

        def wrapped(made: Any) -> Any:
            if isinstance(made, Tensor):
                known = wrappers.get(id(made))
                return OnDevice(made) if known is None else known
            return type(made)(map(wrapped, made)) if isinstance(made, tuple | list) else made

        # Tensors made within `inference_mode` and outside could not be views of each other.
        with torch.inference_mode(False), torch.no_grad():
            out = func(*args, **given)
            return wrapped(out) if is_apart else out


# No argument of an operator is deeper than a list of tensors. torch's own functions for any tree took half
# the time of a step here.
def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the arguments, and what lists among them hold."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _leaves(value)
        else:
            yield value


def _on_host(value: Any) -> Any:
    """Return an argument with the host's tensors, and itself as the device, in place of the device's."""
    if isinstance(value, OnDevice):
        return value.host
    if isinstance(value, torch.device):
        return _HOST
    return type(value)(map(_on_host, value)) if isinstance(value, tuple | list) else value


class ApartDevice(EmulatedDevice):
    """The emulated device, apart from the host."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.device = torch.device(NAME, 0)


def find_device() -> torch.device:
    """Return the GPU if tests use one, otherwise this device, with the operators registered."""
    made = make_device()
    if made.device.type == "cuda":
        return made.device
    bindings.install()
    register()
    return torch.device(NAME, 0)


@functools.cache
def register() -> Any:
    """Register the device with torch, once per process; return what keeps it registered."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        kind = {} if memory_format is None else {"memory_format": memory_format}
        return OnDevice(torch.empty(size, dtype=dtype, device=_HOST, **kind))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device=_HOST))

    def copy_from(source: Tensor, target: OnDevice, non_blocking: bool = False) -> Tensor:
        target.host.copy_(source.host if isinstance(source, OnDevice) else source)
        return target

    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    return library
