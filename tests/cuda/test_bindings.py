"""The CUDA operators' bindings on CPU tensors: what they accept, and what they fill in for the kernels.

All tests of the runner run them, too. These make the calls with which `bench.gpu` begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda import cases
from tests.cuda.gpu_device import GpuDevice
from tests.emulation import bindings, library


class _Once(GpuDevice):
    """Runs operators through the bindings as on a GPU, but once: the schedules have tests of their own."""

    def run(self, name: str, outputs: Sequence[Tensor], **params: Any) -> None:
        self.launch(name, **params)


@pytest.fixture(scope="module")
def device() -> GpuDevice:
    library.require()
    bindings.install()
    return _Once(torch.device("cpu"))


@pytest.mark.parametrize("case", [*cases.small()], ids=lambda case: f"{case[0]}-{case[1]}")
def test_what_is_checked_on_a_gpu_is_accepted_and_right(case: cases.Case, device: GpuDevice) -> None:
    _, _, check = case
    check(device)


def test_operands_that_a_kernel_could_not_use_are_refused(device: GpuDevice) -> None:
    x, weight, out = torch.randn(3, 64), torch.ones(64), torch.empty(3, 64, dtype=torch.bfloat16)
    norm = torch.ops.tgi_cuda.norm
    for wrong, why in (
        ((x[:, :63], weight, out), "`x` must have shape"),
        ((x.double(), weight, out), "`x` must be Float"),
        ((x, weight, out[:2]), "`out` must have shape"),
        ((x.t().contiguous().t(), weight, out), "`x` must be contiguous"),
        ((torch.empty(3 * 64 + 1)[1:].view(3, 64), weight, out), "`x` must begin at a multiple of 16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=why):
            norm(wrong[0], wrong[1], None, 1e-5, None, wrong[2])
