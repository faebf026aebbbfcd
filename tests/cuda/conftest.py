"""Fixtures of the emulated device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch

from tests.cuda.emulated_runner import ON_GPU
from tests.emulation import bindings, library
from tests.emulation.device import Device


@functools.cache
def compile_emulation() -> None:
    """Compile the emulated kernels and the bindings, if that is possible here."""
    with contextlib.suppress(pytest.skip.Exception):
        library.require()
        library.build()
        bindings.build()


@pytest.fixture(scope="module", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """Compile what a module's tests use before the first of them: a setup may take longer than a test."""
    if not ON_GPU and {"bindings", "make_device"} & vars(request.module).keys():
        compile_emulation()


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
