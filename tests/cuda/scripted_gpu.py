"""A scripted GPU clock for tests of bench/gpu_*.py: calls run at once and take the time that a test sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import gpu_apart, gpu_timing
from tests.cuda.emulated_device import EmulatedDevice


class Clock:
    """Counts microseconds: `advance` stands for a call on the scripted device.

    Attributes:
        captures: Number of graphs that were captured.
    """

    def __init__(self) -> None:
        self.us = 0.0
        self.captures = 0
        self._device = EmulatedDevice()

    def advance(self, us: float) -> None:
        self.us += us

    def event(self) -> Any:
        return _Event(self)

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        self.captures += 1
        return self._device.capture(lambda: (call(), None)[1])

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace CUDA's events, graphs, synchronisation and processes; tensors stay on the host."""
        monkeypatch.setattr(gpu_timing, "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(gpu_timing, "L2_BYTES", 1)
        monkeypatch.setattr(gpu_timing, "make_event", self.event)
        monkeypatch.setattr(gpu_timing, "synchronize", lambda: None)
        monkeypatch.setattr(gpu_timing, "capture", self.capture)
        monkeypatch.setattr(gpu_apart, "apart", lambda call, limit_s: call())


class _Event:
    def __init__(self, clock: Clock) -> None:
        self._clock, self.at = clock, 0.0

    def record(self) -> None:
        self._clock.advance(0.5)
        self.at = self._clock.us

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) / 1e3
