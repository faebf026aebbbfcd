"""Record matrices of four- and eight-bit codes with the weights that their tools read: test_small_floats.py.

    pip install bitsandbytes==0.50.2 nvidia-modelopt==0.47.0 torch
    PYTHONPATH=. python tests/models/oracle/record_small_floats.py tests/models/oracle/small-floats.npz

The names are those of a checkpoint: `case.tensor`; `case.values` are the weights.
"""

from __future__ import annotations

import sys

import torch

from tests.support.recorded_cases import save_cases

ROWS, COLUMNS = 32, 192


def bitsandbytes(kind: str, is_nested: bool) -> dict[str, torch.Tensor]:
    """Quantise a matrix to four bits; `is_nested` also quantises its scales."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=is_nested)
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": codes, **parts, "values": dequantize_4bit(codes, state)}


def bytes_of_bitsandbytes() -> dict[str, torch.Tensor]:
    """Quantise a matrix to eight bits."""
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).half()
    codes, scales, _ = int8_vectorwise_quant(weight)
    values = codes.float() * scales.float()[:, None] / 127
    return {"weight": codes, "SCB": scales.float(), "values": values}


def modelopt() -> dict[str, torch.Tensor]:
    """Quantise a matrix to NVFP4 as ModelOpt exports it."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    made, scales, scale = NVFP4QTensor.quantize(weight, 16)
    values = made.dequantize(scale=scales, double_scale=scale, block_sizes={-1: 16}, dtype=torch.float32)
    return {
        "weight": made._quantized_data,
        "weight_scale": scales,
        "weight_scale_2": scale.reshape(()),
        "values": values,
    }


def _for_numpy(tensor: torch.Tensor) -> torch.Tensor:
    """Return FP8 as bytes and other floats as float32, because numpy has neither FP8 nor bfloat16."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8)
    return tensor.float() if tensor.is_floating_point() else tensor


def main() -> None:
    """Record all cases in one file."""
    cases = {
        "nf4": bitsandbytes("nf4", False),
        "nf4-nested": bitsandbytes("nf4", True),
        "fp4": bitsandbytes("fp4", False),
        "int8": bytes_of_bitsandbytes(),
        "nvfp4": modelopt(),
    }
    save_cases(
        sys.argv[1],
        {
            case: {name: _for_numpy(tensor) for name, tensor in tensors.items()}
            for case, tensors in cases.items()
        },
    )


if __name__ == "__main__":
    main()
