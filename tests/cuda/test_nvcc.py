"""The CUDA kernels as nvcc compiles them: no warning, no spill, no more registers than noted."""

from __future__ import annotations

import pytest

from tests.cuda import nvcc_check, sass


@pytest.fixture
def nvcc() -> str:
    found = nvcc_check.find_nvcc()
    if found is None:
        pytest.skip("there is no nvcc here")
    if not nvcc_check.accepts_compiler(found):
        pytest.skip("nvcc does not support a g++ as new as this one")
    return found


@pytest.mark.thorough
@pytest.mark.time_limit(1800)  # five minutes from scratch on two cores
def test_every_kernel_compiles_within_its_bounds(nvcc: str) -> None:
    kernels, complaints = nvcc_check.compile_all(nvcc)
    assert not complaints, "\n".join(complaints)
    assert {kernel.architecture for kernel in kernels} == set(nvcc_check.ARCHITECTURES)
    if sass.find_nvdisasm() is not None:
        tuned = [kernel for kernel in kernels if kernel.architecture == nvcc_check.ARCHITECTURES[-1]]
        assert [kernel.name for kernel in tuned if kernel.code is None] == []


@pytest.mark.thorough
def test_the_adapters_compile_against_torch(nvcc: str) -> None:
    assert not nvcc_check.check_bindings(nvcc)


def test_spills_and_registers_above_the_bound_are_complained_of() -> None:
    sound = nvcc_check.Kernel("sample.cu", "sample_kernel", "80", 64, 0, 0, 0)
    spilling = nvcc_check.Kernel("sample.cu", "sample_kernel", "80", 65, 0, 8, 4)
    unknown = nvcc_check.Kernel("new.cu", "new_kernel", "80", 1, 0, 0, 0)
    assert [len(list(kernel.complaints())) for kernel in (sound, spilling, unknown)] == [0, 2, 1]


# As nvdisasm -c prints it: an outer loop with an inner one, and undesired instructions.
SASS = """
\t.section\t.text._Z5outerv,"ax",@progbits
.text._Z5outerv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDS.64 R2, [R4] ;
.L_x_1:
        /*0020*/              @!P0 FFMA R2, R3, R4, R5 ;
        /*0030*/                   ATOMS.CAST.SPIN.64 P1, [R4], R6, R8 ;
        /*0040*/         @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0050*/              @P1  BRA `(.L_x_1) ;
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0070*/                   STL [R1], R0 ;
        /*0080*/              @P2  BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
.text._Z4nonev:
        /*0000*/                   EXIT ;
"""


def test_what_must_not_be_in_a_kernel_is_counted() -> None:
    first, second = sass.parse(SASS)
    assert (first.name, second.name) == ("_Z5outerv", "_Z4nonev")
    assert first.loops == [(2, 5), (1, 8), (10, 10)]
    assert (first.num_retries, first.num_calls, first.num_local, first.longest_loop) == (1, 1, 1, 8)
    assert (second.num_retries, second.num_calls, second.num_local, second.longest_loop) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (nvcc_check.Code(0, 0, 0, 9), None),
        (nvcc_check.Code(2, 0, 0, 9), "merge_kernel<bf16, 64> for 90a retries 2 additions in shared memory"),
        (nvcc_check.Code(0, 1, 0, 9), "calls 1 functions"),
        (nvcc_check.Code(0, 0, 3, 9), "has 3 loads and stores of local memory"),
        (nvcc_check.Code(0, 0, 0, 9999), "has a loop of 9999 instructions, more than the"),
    ],
)
def test_instructions_that_must_not_be_are_complained_of(
    code: nvcc_check.Code, complaint: str | None
) -> None:
    kernel = nvcc_check.Kernel("decode.cu", "merge_kernel<bf16, 64>", "90a", 20, 0, 0, 0, code)
    found = list(kernel.complaints())
    assert (not found) if complaint is None else (len(found) == 1 and complaint in found[0])
