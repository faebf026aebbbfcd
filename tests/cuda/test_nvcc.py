"""The CUDA kernels as nvcc compiles them: no warning, no spill, no more registers than noted."""

from __future__ import annotations

import pytest

from tests.cuda import nvcc_check


@pytest.fixture
def nvcc() -> str:
    found = nvcc_check.find_nvcc()
    if found is None:
        pytest.skip("there is no nvcc here")
    return found


@pytest.mark.time_limit(1800)  # anew on two cores: five minutes
def test_every_kernel_compiles_within_its_bounds(nvcc: str) -> None:
    kernels, complaints = nvcc_check.compile_all(nvcc)
    assert not complaints, "\n".join(complaints)
    assert {kernel.architecture for kernel in kernels} == set(nvcc_check.ARCHITECTURES)


def test_the_adapters_compile_against_torch(nvcc: str) -> None:
    assert not nvcc_check.check_bindings(nvcc)


def test_spills_and_registers_above_the_bound_are_complained_of() -> None:
    sound = nvcc_check.Kernel("sample.cu", "sample_kernel", "80", 64, 0, 0, 0)
    spilling = nvcc_check.Kernel("sample.cu", "sample_kernel", "80", 65, 0, 8, 4)
    unknown = nvcc_check.Kernel("new.cu", "new_kernel", "80", 1, 0, 0, 0)
    assert [len(list(kernel.complaints())) for kernel in (sound, spilling, unknown)] == [0, 2, 1]
