"""The operator short_conv and the pool of recurrent states: where a sequence may resume and where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.ops.helpers import with_each_kernel_set
from tests.reference import short_conv as reference
from tests.reference.compare import assert_close, assert_same_bits
from tests.support.state_steps import (
    Shape,
    Steps,
    assert_kept_states_resume,
    assert_rejected_drafts_are_undone,
    assert_wrong_states_are_refused,
)
from tgi_asgi import _C, ops
from tgi_asgi.ops import ShortConvWeight
from tgi_asgi.ops.recorder import Kind


def steps_of(weight: ShortConvWeight, columns: int, num_slots: int, **options: bool) -> Steps:
    return Steps(
        lambda rows, layer: ops.short_conv(rows[0], weight, layer, **options),
        Shape(*weight.taps.shape), [columns], num_slots,
    )  # fmt: skip


def random_weight(channels: int, taps: int, *, has_bias: bool) -> ShortConvWeight:
    bias = torch.randn(channels).numpy() if has_bias else None
    return ShortConvWeight(torch.randn(channels, taps).numpy(), bias)


@pytest.mark.parametrize("options", [{"is_gated": True}, {"has_silu": True}, {}], ids=str)
@pytest.mark.parametrize(
    ("channels", "taps", "tokens"),
    [(1, 2, 1), (3, 3, 2), (17, 4, 9), (33, 16, 40), (64, 3, 1), (129, 4, 33), (300, 5, 17), (513, 3, 64)],
)
def test_a_sequence_is_that_of_the_reference(
    kernel_set: str, channels: int, taps: int, tokens: int, options: dict[str, bool]
) -> None:
    _C.set_num_threads(3)
    weight = random_weight(channels, taps, has_bias=tokens % 2 == 1)
    columns = 3 * channels if options.get("is_gated") else channels + tokens % 3
    rows = torch.randn(tokens, columns)
    (found,) = steps_of(weight, columns, 2, **options).run([(1, 0, [rows])])
    assert_close(found, reference.short_conv(rows, weight, **options), length=taps + 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_has_the_same_bits_in_any_steps_and_team(kernel_set: str, threads: int) -> None:
    """Compute token by token, in chunks, next to others, and in another slot."""
    weight = random_weight(70, 4, has_bias=True)
    texts = [torch.randn(length, 210) for length in (23, 11, 40)]
    _C.set_num_threads(2)
    whole = [steps_of(weight, 210, 1, is_gated=True).run([(0, 0, [text])])[0] for text in texts]
    _C.set_num_threads(threads)
    steps = steps_of(weight, 210, 8, is_gated=True)
    for cuts in ([1] * 40, [2, 1, 9, 1, 1, 26], [5, 18, 17]):
        for slot, text in enumerate(texts):  # slots are reused
            found, start = [], 0
            for size in cuts:
                if start < len(text):
                    others = [(slot + 3, 0, [texts[1][:3]])] if start % 2 else []
                    found.append(steps.run([*others, (slot, start, [text[start : start + size]])])[-1])
                    start += size
            assert_same_bits(torch.cat(found), whole[slot])


def test_a_step_may_be_computed_again() -> None:
    """Check that a void step leaves the earlier state in place, so that repeating it is right."""
    _C.set_num_threads(2)
    weight, text = random_weight(5, 3, has_bias=False), torch.randn(9, 5)
    (whole,) = steps_of(weight, 5, 1).run([(0, 0, [text])])
    steps = steps_of(weight, 5, 4)
    steps.run([(2, 0, [text[:4]])])
    for wrong in (torch.randn(1, 5), torch.randn(3, 5), text[4:6]):
        steps.run([(2, 4, [wrong])])
    assert_same_bits(steps.run([(2, 6, [text[6:]])])[0], whole[6:])


def test_a_row_that_cannot_go_on_is_refused_and_leaves_the_others_states() -> None:
    _C.set_num_threads(1)
    weight, text = random_weight(5, 3, has_bias=False), torch.randn(9, 5)
    (whole,) = steps_of(weight, 5, 1).run([(0, 0, [text])])
    steps = steps_of(weight, 5, 4)
    steps.run([(2, 0, [text[:4]])])
    for wrong in ((1, 4, [text[4:5]]), (2, 3, [text[3:4]]), (2, 5, [text[5:6]])):
        with pytest.raises(ValueError, match=f"slot {wrong[0]} has no state of {wrong[1]} tokens"):
            steps.run([(3, 0, [text]), wrong])
    steps.run([(2, 4, [text[4:6]])])
    assert_same_bits(steps.run([(2, 6, [text[6:]])])[0], whole[6:])
    steps.run([(2, 0, [text[:2]])])  # another sequence: nothing remains of the previous one
    for start in (4, 6, 9):
        with pytest.raises(ValueError, match=f"slot 2 has no state of {start} tokens"):
            steps.run([(2, start, [text[:1]])])
    with pytest.raises(ValueError, match=r"`row_slots`\[0\] must be in \[0, 4\), got 4"):
        steps.run([(4, 0, [text])])


@pytest.mark.parametrize("taps", [2, 4, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_kept_states_are_gone_on_with(taps: int, threads: int) -> None:
    weight, text = random_weight(77, taps, has_bias=True), [torch.randn(12, 77)]
    assert_kept_states_resume(lambda slots: steps_of(weight, 77, slots), text, threads)


@pytest.mark.parametrize("taps", [2, 4])
def test_drafts_are_taken_back(taps: int) -> None:
    weight = random_weight(33, taps, has_bias=True)
    text, wrong = ([torch.randn(count, 33)] for count in (12, 4))
    assert_rejected_drafts_are_undone(lambda slots: steps_of(weight, 33, slots), text, wrong)


def test_states_that_are_not_there_are_refused() -> None:
    weight = random_weight(5, 4, has_bias=False)
    assert_wrong_states_are_refused(lambda slots: steps_of(weight, 5, slots), [torch.randn(9, 5)])


def test_sets_agree_to_the_bit() -> None:
    """Check all kernel sets, whatever their arithmetic, as all round products of float32 alike."""
    _C.set_num_threads(2)
    weight, rows = random_weight(77, 4, has_bias=True), torch.randn(21, 77)
    found = [
        each
        for _, each in with_each_kernel_set(
            lambda: steps_of(weight, 77, 1, has_silu=True).run([(0, 0, [rows])])[0]
        )
    ]
    for each in found:
        assert_same_bits(each, found[0])


def test_what_a_sequence_takes_is_known_before() -> None:
    shapes = [Shape(33, 4), Shape(64, 2, 17)]
    pool = ops.StatePool(shapes, num_slots=3)
    assert sum(map(ops.state_bytes, shapes)) == pool.native.slot_bytes == 2 * 4 * (3 * 64 + 64 + 32)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(0, 3), "`num_channels` must be positive, got 0"),
        (Shape(1 << 31, 3), "`num_channels` must be at most"),
        (Shape(4, 1), r"`num_taps` must be in \[2, 16\], got 1"),
        (Shape(4, 17), r"`num_taps` must be in \[2, 16\], got 17"),
        (Shape(4, 2, -1), r"`num_floats` must be in \[0, "),
    ],
    ids=str,
)
def test_states_that_cannot_be_are_refused(shape: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.StatePool([shape], num_slots=1)


def test_operands_that_do_not_fit_are_refused() -> None:
    recorder = ops.Recorder()
    rows, states = recorder.value(Kind.ROWS, 12), ops.StatePool([Shape(4, 3)], num_slots=1).layers[0]
    weight = random_weight(4, 3, has_bias=False)
    keys: Any = ops.KvPool([Keys()], num_blocks=1, block_size=16, dtype="float32").layers[0]
    with pytest.raises(TypeError, match="`short_conv` takes states as `cache`, not KvLayer"):
        ops.short_conv(rows, weight, keys)
    with pytest.raises(TypeError, match="`attention` takes keys and values as `cache`, not StateLayer"):
        ops.attention(recorder.value(Kind.QUERY, 8), states, ops.AttentionSpec(1.0))
    with pytest.raises(ValueError, match="states of 4 channels and 2 taps, not 4 and 3"):
        ops.short_conv(rows, random_weight(4, 2, has_bias=False), states)
    with pytest.raises(ValueError, match="takes 12 columns as `rows`, not 13"):
        ops.short_conv(recorder.value(Kind.ROWS, 13), weight, states, is_gated=True)
    with pytest.raises(ValueError, match="takes columns 0 to 4 of `rows`, which has 3"):
        ops.short_conv(recorder.value(Kind.ROWS, 3), weight, states)
    with pytest.raises(TypeError, match="`short_conv` takes rows as `rows`, not an activation"):
        ops.short_conv(recorder.value(Kind.ACTIVATION, 12), weight, states)
    with pytest.raises(ValueError, match=r"`taps` must be \[channels, taps\]"):
        ShortConvWeight(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="`bias` must have 4 elements"):
        ShortConvWeight(np.zeros((4, 3), np.float32), np.zeros(3, np.float32))
    wide: Any = np.zeros((4, 3))
    with pytest.raises(TypeError, match="`taps` must be float32"):
        ShortConvWeight(wide)


@dataclass(frozen=True)
class Keys:
    num_kv_heads: int = 1
    head_dim: int = 8
    value_dim: int = 8
    is_latent: bool = False
