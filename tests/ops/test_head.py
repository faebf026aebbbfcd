"""The operator head: the final norm and the logits of the requested rows."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.helpers import EXACT, FAST, random_source
from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import linear, rms_norm
from tests.support import eager_ops
from tests.support.batches import flat_rows
from tests.support.eager_ops import norm_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.tensors import from_tensor


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(0, 33, 7), (5, 33, 131), (9, 72, 100), (1, 64, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_equal_the_reference(
    kernel_set: str, tokens: int, hidden: int, vocab: int, has_bias: bool
) -> None:
    _C.set_num_threads(2)
    matrix, source = random_source(vocab, hidden)
    bias, bias_source = random_source(vocab) if has_bias else (None, None)
    x, norm = torch.randn(tokens, hidden), torch.randn(hidden)
    weight = ops.linear_weight(source, EXACT, bias=bias_source, is_vocabulary=True)
    logits = eager_ops.head(x, norm_weight(norm, 1e-5), weight)
    assert_close(logits, linear(rms_norm(x, norm, 1e-5), matrix, bias), length=6 * hidden)


@pytest.mark.parametrize(("scale", "cap"), [(0.25, 0.0), (1.0, 30.0), (3.0, 5.0)])
def test_logits_are_scaled_and_then_capped(kernel_set: str, scale: float, cap: float) -> None:
    matrix, source = random_source(131, 72)
    x, norm = torch.randn(5, 72), torch.randn(72)
    logits = eager_ops.head(
        x, norm_weight(norm, 1e-5), ops.linear_weight(source, EXACT), scale=scale, cap=cap
    )
    expected = linear(rms_norm(x, norm, 1e-5), matrix) * scale
    if cap:
        expected = cap * (expected / cap).tanh()
        assert logits.abs().max() <= cap
    assert_close(logits, expected, length=4 * 72)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
def test_only_the_rows_asked_for_are_computed_in_their_order(
    kernel_set: str, threads: int, packing: ops.Packing
) -> None:
    _C.set_num_threads(threads)
    table = ops.linear_weight(from_tensor(torch.randn(131, 72).bfloat16()), packing)
    recorder = ops.Recorder()
    ops.head(ops.embed(recorder.batch, table), norm_weight(torch.rand(72), 1e-5), table)
    limits = ops.StepLimits(max_tokens=9, max_sequences=1, max_rows=9, max_context=9)
    program = ops.CpuProgram(recorder, limits)
    batch = flat_rows([(0, 9)], [[0]], 16, ids=range(40, 49))
    every = program.run(batch, range(9)).copy()
    for rows in ([], [0], [4, 0, 4, 2], [8, 8, 8], list(range(8, -1, -1))):
        assert_same_bits(program.run(batch, rows), every[rows])
        assert_same_bits(program.native.run_head(rows), every[rows])
    for bad in (-1, 9):
        with pytest.raises(ValueError, match=rf"`rows`\[1\] must be in \[0, 9\), got {bad}"):
            program.run(batch, [0, bad])
    assert math.isfinite(float(every.sum()))


def test_weights_that_do_not_fit_are_refused() -> None:
    weight = ops.linear_weight(random_source(7, 33)[1], EXACT)
    with pytest.raises(ValueError, match="`head` takes a weight of 32 columns, not 33"):
        eager_ops.head(torch.randn(5, 32), norm_weight(torch.ones(32), 1e-5), weight)
    with pytest.raises(ValueError, match="`head` takes 33 columns as `x`, not 32"):
        eager_ops.head(torch.randn(5, 32), norm_weight(torch.ones(33), 1e-5), weight)
