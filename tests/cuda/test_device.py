"""Classification of errors by asking the device itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from tests.emulation import bindings, library
from tgi_asgi.ops.cuda_errors import is_out_of_memory
from tgi_asgi.runner import cuda_load
from tgi_asgi.runner.cuda_device import CudaDevice


@pytest.fixture
def device() -> CudaDevice:
    found = object.__new__(CudaDevice)  # without a stream, which needs a GPU
    found.device = torch.device("cuda", 0)
    found._memory_share = 1.0
    return found


def answering(error: Exception | None) -> Callable[[torch.device], None]:
    """Return a replacement of torch's synchronize for a device in this state."""

    def synchronize(device: torch.device) -> None:
        if error is not None:
            raise error

    return synchronize


def test_an_error_that_comes_back_means_a_lost_device(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", answering(error))
    assert device.is_lost(error)
    assert device.is_lost(ValueError("what was found out first"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("cuBLAS: CUBLAS_STATUS_INVALID_VALUE"),
        ValueError("the schema says 'CUDA error: no'"),
    ],
)
def test_an_error_of_one_call_fails_alone(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", answering(None))
    assert not device.is_lost(error)


def test_too_little_memory_is_no_loss(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", answering(RuntimeError("must not be asked")))
    assert not device.is_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device.is_lost(RuntimeError("CUDA error: out of memory"))


@pytest.mark.parametrize(("free", "for_cache"), [(80, 79), (4, 3), (2, 1), (1, 0.5), (0, 0)])
def test_the_cache_leaves_memory_for_graphs_and_libraries(free: int, for_cache: float) -> None:
    """In GiB: all but one, though at least half, and of that 92 %."""
    assert cuda_load.bytes_for_cache(free << 30) == int(0.92 * for_cache * (1 << 30))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 'out of memory'"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_the_driver_and_cublas_say_that_memory_is_lacking_in_their_own_words(
    error: Exception | None, is_one: bool
) -> None:
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize(
    ("share", "free", "reserved", "expected"),
    [(1.0, 70, 25, 70), (0.4, 70, 25, 15), (0.4, 10, 25, 10), (0.2, 70, 25, 0)],
)
def test_free_memory_is_what_is_left_of_the_share(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch, share: float, free: int, reserved: int, expected: int
) -> None:
    """Of 100 bytes, some may be other processes', some are this one's weights."""
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, on: limits.append(share))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda on: reserved)
    device.limit_memory(share)
    assert (device.free_bytes(), limits) == (expected, [share])


@pytest.fixture
def kernels() -> None:
    library.require()
    bindings.install()


def test_a_gpu_before_ampere_is_told_of_in_a_sentence_and_left_alone(
    kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with caplog.at_level(logging.WARNING):
        assert cuda_load.find_device() is None
    [record] = caplog.records
    assert record.getMessage() == (
        "the CPU computes: Tesla T4 has compute capability 7.5, GPU kernels need 8.0 (Ampere) or later"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    device = object()
    monkeypatch.setattr(cuda_load, "CudaDevice", lambda: device)
    assert cuda_load.find_device() is device


@pytest.mark.parametrize(
    ("driver_error", "logged"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update",
            ["the CPU computes: The NVIDIA driver on your system is too old (found version 11040)"],
        ),
        ("No CUDA GPUs are available", []),
    ],
)
def test_a_driver_that_is_too_old_is_told_of_and_a_hidden_gpu_is_not(
    kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    driver_error: str,
    logged: list[str],
) -> None:
    def refuse() -> None:
        raise RuntimeError(driver_error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with caplog.at_level(logging.WARNING):
        assert cuda_load.find_device() is None
    assert [record.getMessage() for record in caplog.records] == logged
