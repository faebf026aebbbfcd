"""The emulated device on which the other tests of this folder run the kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.cuda import test_norm
from tests.emulation.device import Device


def test_a_closed_device_unmaps_its_memory_and_can_be_used_again(device: Device) -> None:
    test_norm.check(device, 3, 64, torch.bfloat16)
    before = _count_mappings()
    device.close()
    threads = 32  # at least one warp ran
    assert _count_mappings() <= before - 2 * threads
    test_norm.check(device, 3, 64, torch.bfloat16)


def _count_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")
