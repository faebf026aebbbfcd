"""A device whose tensors are not the host's: mixing them up fails as on a GPU, and kernels are emulated.

For torch it is a device of its own kind. Each of its tensors wraps one of the host's, which computes. An
operator refuses operands of both sides, except numbers; only a copy brings values from one side to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
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
_LISTS = (tuple, list)
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

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Show the values: torch's own code for that would show parts of it, and so on without end."""
        return repr(self.host)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        name = _name_of(func)
        wrappers: dict[int, OnDevice] = {}
        is_apart = True
        on_host: list[Tensor] = []
        for each in _leaves((*args, *given.values())):
            if isinstance(each, OnDevice):
                wrappers[id(each.host)] = each
            elif isinstance(each, Tensor):
                if each.dim() > 0:
                    on_host.append(each)
            elif isinstance(each, torch.device) and each.type != NAME:
                is_apart = False
        if name == "aten::copy_":
            is_apart = isinstance(args[0], OnDevice)
        if on_host and name not in _COPIES:
            if name in _INDEXED:
                operands = _leaves((args[0], *args[2:]))
                on_host = [each for each in on_host if any(each is operand for operand in operands)]
            if on_host:
                shapes = [list(each.shape) for each in on_host]
                raise RuntimeError(f"{name}: operands on the device, and on the host of shapes {shapes}")
        args = _on_host(args)
        if given:
            given = {key: _on_host(value) for key, value in given.items()}

        # Tensors made within `inference_mode` and outside could not be views of each other.
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            with torch.inference_mode(False), torch.no_grad():
                out = func(*args, **given)
                return _wrapped(out, wrappers) if is_apart else out
        out = func(*args, **given)
        return _wrapped(out, wrappers) if is_apart else out


@functools.cache
def _name_of(func: Any) -> str:
    return str(func._schema.name)  # torch makes a new schema for Python each time


def _wrapped(made: Any, wrappers: dict[int, OnDevice]) -> Any:
    """Return an operator's results as tensors of the device; one of its operands is still itself."""
    if isinstance(made, Tensor):
        known = wrappers.get(id(made))
        return OnDevice(made) if known is None else known
    if isinstance(made, tuple | list):
        return type(made)(_wrapped(each, wrappers) for each in made)
    return made


# No argument of an operator is deeper than a list of tensors. torch's own functions for any tree took half
# the time of a step here.
def _leaves(values: Iterable[Any]) -> list[Any]:
    """Return the arguments, and what lists among them hold."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, _LISTS):
            found += _leaves(value)
        else:
            found.append(value)
    return found


def _on_host(value: Any) -> Any:
    """Return an argument with the host's tensors, and itself as the device, in place of the device's."""
    if isinstance(value, OnDevice):
        return value.host
    if isinstance(value, torch.device):
        return _HOST
    return type(value)([_on_host(each) for each in value]) if isinstance(value, _LISTS) else value


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
