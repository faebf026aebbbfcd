"""Fixtures of the emulated device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.emulation import library
from tests.emulation.device import Device


@pytest.fixture(scope="session")
def built_device() -> Device:
    library.require()
    return Device(library.build())


@pytest.fixture
def device(built_device: Device) -> Iterator[Device]:
    """An emulated device with empty memory."""
    built_device.reset()
    yield built_device
    built_device.reset()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` takes 1 ms, for other devices
