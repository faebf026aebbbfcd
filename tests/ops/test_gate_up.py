"""The operator gate_up: two products, an activation, and their product."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import random_source
from tests.reference.compare import assert_close
from tests.reference.layers import activate, linear
from tgi_asgi import _C, ops


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("tokens", "hidden", "size"), [(0, 4, 4), (1, 17, 3), (17, 33, 129)])
def test_the_activation_equals_the_reference(tokens: int, hidden: int, size: int, activation: str) -> None:
    _C.set_num_threads(2)
    (gate, gate_source), (up, up_source) = random_source(size, hidden), random_source(size, hidden)
    weight = ops.gate_up_weight(gate_source, up_source, dtype=torch.float32)
    assert weight.intermediate_size == size
    a = torch.randn(tokens, hidden)
    expected = activate(linear(a, gate), activation) * linear(a, up)
    assert_close(ops.gate_up(a, weight, activation), expected, length=2 * hidden)


def test_an_unknown_activation_and_unequal_halves_are_refused() -> None:
    source = random_source(4, 8)[1]
    weight = ops.gate_up_weight(source, source, dtype=torch.float32)
    with pytest.raises(ValueError, match="`activation` must be one of silu, gelu_tanh, got relu"):
        ops.gate_up(torch.randn(1, 8), weight, "relu")
    with pytest.raises(ValueError, match="must have one shape"):
        ops.gate_up_weight(source, random_source(5, 8)[1], dtype=torch.float32)
