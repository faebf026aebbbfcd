"""The operator gate_up: two products, of which one is activated, multiplied with each other."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import EXACT, FAST, random_source, rounded
from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import activate, linear
from tests.support import eager_ops
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.tensors import from_tensor


@pytest.mark.parametrize("activation", ops.GATED_ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "size"), [(0, 4, 4), (1, 17, 3), (17, 33, 129), (3, 72, 100), (2, 64, 160)]
)
def test_the_activation_equals_the_reference(
    kernel_set: str, tokens: int, hidden: int, size: int, has_bias: bool, activation: str
) -> None:
    _C.set_num_threads(2)
    (gate, gate_source), (up, up_source) = random_source(size, hidden), random_source(size, hidden)
    biases = [torch.randn(size) * has_bias for _ in range(2)]
    sources = [from_tensor(bias) for bias in biases] if has_bias else None
    weight = ops.gate_up_weight(gate_source, up_source, EXACT, biases=sources)
    assert weight.intermediate_size == size
    a = torch.randn(tokens, hidden)
    expected = activate(linear(a, gate, biases[0]), activation) * linear(a, up, biases[1])
    assert_close(eager_ops.gate_up(a, weight, activation), expected, length=2 * hidden)


@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("formats", [("Q8_0", "Q4_0"), ("BF16", "F32"), ("Q5_0", "BF16"), ("Q4_1", "Q4_1")])
def test_gate_and_up_may_be_of_different_formats(
    kernel_set: str, formats: tuple[str, str], packing: ops.Packing
) -> None:
    _C.set_num_threads(2)
    sources = [random_weight(format, 100, 96, seed=seed) for seed, format in enumerate(formats)]
    biases = [torch.randn(100), torch.randn(100)]
    weight = ops.gate_up_weight(
        sources[0], sources[1], packing, biases=[from_tensor(bias) for bias in biases]
    )
    parts = weight.made.parts
    assert len(parts) == (1 if formats[0] == formats[1] else 2)
    a = torch.randn(7, 96)
    gate, up = (
        linear(rounded(a, part.precision), decoded_values(source), bias)
        for part, source, bias in zip((parts[0], parts[-1]), sources, biases, strict=True)
    )
    assert_close(eager_ops.gate_up(a, weight), activate(gate, "silu") * up, length=4 * 96)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("formats", [("F32", "F32"), ("F32", "BF16")], ids=["one", "two"])
def test_gates_far_from_zero_saturate(kernel_set: str, activation: str, formats: tuple[str, str]) -> None:
    gate = torch.tensor([-1e4, -200.0, -100.0, 0.0, 100.0, 200.0])[:, None]
    sources = [
        from_tensor(values.to(torch.bfloat16 if format == "BF16" else torch.float32))
        for values, format in zip((gate, torch.ones_like(gate)), formats, strict=True)
    ]
    out = eager_ops.gate_up(torch.ones(1, 1), ops.gate_up_weight(sources[0], sources[1], EXACT), activation)
    torch.testing.assert_close(out, gate.T.clamp_min(0), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("threads", [2, 5])
def test_a_row_has_the_same_bits_in_any_batch_and_team(kernel_set: str, threads: int) -> None:
    weight = ops.gate_up_weight(random_source(100, 72)[1], random_source(100, 72)[1], FAST)
    a = torch.randn(20, 72)
    alone = torch.cat([eager_ops.gate_up(a[row : row + 1], weight) for row in range(20)])
    _C.set_num_threads(threads)
    for size in (1, 2, 7, 20):
        assert_same_bits(eager_ops.gate_up(a[:size], weight), alone[:size])


def test_an_unknown_activation_and_unequal_halves_are_refused() -> None:
    source = random_source(4, 8)[1]
    weight = ops.gate_up_weight(source, source, EXACT)
    with pytest.raises(
        ValueError, match="`activation` must be one of silu, gelu_tanh, gelu, relu, relu_squared, got xielu"
    ):
        eager_ops.gate_up(torch.randn(1, 8), weight, "xielu")
    with pytest.raises(ValueError, match="must have one shape"):
        ops.gate_up_weight(source, random_source(5, 8)[1], EXACT)
    with pytest.raises(ValueError, match="`gate_up` takes 8 columns as `a`, not 7"):
        eager_ops.gate_up(torch.randn(1, 7), weight)
