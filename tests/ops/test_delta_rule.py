"""The operator delta_rule: recurrent heads whose states are corrected token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import with_each_kernel_set
from tests.reference import delta_rule as reference
from tests.reference.compare import assert_close, assert_same_bits
from tests.support.state_steps import Shape, Steps
from tgi_asgi import _C, ops
from tgi_asgi.ops import DeltaRuleWeight
from tgi_asgi.ops.recorder import Kind

SIZES = [(1, 16, 1, 1, 1), (3, 16, 3, 5, 17), (4, 64, 2, 33, 40), (2, 80, 1, 16, 9), (6, 48, 2, 256, 33)]


def random_weight(heads: int, dim: int, key_heads: int, size: int, **options: Any) -> DeltaRuleWeight:
    a, dt_bias = -torch.rand(heads) - 0.01, torch.randn(heads)
    return DeltaRuleWeight(heads, dim, key_heads, size, a.numpy(), dt_bias.numpy(), **options)


def steps_of(weight: DeltaRuleWeight, num_slots: int) -> Steps:
    return Steps(
        lambda rows, layer: ops.delta_rule(rows[0], rows[1], weight, layer),
        Shape(7, 3, weight.num_floats),
        [weight.columns, 2 * weight.num_heads],
        num_slots,
    )


def random_text(weight: DeltaRuleWeight, tokens: int) -> list[Tensor]:
    return [torch.randn(tokens, weight.columns), torch.randn(tokens, 2 * weight.num_heads)]


@pytest.mark.parametrize(("heads", "dim", "key_heads", "size", "tokens"), SIZES)
@pytest.mark.parametrize("is_tiled", [False, True], ids=["neighbours", "tiled"])
def test_a_sequence_is_that_of_the_reference(
    kernel_set: str, heads: int, dim: int, key_heads: int, size: int, tokens: int, is_tiled: bool
) -> None:
    _C.set_num_threads(3)
    weight = random_weight(heads, dim, key_heads, size, is_tiled=is_tiled)
    text = random_text(weight, tokens)
    (found,) = steps_of(weight, 2).run([(1, 0, text)])
    assert_close(found, reference.delta_rule(text[0], text[1], weight), length=4 * (size + tokens))


def test_keys_of_zeros_change_nothing(kernel_set: str) -> None:
    """Check that zero keys are not divided by their length."""
    weight = random_weight(2, 16, 1, 8)
    text = random_text(weight, 5)
    text[0][2, :16] = 0
    (found,) = steps_of(weight, 1).run([(0, 0, text)])
    assert_close(found, reference.delta_rule(text[0], text[1], weight), length=64)
    assert not found[2].any()


def test_sets_agree_to_the_bit() -> None:
    _C.set_num_threads(2)
    weight = random_weight(4, 48, 2, 21)
    text = random_text(weight, 21)
    found = [each for _, each in with_each_kernel_set(lambda: steps_of(weight, 1).run([(0, 0, text)])[0])]
    for each in found:
        assert_same_bits(each, found[0])


def test_operands_that_do_not_fit_are_refused() -> None:
    recorder = ops.Recorder()
    weight = random_weight(2, 16, 1, 4)
    rows, steps = recorder.value(Kind.ROWS, weight.columns), recorder.value(Kind.ROWS, 4)
    layer = ops.StatePool([Shape(3, 2, 128)], num_slots=1).layers[0]
    with pytest.raises(ValueError, match="takes states of 128 floats, not 127"):
        ops.delta_rule(rows, steps, weight, ops.StatePool([Shape(3, 2, 127)], num_slots=1).layers[0])
    with pytest.raises(ValueError, match="takes 40 columns as `rows`, not 4"):
        ops.delta_rule(steps, steps, weight, layer)
    with pytest.raises(ValueError, match="takes 4 columns as `steps`, not 40"):
        ops.delta_rule(rows, rows, weight, layer)
    with pytest.raises(ValueError, match="`a` must have 2 elements"):
        DeltaRuleWeight(2, 16, 1, 4, np.ones(3, np.float32), np.ones(2, np.float32))
    wide: Any = np.ones(2)
    with pytest.raises(TypeError, match="`dt_bias` must be float32"):
        DeltaRuleWeight(2, 16, 1, 4, np.ones(2, np.float32), wide)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 24, 1, 4), "`head_dim` must be a multiple of 16, got 24"),
        ((3, 16, 2, 4), "must divide the 3 heads"),
        ((3, 16, 3, 257), r"`key_dim` must be in \[1, 256\], got 257"),
    ],
)
def test_heads_that_the_kernels_do_not_have_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_of(random_weight(*sizes), 1)
