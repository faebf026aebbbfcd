"""Faults planted in copies of the kernels' sources, which the emulation must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.emulation import library
from tests.emulation.device import Device, KernelFault


@dataclass(frozen=True, slots=True)
class Fault:
    """A text replacement in a file of csrc/cuda, and how it shows: a report's kind, or "result"."""

    what: str
    file: str
    old: str
    new: str
    kind: str

    def __str__(self) -> str:
        return self.what


def assert_caught(fault: Fault, check: Callable[[Device], None]) -> None:
    """Build the kernels with the fault and see `check`, which passes without it, fail in the way expected."""
    reason = library.missing_tool()
    if reason is not None:
        pytest.skip(f"no emulation of CUDA here: {reason}")
    device = Device(library.build({fault.file: (fault.old, fault.new)}))
    with pytest.raises(AssertionError) as caught:
        check(device)
    kind = caught.value.kind if isinstance(caught.value, KernelFault) else "result"
    assert kind == fault.kind, f"caught as {kind}, not as {fault.kind}: {caught.value}"
