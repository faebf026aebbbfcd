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


def test_work_memory_and_records_begin_where_kernels_read_vectors(device: GpuDevice) -> None:
    def late(*shape: int) -> Tensor:
        """Return bytes that begin one after a multiple of 16."""
        return torch.zeros(17 + torch.Size(shape).numel(), dtype=torch.uint8)[1:-16].view(shape)

    half, ints = torch.bfloat16, torch.ones(2, dtype=torch.int32)
    query = torch.zeros(1, 1, 64, dtype=half)
    cache = torch.zeros(1, 2, 1, 16, 64, dtype=half)
    with pytest.raises(RuntimeError, match="`workspace` must begin at a multiple of 16 bytes"):
        torch.ops.tgi_cuda.attention_decode(
            query, cache, ints[:1], ints.new_zeros(1, 1), 0, 1.0, 0.0, None, None, 1.0, 1.0, ints,
            late(torch.ops.tgi_cuda.attention_workspace_bytes(1, 1, 16, 1, 64)), query.clone(),
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="`records` must begin at a multiple of 16 bytes"):
        torch.ops.tgi_cuda.accept_drafts(late(2, 80), ints.new_zeros(2, 8), ints[:1], ints[:1], ints[:1])


def test_nothing_is_normed_of_a_residual_without_rows(device: GpuDevice) -> None:
    x, out = torch.zeros(0, 64), torch.empty(1, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="the launch was refused"):
        torch.ops.tgi_cuda.norm(x, torch.ones(64), None, 1e-5, torch.zeros(1, dtype=torch.int32), out)


def test_nothing_is_rotated_into_blocks_without_tokens(device: GpuDevice) -> None:
    q, kv = torch.zeros(1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 1, 0, 64, dtype=torch.bfloat16)
    ints, table = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 32)
    with pytest.raises(RuntimeError, match="the launch was refused"):
        torch.ops.tgi_cuda.rope_kv_write(
            q.new_zeros(1, 3 * 64), ints, ints.long(), table, table, None, None, None, None, False, 1e-5,
            1.0, 1.0, q, kv,
        )  # fmt: skip
