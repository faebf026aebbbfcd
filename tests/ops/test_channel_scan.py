"""The operator channel_scan: Mamba's channels, each with steps and a state of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.helpers import with_each_kernel_set
from tests.reference import channel_scan as reference
from tests.reference.compare import assert_close, assert_same_bits
from tests.support.state_steps import Shape, Steps
from tgi_asgi import _C, ops
from tgi_asgi.ops import ChannelScanWeight, Value
from tgi_asgi.ops.recorder import Kind

_PARTS, _GATES = 5, 3  # first columns of B and C, and of the gates


def random_channels(channels: int, size: int) -> ChannelScanWeight:
    a, d = -torch.rand(channels, size) * 3, torch.randn(channels)
    return ChannelScanWeight(a.numpy(), d.numpy())


def random_weight(heads: int, dim: int, groups: int, size: int) -> ChannelScanWeight:
    """Return channels as many as those of heads, for the tests that both have."""
    return random_channels(heads * dim, size * groups)


def steps_of(weight: ChannelScanWeight, num_slots: int) -> Steps:
    channels, size = weight.a.shape
    return Steps(
        lambda rows, layer: ops.channel_scan(
            rows[0], rows[1], rows[2], rows[3], weight, layer, parts_column=_PARTS, gate_column=_GATES
        ),
        Shape(7, 3, channels * size),
        [channels, channels, _PARTS + 2 * size, _GATES + channels + 1],
        num_slots,
    )


def random_text(weight: ChannelScanWeight, tokens: int) -> list[Tensor]:
    channels, size = weight.a.shape
    columns = (channels, channels, _PARTS + 2 * size, _GATES + channels + 1)
    return [torch.randn(tokens, count) for count in columns]


def expected_of(text: list[Tensor], weight: ChannelScanWeight) -> Tensor:
    x, steps, parts, gate = text
    return reference.channel_scan(x, steps, parts[:, _PARTS:], gate[:, _GATES:-1], weight)


@pytest.mark.parametrize(
    ("channels", "size", "tokens"), [(16, 1, 1), (48, 5, 17), (208, 16, 40), (80, 33, 9), (1040, 3, 2)]
)
def test_a_sequence_is_that_of_the_reference(kernel_set: str, channels: int, size: int, tokens: int) -> None:
    _C.set_num_threads(3)
    weight = random_channels(channels, size)
    text = random_text(weight, tokens)
    (found,) = steps_of(weight, 2).run([(1, 0, text)])
    assert_close(found, expected_of(text, weight), length=4 * (size + tokens))


def test_steps_of_any_size_are_those_of_the_reference(kernel_set: str) -> None:
    """Softplus of numbers that are far from zero, and states that vanish or stay."""
    _C.set_num_threads(2)
    weight = random_channels(96, 4)
    weight.a[::7] *= 1e4
    weight.a[1::7] = 0
    text = random_text(weight, 64)
    text[1] = torch.linspace(-40, 40, 64 * 96).view(64, 96)
    (found,) = steps_of(weight, 1).run([(0, 0, text)])
    expected = expected_of(text, weight)
    scale = expected.abs().clamp_min(1.0)
    assert_close(found / scale.float(), expected / scale, length=256)


def test_what_is_not_finite_stays_in_its_channel(kernel_set: str) -> None:
    _C.set_num_threads(2)
    weight = random_channels(64, 6)
    text = random_text(weight, 5)
    for index, value in enumerate((float("nan"), float("inf"))):
        text[0][2, 11 + 20 * index] = value
    text[1][3, 50] = float("nan")
    (found,) = steps_of(weight, 1).run([(0, 0, text)])
    bad = ~found.isfinite()
    expected = torch.zeros_like(bad)
    expected[2:, [11, 31]] = True
    expected[3:, 50] = True
    torch.testing.assert_close(bad, expected)


def test_sets_agree_to_the_bit() -> None:
    _C.set_num_threads(2)
    weight = random_channels(112, 7)
    text = random_text(weight, 21)
    found = [each for _, each in with_each_kernel_set(lambda: steps_of(weight, 1).run([(0, 0, text)])[0])]
    for each in found:
        assert_same_bits(each, found[0])


def test_operands_that_do_not_fit_are_refused() -> None:
    recorder, weight = ops.Recorder(), random_channels(32, 4)
    rows, parts = recorder.value(Kind.ROWS, 32), recorder.value(Kind.ROWS, 9)
    layer = ops.StatePool([Shape(3, 2, 128)], num_slots=1).layers[0]

    def scan(x: Value, steps: Value, parts: Value, gate: Value, **columns: int) -> None:
        ops.channel_scan(x, steps, parts, gate, weight, layer, **columns)

    scan(rows, rows, parts, rows, parts_column=1)
    with pytest.raises(ValueError, match="takes states of 128 floats, not 127"):
        other = ops.StatePool([Shape(3, 2, 127)], num_slots=1).layers[0]
        ops.channel_scan(rows, rows, parts, rows, weight, other)
    with pytest.raises(ValueError, match="takes 32 columns as `x`, not 9"):
        scan(parts, rows, parts, rows)
    with pytest.raises(ValueError, match="takes 32 columns as `steps`, not 9"):
        scan(rows, parts, parts, rows)
    with pytest.raises(ValueError, match="takes columns 2 to 10 of `parts`, which has 9"):
        scan(rows, rows, parts, rows, parts_column=2)
    with pytest.raises(ValueError, match="takes columns -1 to 7 of `parts`, which has 9"):
        scan(rows, rows, parts, rows, parts_column=-1)
    with pytest.raises(ValueError, match="takes columns 1 to 33 of `gate`, which has 32"):
        scan(rows, rows, parts, rows, gate_column=1)


def test_parameters_that_do_not_fit_are_refused() -> None:
    ones = np.ones((32, 4), np.float32)
    wide: Any = -np.ones((32, 4))
    with pytest.raises(ValueError, match=r"`a` must be \[channels, state_size\], got \[32\]"):
        ChannelScanWeight(-ones[:, 0], ones[:, 0])
    with pytest.raises(TypeError, match="`a` must be float32, got float64"):
        ChannelScanWeight(wide, ones[:, 0])
    with pytest.raises(ValueError, match="`d` must have 32 elements"):
        ChannelScanWeight(-ones, ones[:31, 0])
    for wrong in (1e-9, float("nan")):
        with pytest.raises(ValueError, match="`a` must not be positive"):
            ChannelScanWeight(-ones * np.float32(-wrong), ones[:, 0])
    with pytest.raises(ValueError, match="must be multiples of 16, got 24"):
        steps_of(random_channels(24, 4), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 0}, r"`num_channels` must be in \[1, 1048576\], got 0"),
        ({"num_channels": 24}, "`num_channels` must be a multiple of 16, got 24"),
        ({"state_size": 1 << 40}, r"`state_size` must be in \[1, 1048576\]"),
        ({"state_size": 3}, "the layer's state must have 96 floats, got 128"),
        ({"a": np.zeros((2, 16, 4), np.float32)}, r"`a` must have shape \[2, 4, 16\]"),
        ({"d": np.zeros(31, np.float32)}, r"`d` must have shape \[32\]"),
        ({"parts_column": 25}, r"columns \[25, 33\) must be in `parts`, which has 32"),
        ({"parts_column": -1}, r"columns \[-1, 7\) must be in `parts`"),
        ({"gate_column": 1 << 62}, "must be in `gate`, which has 32"),
    ],
)
def test_the_extension_checks_what_it_reads(change: dict[str, Any], message: str) -> None:
    program = _C.Program(max_tokens=8, max_sequences=1, max_rows=1, max_context=64)
    rows = [program.rows(32) for _ in range(5)]
    given: dict[str, Any] = {
        "num_channels": 32, "state_size": 4, "a": np.zeros((2, 4, 16), np.float32),
        "d": np.zeros(32, np.float32), "parts_column": 0, "gate_column": 0, **change,
    }  # fmt: skip
    pool = ops.StatePool([Shape(3, 2, 128)], num_slots=1).native
    with pytest.raises(ValueError, match=message):
        program.channel_scan(
            source=rows[0], steps=rows[1], parts=rows[2], gate=rows[3], scan=_C.ChannelScan(**given),
            states=pool, layer=0, out=rows[4],
        )  # fmt: skip


def test_an_input_cannot_be_the_output() -> None:
    program = _C.Program(max_tokens=8, max_sequences=1, max_rows=1, max_context=64)
    rows = [program.rows(32) for _ in range(5)]
    scan = _C.ChannelScan(
        num_channels=32, state_size=4, a=np.zeros((2, 4, 16), np.float32), d=np.zeros(32, np.float32),
        parts_column=0, gate_column=0,
    )  # fmt: skip
    pool = ops.StatePool([Shape(3, 2, 128)], num_slots=1).native
    for index in range(4):
        with pytest.raises(ValueError, match="`out` must be another buffer"):
            program.channel_scan(
                source=rows[0], steps=rows[1], parts=rows[2], gate=rows[3], scan=scan, states=pool, layer=0,
                out=rows[index],
            )  # fmt: skip
