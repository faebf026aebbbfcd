"""Record matrices packed by AutoGPTQ and the weights that its own module computes, for test_gptq.py.

    pip download --no-deps auto-gptq==0.7.1    # then unpack only auto_gptq/nn_modules/qlinear here, with
                                               # empty __init__.py above it: the rest needs CUDA
    PYTHONPATH=. python tests/models/oracle/record_gptq.py tests/models/oracle/gptq.npz

The module multiplies an identity matrix, in float32 on the CPU. The file records the tensors of a checkpoint
and the product, which is the weights.
"""

from __future__ import annotations

import sys

import torch

from tests.support.recorded_cases import save_cases

ROWS, COLUMNS, GROUP = 32, 256, 64
# Bits, whether zero points are half the range, and whether columns are in act-order.
CASES = {
    "int4": (4, False, False),
    "int4-symmetric-order": (4, True, True),
    "int4-order": (4, False, True),
    "int8": (8, False, False),
    "int8-symmetric": (8, True, False),
}


def record(bits: int, is_centred: bool, has_order: bool) -> dict[str, torch.Tensor]:
    """Quantise random weights; let AutoGPTQ pack them and multiply by them."""
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = torch.randn(ROWS, COLUMNS, generator=generator)
    groups = torch.arange(COLUMNS) // GROUP
    if has_order:
        groups = groups[torch.randperm(COLUMNS, generator=generator)]
    parts = [linear.weight.data[:, groups == group] for group in range(COLUMNS // GROUP)]
    low, high = (torch.stack([f(part, 1) for part in parts], dim=1) for f in (torch.amin, torch.amax))
    if is_centred:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if is_centred else (-low / scales).round()
    zeros = zeros.clamp(1, 2**bits - 1)
    module = QuantLinear(bits, GROUP, COLUMNS, ROWS, False, weight_dtype=torch.float32)
    module.pack(linear, scales, zeros, groups.to(torch.int32))
    tensors = {name: getattr(module, name) for name in ("qweight", "qzeros", "g_idx")}
    values = module(torch.eye(COLUMNS)).T
    return tensors | {"scales": module.scales.half(), "values": values.contiguous()}


if __name__ == "__main__":
    save_cases(sys.argv[1], {name: record(*options) for name, options in CASES.items()})
