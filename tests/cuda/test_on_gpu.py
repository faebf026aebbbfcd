"""The same cases on a GPU, where there is one; and that they run at all, by the emulated kernels."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import cases, emulated_ops
from tests.cuda.gpu_device import GpuDevice
from tests.emulation import library
from tgi_asgi.runner.cuda_load import find_device


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["small", "large"])
def test_every_operator_equals_its_reference_on_the_gpu(size: str) -> None:
    if find_device() is None:
        pytest.skip("no GPU, or an extension without CUDA")
    for _, _, check in getattr(cases, size)():
        check(GpuDevice(torch.device("cuda")))


def test_the_gpu_s_cases_pass_on_the_emulated_operators() -> None:
    reason = library.missing_tool()
    if reason is not None or find_device() is not None:
        pytest.skip(reason or "there is a GPU")
    emulated_ops.register()
    for _, _, check in cases.small():
        check(GpuDevice(torch.device("cpu")))
