"""The CUDA kernel that rounds activations to FP8, in emulation."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import note

BF16, FP16, FLOAT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def check(device: Device, tokens: int, columns: int, dtype: torch.dtype, *, has_groups: bool) -> None:
    """Quantise rows of very different sizes, some with values that are not numbers."""
    values = torch.randn(tokens, columns) * torch.logspace(-6, 3, tokens)[:, None]
    if tokens > 4:
        values[1], values[2] = 0, 1e-40
        values[3, columns // 2], values[4, 0] = torch.nan, torch.inf
    x = device.tensor(values.to(dtype))
    codes = device.empty((tokens, columns), torch.uint8)
    shape = (columns // 128, -(-tokens // 4) * 4) if has_groups else (tokens,)
    scales = device.empty(shape, torch.float32)
    device.run(
        "quantise", [codes, scales], x=x, codes=codes, scales=scales, num_tokens=tokens, num_columns=columns,
        has_groups=has_groups, type=TYPES[dtype],
    )  # fmt: skip
    groups = x.double().view(tokens, columns // 128, 128) if has_groups else x.double()[:, None]
    found = scales[:, :tokens].double().t() if has_groups else scales.double()[:, None]
    largest = groups.abs().amax(2)
    assert torch.equal(found.isfinite(), largest.isfinite()), "what is not a number is lost, or spreads"
    is_there = largest.isfinite()
    expected = (largest / 448).clamp(min=2.0**-120)
    assert ((found - expected)[is_there].abs() <= 2e-7 * expected[is_there]).all()
    decoded = codes.view(FLOAT8).double().view(groups.shape) * found[..., None]
    assert decoded[~is_there].isnan().flatten(1).any(1).all()
    # Half the distance of two codes: of 4 significant bits, or of denormal ones.
    bound = torch.maximum(groups.abs() / 16, found[..., None] * 2.0**-10) * (1 + 1e-5)
    share = ((decoded - groups).abs() / bound)[is_there]
    note(float(share.max()) if share.numel() else 0.0, 1.0)
    assert (share <= 1).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "columns", "has_groups"),
    [
        (0, 128, False), (1, 8, False), (6, 264, False), (3, 576, False), (2, 14336, False),
        (1, 32768, False),
        (0, 128, True), (7, 128, True), (6, 640, True), (3, 2176, True),
    ],
)  # fmt: skip
def test_activations_are_rounded_to_the_nearest_codes(
    device: Device, tokens: int, columns: int, dtype: torch.dtype, has_groups: bool
) -> None:
    check(device, tokens, columns, dtype, has_groups=has_groups)


@pytest.mark.parametrize(
    "changes", [{"num_columns": 12}, {"num_columns": 32776}, {"has_groups": True}], ids=str
)
def test_shapes_without_a_kernel_are_refused(device: Device, changes: dict[str, int]) -> None:
    given = {"num_tokens": 1, "num_columns": 64, "has_groups": False, "type": 0} | changes
    x, codes = device.empty((1, 64), BF16), device.empty((1, 64), torch.uint8)
    with pytest.raises(AssertionError, match="refused"):
        device.launch("quantise", x=x, codes=codes, scales=device.empty((1,), torch.float32), **given)


FAULTS = [
    Fault(what, "quantise.cu", old, new, kind)
    for what, old, new, kind in (
        (
            "a column past the last is read",
            "if (column < p.num_columns) values[k].load", "values[k].load", "bounds",
        ),
        ("NaN is not larger", "a >= b || a != a ? a : b", "a >= b ? a : b", "result"),
        (
            "only the first values count",
            "Larger()(largest, values[k].largest())", "values[0].largest()", "result",
        ),
        (
            "half a group's lanes are left out",
            "int lanes = kGroupLanes / 2", "int lanes = kGroupLanes / 4", "result",
        ),
        (
            "scales are of another token",
            "* padded + token] = scale", "* padded] = scale", "race|blocks|result",
        ),
        (
            "zeros have an infinite inverse",
            "Larger()(kMinScale, __fdividef(largest, kMaxCode));\n  if (threadIdx.x == 0)",
            "__fdividef(largest, kMaxCode);\n  if (threadIdx.x == 0)", "result",
        ),
        (
            "lanes leave before they are asked",
            "  float largest = values.largest();\n#pragma",
            "  if (!exists) return;\n  float largest = values.largest();\n#pragma", "mask",
        ),
        (
            "the kernel before is not waited for",
            "  wait_for_previous_kernel();\n  SHARED", "  SHARED", "dependent",
        ),
    )
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def both(device: Device) -> None:
        check(device, 6, 1096, BF16, has_groups=False)
        check(device, 6, 640, BF16, has_groups=True)

    assert_caught(fault, both)
