"""Record matrices packed by GPTQModel and the weights that it reads back, for test_gptq.py.

    pip install gptqmodel==7.7.0
    PYTHONPATH=. python tests/models/oracle/record_gptqmodel.py tests/models/oracle/gptqmodel.npz

The file records the tensors of a checkpoint and the weights of the module that has read them. In the layout
"gptq" zero points are stored minus one, subtracted from whole words: zero points of 0 borrow.
"""

from __future__ import annotations

import sys

import torch

from tests.support.recorded_cases import save_cases

ROWS = 32
# Bits, columns, columns per group, and the layout.
CASES = {
    "int2": (2, 256, 64, "gptq"),
    "int2-v2": (2, 256, 64, "gptq_v2"),
    "int3": (3, 256, 64, "gptq"),
    "int4": (4, 256, 64, "gptq"),
    "int4-v2": (4, 256, 64, "gptq_v2"),
    "int4-last-group": (4, 192, 128, "gptq_v2"),  # groups of 128 and 64 columns
    "int8": (8, 256, 64, "gptq"),
}


def record(bits: int, columns: int, group: int, layout: str) -> dict[str, torch.Tensor]:
    """Pack random weights, some of whose zero points are 0, and read them back."""
    from gptqmodel import BACKEND, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(columns, ROWS, bias=False)
    num_groups = -(-columns // group)
    groups = torch.arange(columns) // group
    zeros = torch.randint(0, 1 << bits, (ROWS, num_groups), generator=generator).float()
    zeros[::5] = 0
    scales = (torch.rand(ROWS, num_groups, generator=generator) * 0.05 + 0.01).half().float()
    codes = torch.randint(0, 1 << bits, (ROWS, columns), generator=generator).float()
    linear.weight.data = scales[:, groups] * (codes - zeros[:, groups])
    module = TorchLinear(
        bits=bits, group_size=group, desc_act=False, sym=False, in_features=columns, out_features=ROWS,
        bias=False, pack_dtype=torch.int32, backend=BACKEND.GPTQ_TORCH, adapter=None, register_buffers=True,
    )  # fmt: skip
    module.pack_original(linear, scales, zeros, groups.to(torch.int32))
    module.qzero_format(format=2)
    if layout == "gptq":
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group))
    names = ("qweight", "qzeros", "g_idx", "scales")
    tensors = {name: getattr(module, name).clone() for name in names}
    if layout == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    module.scales = module.scales.float()
    values = module.dequantize_weight().T
    assert torch.allclose(values.float(), linear.weight.data, atol=1e-3)
    return tensors | {"scales": tensors["scales"].half(), "values": values.float().contiguous()}


if __name__ == "__main__":
    save_cases(sys.argv[1], {name: record(*options) for name, options in CASES.items()})
