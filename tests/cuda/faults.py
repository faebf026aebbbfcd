"""Faults planted in copies of the kernels' sources, which the emulation must catch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import pytest

from tests.emulation import library
from tests.emulation.device import Device, KernelFault


@dataclass(frozen=True, slots=True)
class Fault:
    """A text replacement in a file of csrc/cuda, and how it shows: a report's kind, or "result".

    Bars separate several kinds if the schedule decides which one occurs.
    """

    what: str
    file: str
    old: str
    new: str
    kind: str
    kernel: str = ""  # the .cu file whose kernels have the fault; empty: `file`
    element: str = "bf16"  # the type that the kernels of routed experts are compiled for

    def __str__(self) -> str:
        return self.what


def assert_caught(fault: Fault, check: Callable[[Device], None]) -> None:
    """Build the kernels with the fault and require `check`, which passes without it, to fail as expected."""
    library.require()
    variant = library.Variant(fault.file, fault.old, fault.new, fault.kernel or fault.file, fault.element)
    with closing(Device(library.build(variant))) as device, pytest.raises(AssertionError) as caught:
        check(device)
    kind = caught.value.kind if isinstance(caught.value, KernelFault) else "result"
    assert kind in fault.kind.split("|"), f"caught as {kind}, not as {fault.kind}: {caught.value}"
