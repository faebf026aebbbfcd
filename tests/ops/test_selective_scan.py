"""The operators selective_scan and gated_norm: Mamba-2's heads and the norm after them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import with_each_kernel_set
from tests.reference import selective_scan as reference
from tests.reference.compare import assert_close, assert_same_bits
from tests.support.eager_ops import array_of
from tests.support.state_steps import Shape, Steps
from tgi_asgi import _C, ops
from tgi_asgi.ops import SelectiveScanWeight
from tgi_asgi.ops.recorder import Kind

_COLUMN = 5  # column of the heads' time steps


def random_weight(heads: int, dim: int, groups: int, size: int, **options: Any) -> SelectiveScanWeight:
    a, d, dt_bias = -torch.rand(heads) - 0.01, torch.randn(heads), torch.randn(heads)
    return SelectiveScanWeight(heads, dim, groups, size, a.numpy(), d.numpy(), dt_bias.numpy(), **options)


def ones(count: int) -> npt.NDArray[np.float32]:
    return np.ones(count, np.float32)


def steps_of(weight: SelectiveScanWeight, num_slots: int) -> Steps:
    return Steps(
        lambda rows, layer: ops.selective_scan(rows[0], rows[1], weight, layer, steps_column=_COLUMN),
        Shape(7, 3, weight.width * weight.state_size),
        [weight.columns, _COLUMN + weight.num_heads],
        num_slots,
    )


def random_text(weight: SelectiveScanWeight, tokens: int) -> list[Tensor]:
    return [torch.randn(tokens, weight.columns), torch.randn(tokens, _COLUMN + weight.num_heads)]


@pytest.mark.parametrize(
    ("heads", "dim", "groups", "size", "tokens"),
    [(1, 16, 1, 1, 1), (3, 16, 1, 5, 17), (4, 64, 2, 33, 40), (2, 80, 2, 16, 9), (6, 48, 3, 20, 33)],
)
@pytest.mark.parametrize("options", [{}, {"dt_limit": (0.3, 1.2), "dt_scale": 0.4}], ids=str)
def test_a_sequence_is_that_of_the_reference(
    kernel_set: str, heads: int, dim: int, groups: int, size: int, tokens: int, options: dict[str, Any]
) -> None:
    _C.set_num_threads(3)
    weight = random_weight(heads, dim, groups, size, **options)
    text = random_text(weight, tokens)
    (found,) = steps_of(weight, 2).run([(1, 0, text)])
    expected = reference.selective_scan(text[0], text[1][:, _COLUMN:], weight)
    assert_close(found, expected, length=4 * (size + tokens))


def test_sets_agree_to_the_bit() -> None:
    _C.set_num_threads(2)
    weight = random_weight(3, 48, 1, 7)
    text, of_norm = random_text(weight, 21), torch.rand(144)

    def scan_and_gate() -> Tensor:
        (y,) = steps_of(weight, 1).run([(0, 0, text)])
        return torch.cat([y, gate(y, torch.ones(21, 150), of_norm, group_width=24)], 1)

    found = [each for _, each in with_each_kernel_set(scan_and_gate)]
    for each in found:
        assert_same_bits(each, found[0])


def gate(rows: Tensor, gates: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    return Steps(
        lambda values, layer: ops.gated_norm(values[0], values[1], array_of(weight), eps=1e-5, **options),
        Shape(1, 2), [rows.shape[1], gates.shape[1]], 1,
    ).run([(0, 0, [rows, gates])])[0]  # fmt: skip


@pytest.mark.parametrize(
    ("is_gate_first", "gate_scale"), [(True, 1.0), (False, 0.3), (False, 1.0), (True, 2.5)]
)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize(
    ("tokens", "columns", "width"), [(1, 1, 1), (9, 48, 16), (17, 66, 11), (40, 129, 129), (3, 300, 75)]
)
def test_gated_norms_are_those_of_the_reference(
    kernel_set: str,
    tokens: int,
    columns: int,
    width: int,
    has_weight: bool,
    is_gate_first: bool,
    gate_scale: float,
) -> None:
    _C.set_num_threads(2)
    rows, gates = torch.randn(tokens, columns), torch.randn(tokens, columns + 3)
    weight = torch.randn(columns) if has_weight else None
    kind: dict[str, Any] = {"is_gate_first": is_gate_first, "gate_scale": gate_scale}
    found = gate(rows, gates, weight, group_width=width, **kind)
    expected = reference.gated_norm(rows, gates[:, :columns], weight, width, 1e-5, **kind)
    assert_close(found, expected, length=width + 8)


def test_operands_that_do_not_fit_are_refused() -> None:
    recorder = ops.Recorder()
    weight = random_weight(2, 16, 1, 4)
    rows, steps = recorder.value(Kind.ROWS, weight.columns), recorder.value(Kind.ROWS, 6)
    layer = ops.StatePool([Shape(3, 2, 128)], num_slots=1).layers[0]
    with pytest.raises(ValueError, match="takes states of 128 floats, not 127"):
        ops.selective_scan(rows, steps, weight, ops.StatePool([Shape(3, 2, 127)], num_slots=1).layers[0])
    with pytest.raises(ValueError, match="takes 40 columns as `rows`, not 6"):
        ops.selective_scan(steps, steps, weight, layer)
    with pytest.raises(ValueError, match="takes columns 5 to 7 of `steps`, which has 6"):
        ops.selective_scan(rows, steps, weight, layer, steps_column=5)
    with pytest.raises(ValueError, match="takes 40 columns of `gate`, which has 6"):
        ops.gated_norm(rows, steps, None, group_width=40, eps=1e-5)
    with pytest.raises(ValueError, match="`group_width` must divide the 6 columns, got 4"):
        ops.gated_norm(steps, rows, None, group_width=4, eps=1e-5)
    with pytest.raises(ValueError, match="`weight` must have 6 elements"):
        ops.gated_norm(steps, rows, ones(5), group_width=6, eps=1e-5)
    with pytest.raises(ValueError, match="`a` must have 2 elements"):
        SelectiveScanWeight(2, 16, 1, 4, ones(3), ones(2), ones(2))
    wide: Any = np.ones(2)
    with pytest.raises(TypeError, match="`d` must be float32"):
        SelectiveScanWeight(2, 16, 1, 4, ones(2), wide, ones(2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 24, 1, 4), "`head_dim` must be a multiple of 16, got 24"),
        ((3, 16, 2, 4), "must divide the 3 heads"),
    ],
)
def test_heads_that_the_kernels_do_not_have_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_of(random_weight(*sizes), 1)
