"""Record matrices of 3, 5, 6 and 7 bits as compressed-tensors packed them until 0.17, and their values.

    pip install torch compressed-tensors==0.17.1
    python tests/models/oracle/record_compressed_widths.py tests/models/oracle/compressed-widths.npz

Later versions leave no gaps between codes; test_compressed_tensors.py packs with the installed one.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

ROWS, COLUMNS, GROUP = 22, 192, 64


def main() -> None:
    """Compress random weights, with and without zero points."""
    # The version that the tests install has other arguments.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    generator = torch.Generator().manual_seed(1)
    arrays: dict[str, np.ndarray] = {}
    for bits in (3, 5, 6, 7):
        codes, zeros = (
            torch.randint(-(1 << bits - 1), 1 << bits - 1, size, generator=generator, dtype=torch.int8)
            for size in ((ROWS, COLUMNS), (ROWS, COLUMNS // GROUP))
        )
        scale = (torch.rand(zeros.shape, generator=generator) * 0.02 + 0.005).half()
        packed, packed_zeros = pack_to_int32(codes, bits), pack_to_int32(zeros, bits, packed_dim=0)
        unpacked = unpack_from_int32(packed, bits, codes.shape)
        points = unpack_from_int32(packed_zeros, bits, zeros.shape, packed_dim=0)
        assert torch.equal(unpacked, codes), "the package unpacks something else"
        assert torch.equal(points, zeros), "the package unpacks other zero points"
        centred = unpacked.float() * scale.float().repeat_interleave(GROUP, 1)
        shifted = (unpacked.float() - points.repeat_interleave(GROUP, 1)) * scale.float().repeat_interleave(
            GROUP, 1
        )
        made = {
            "weight_packed": packed, "weight_scale": scale, "weight_zero_point": packed_zeros,
            "centred": centred, "shifted": shifted,
        }  # fmt: skip
        arrays |= {f"{bits}.{name}": tensor.contiguous().numpy() for name, tensor in made.items()}
    np.savez_compressed(sys.argv[1], **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
