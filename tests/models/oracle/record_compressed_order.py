"""Record a matrix with columns in act-order, and the values that compressed-tensors decompresses it to.

    pip install torch compressed-tensors==0.12.2
    python tests/models/oracle/record_compressed_order.py tests/models/oracle/compressed-order.npz

Version 0.20 no longer reads `weight_g_idx`, which checkpoints of earlier versions contain. The values are
therefore recorded; those of other checkpoints are computed in tests/models/test_compressed_tensors.py.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

ROWS, COLUMNS, GROUP = 32, 256, 64


def main() -> None:
    """Compress random weights with an older version, and record its tensors and values."""
    # The version that the tests install has other module names.
    from compressed_tensors.compressors.quantized_compressors import pack_quantized
    from compressed_tensors.quantization import QuantizationArgs

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    order = (torch.arange(COLUMNS) // GROUP)[torch.randperm(COLUMNS, generator=generator)]
    scale = torch.stack(
        [weight[:, order == group].abs().amax(1) / 7.5 for group in range(COLUMNS // GROUP)], dim=1
    )
    scale = scale.half().float()
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, actorder="group")
    compressor = pack_quantized.PackedQuantizationCompressor()
    packed = compressor.compress_weight(weight, scale, arguments, g_idx=order.to(torch.int32))
    tensors = packed | {"weight_scale": scale.half(), "weight_g_idx": order.to(torch.int32)}
    values = compressor.decompress_weight(tensors | {"weight_scale": scale}, arguments)
    arrays = {name: tensor.numpy() for name, tensor in (tensors | {"values": values.float()}).items()}
    np.savez_compressed(sys.argv[1], **arrays)


if __name__ == "__main__":
    main()
