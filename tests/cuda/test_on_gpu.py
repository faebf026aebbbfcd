"""The same cases on a GPU, if there is one."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import cases
from tests.cuda.gpu_device import GpuDevice
from tgi_asgi.runner.cuda_load import find_device


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["small", "large"])
def test_every_operator_equals_its_reference_on_the_gpu(size: str) -> None:
    if find_device() is None:
        pytest.skip("no GPU, or an extension without CUDA")
    for _, _, check in getattr(cases, size)():
        check(GpuDevice(torch.device("cuda")))
