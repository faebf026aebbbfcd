"""The operators embed and activation: the initial residual stream, and the unchanged residual stream."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import EXACT, FAST, random_source
from tests.support import eager_ops
from tests.support.batches import flat_rows
from tests.support.random_weights import FORMATS, QUANTISED, decoded_values, random_weight
from tgi_asgi import _C, ops


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "factor"),
    [(1, 1, 12.0), (1, 3, 1.0), (17, 129, 12.0), (40, 576, 12.0), (7, 72, 1.0)],
)
def test_rows_are_gathered(kernel_set: str, tokens: int, hidden: int, factor: float, format: str) -> None:
    _C.set_num_threads(3)
    source = random_weight(format, 11, hidden, seed=0)
    ids = torch.randint(11, (tokens,)).tolist()
    batch = flat_rows([(0, tokens)], [[0, 1, 2]], 16, ids=ids)
    x = eager_ops.embed(batch, ops.linear_weight(source, FAST, is_vocabulary=True), factor)
    assert x.dtype is torch.float32
    assert torch.equal(x, decoded_values(source)[ids] * factor)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_codes_are_what_they_mean(kernel_set: str, format: str) -> None:
    source = random_weight(format, 11, 256, seed=1)
    x = eager_ops.embed(flat_rows([(0, 3)], [[0]], 16, ids=[7, 0, 10]), ops.linear_weight(source, FAST))
    torch.testing.assert_close(x, decoded_values(source)[[7, 0, 10]], rtol=1e-6, atol=1e-7)


def test_every_code_format_of_gguf_files_is_made_here() -> None:
    """Check that every format in `ops.FORMATS` is also in tests/support/random_weights.py."""
    rows = [row for row in ops.FORMATS.values() if row.ggml_type is not None and row.has_kernel]
    assert set(QUANTISED) == {row.name for row in rows if row.is_quantised}


@pytest.mark.parametrize("bad", [-1, 11])
def test_an_id_out_of_the_vocabulary_is_refused(bad: int) -> None:
    weight = ops.linear_weight(random_source(11, 4)[1], EXACT)
    with pytest.raises(ValueError, match=rf"`ids`\[1\] must be in \[0, 11\), got {bad}"):
        eager_ops.embed(flat_rows([(0, 2)], [[0]], 16, ids=[3, bad]), weight)


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 5), (1, 3), (17, 129), (7, 72)])
def test_an_activation_is_the_residual_itself(kernel_set: str, tokens: int, hidden: int) -> None:
    _C.set_num_threads(2)
    x = torch.randn(tokens, hidden)
    assert torch.equal(eager_ops.activation(x), x)


@pytest.mark.parametrize("hidden", [32, 72, 129])
def test_a_position_adds_its_own_row(kernel_set: str, hidden: int) -> None:
    _C.set_num_threads(2)
    matrix, source = random_source(50, hidden)
    table, added = ops.linear_weight(source, EXACT, is_vocabulary=True), torch.randn(20, hidden)
    batch = flat_rows([(3, 8), (19, 20)], [[0], [1, 2]], 16, ids=[4, 9, 4, 0, 49, 7])
    found = eager_ops.embed(batch, table, 2.0, added)
    expected = 2.0 * matrix[[4, 9, 4, 0, 49, 7]] + added[[3, 4, 5, 6, 7, 19]]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    late = flat_rows([(19, 21)], [[0, 1]], 16, ids=[0, 0])
    with pytest.raises(ValueError, match=r"`positions`\[1\] must be in \[0, 20\), got 20"):
        eager_ops.embed(late, table, 1.0, added)
    with pytest.raises(ValueError, match=rf"`positions` must be \[n, {hidden}\]"):
        eager_ops.embed(batch, table, 1.0, torch.randn(20, hidden + 1))
