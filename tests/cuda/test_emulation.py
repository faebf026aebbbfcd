"""The emulated device on which the other tests of this folder run the kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.cuda import test_norm
from tests.emulation import bindings, library
from tests.emulation.device import Device, KernelFault


def test_a_closed_device_unmaps_its_memory_and_can_be_used_again(device: Device) -> None:
    test_norm.check(device, 3, 64, torch.bfloat16)
    before = _count_mappings()
    device.close()
    threads = 32  # at least one warp ran
    assert _count_mappings() <= before - 2 * threads
    test_norm.check(device, 3, 64, torch.bfloat16)


def test_a_kernel_test_reports_host_memory_though_other_code_may_use_it(device: Device) -> None:
    bindings.install()
    x, out = torch.randn(2, 8), device.empty((2, 8), torch.bfloat16)
    with pytest.raises(KernelFault, match="wild"):
        test_norm.launch(device, x, device.tensor(torch.randn(8)), None, None, out, None)


def test_what_was_needed_longest_ago_is_discarded(tmp_path: Path) -> None:
    for age, name in enumerate(("used.o", "new.so", "old.o")):
        (tmp_path / name).write_bytes(bytes(40))
        os.utime(tmp_path / name, (0, 1000 - age))
    (tmp_path / "old.src").mkdir()
    os.utime(tmp_path / "used.o", (0, 0))
    assert library.is_kept(tmp_path / "used.o") and not library.is_kept(tmp_path / "none.o")
    library.discard_old(tmp_path, 100)
    assert {path.name for path in tmp_path.iterdir()} == {"used.o", "new.so"}


def _count_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")
