"""Which kernels this process runs: the set that suits the machine, or the one that TGI_ISA names."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi import _C


@dataclass(frozen=True, slots=True)
class KernelSet:
    """A set of kernels.

    Attributes:
        name: of its instructions: `avx512`, `amx`.
        arithmetic: how products of bfloat16 round; sets that have the same give the same bits.
        refused: why a better one that the processor has is not used, if so.
    """

    name: str
    arithmetic: str
    refused: str | None


def kernel_set() -> KernelSet:
    """Return the set in use."""
    return KernelSet(_C.kernel_set(), _C.kernel_arithmetic(), _C.refused_kernel_set())
