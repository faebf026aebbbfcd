"""The kernel act_mul against its reference, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from tests.reference.compare import assert_close
from tests.reference.layers import activate


def run(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    out = torch.full((gate_up.shape[0], gate_up.shape[1] // 2), torch.nan)
    torch.ops.tgi.act_mul(gate_up, activation, out)
    return out


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("tokens", "size"), [(0, 16), (1, 1), (3, 17), (17, 129), (1, 1536)])
def test_products_equal_the_reference(isa: str, activation: str, tokens: int, size: int) -> None:
    gate_up = torch.randn(tokens, 2 * size) * 4
    gate, up = gate_up.split(size, dim=1)
    assert_close(run(gate_up, activation), activate(gate, activation) * up.double(), length=16)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_far_from_zero_saturate(isa: str, activation: str) -> None:
    gate = torch.tensor([[-1e30, -200.0, -100.0, 0.0, 100.0, 200.0]])
    out = run(torch.cat([gate, torch.ones_like(gate)], dim=1), activation)
    torch.testing.assert_close(out, gate.clamp_min(0), atol=1e-30, rtol=1e-6)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must be silu or gelu_tanh, got relu"):
        run(torch.randn(1, 4), "relu")
