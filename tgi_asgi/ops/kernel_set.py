"""The kernel set that this process runs: the best for the machine, or the one that TGI_ISA names."""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi import _C


@dataclass(frozen=True, slots=True)
class KernelSet:
    """A set of kernels.

    Attributes:
        name: Its instruction set: `avx512`, `amx`.
        arithmetic: How bfloat16 products are rounded; sets with the same value give the same bits.
        refused: Why a better set that the processor supports is not used; None if there is none.
    """

    name: str
    arithmetic: str
    refused: str | None

    @property
    def has_tiles(self) -> bool:
        """Whether bfloat16 products use AMX's tiles, which multiply faster than any other instruction."""
        return self.arithmetic == "tdpbf16ps"

    @property
    def has_bfloat16_products(self) -> bool:
        """Whether an instruction multiplies bfloat16, which is faster than to multiply float32."""
        return self.arithmetic != "fma"


def kernel_set() -> KernelSet:
    """Return the set in use."""
    return KernelSet(_C.kernel_set(), _C.kernel_arithmetic(), _C.refused_kernel_set())
