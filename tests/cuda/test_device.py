"""What an error means for the device, as the device itself says when it is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tgi_asgi.runner.cuda_device import CudaDevice


@pytest.fixture
def device() -> CudaDevice:
    found = object.__new__(CudaDevice)  # without a stream, which needs a GPU
    found.device = torch.device("cuda", 0)
    return found


def answering(error: Exception | None) -> Callable[[torch.device], None]:
    """Stand for torch's synchronize on a device in this state."""

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
