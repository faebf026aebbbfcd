"""Steps of one operator over a pool of recurrent states; inputs and output start as NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_same_bits
from tests.support.open_program import OpenProgram
from tgi_asgi import _C, ops
from tgi_asgi.ops import Value
from tgi_asgi.ops.recorder import Kind

MAX_TOKENS = 64
NUM_KEPT, NUM_DRAFTS = 3, 3
Text = Sequence[Tensor]  # the rows of each input


def part(text: Text, start: int, stop: int) -> list[Tensor]:
    """Return the tokens [start, stop) of a text."""
    return [rows[start:stop] for rows in text]


@dataclass(frozen=True)
class Shape:
    """A `StateShape`."""

    num_channels: int
    num_taps: int
    num_floats: int = 0


class Steps:
    """A program of one operator that uses the states of a pool's second layer.

    Args:
        operator: Callable that makes the output value from the input values and the layer.
        columns: Number of columns of each input.
    """

    def __init__(
        self,
        operator: Callable[[Sequence[Value], ops.StateLayer], Value],
        shape: Shape,
        columns: Sequence[int],
        num_slots: int,
    ) -> None:
        pool = ops.StatePool(
            [Shape(3, 2), shape], num_slots=num_slots, num_kept=NUM_KEPT, num_drafts=NUM_DRAFTS
        )
        recorder = ops.Recorder()
        self._inputs = [recorder.value(Kind.ROWS, count) for count in columns]
        self._out = operator(self._inputs, pool.layers[1])
        limits = ops.StepLimits(max_tokens=MAX_TOKENS, max_sequences=num_slots, max_rows=1, max_context=1000)
        self._program = OpenProgram(recorder, limits, inputs=self._inputs, outputs=[self._out])

    def run(
        self,
        parts: Sequence[tuple[int, int, Sequence[Tensor]]],
        resumes: Sequence[int] = (),
        keeps: Sequence[tuple[int, int, int]] = (),
        num_drafts: Sequence[int] = (),
    ) -> list[Tensor]:
        """Compute parts of sequences, given as (slot, start, rows of each input).

        Args:
            resumes, keeps, num_drafts: As in `ops.FlatRows`.
        """
        lengths = [len(rows[0]) for _, _, rows in parts]
        total = sum(lengths)
        for value in (*self._inputs, self._out):
            self._array(value)[:] = np.nan
        for index, value in enumerate(self._inputs):
            self._program.write(value, torch.cat([rows[index] for _, _, rows in parts]).numpy())
        zeros = np.zeros(total, np.int32)
        batch = ops.FlatRows(
            ids=zeros, positions=zeros, slots=zeros.astype(np.int64), query_start=np.cumsum([0, *lengths]),
            context_len=np.array([start + len(rows[0]) for _, start, rows in parts]),
            block_table=np.zeros((len(parts), 1), np.int32), row_slots=[slot for slot, _, _ in parts],
            resumes=resumes, keeps=keeps, num_drafts=num_drafts,
        )  # fmt: skip
        self._program.run(batch, ())
        padding = self._array(self._out)[:total, self._out.columns :]
        assert not padding.any(), "the padding after the columns, which products read, must be zero"
        return list(torch.from_numpy(self._program.read(self._out, total)).split(lengths))

    def _array(self, value: Value) -> np.ndarray:
        found: np.ndarray = self._program.buffers.of(value, "rows").array()
        return found


def assert_chunking_keeps_bits(make: Callable[[int], Steps], texts: Sequence[Text], threads: int) -> None:
    """Check that cutting texts into steps, next to others and in reused slots, changes no bit of the results.

    Args:
        make: Callable that returns `Steps` with this number of slots.
        texts: Three texts; the second has at least three tokens.
    """
    _C.set_num_threads(2)
    whole = [make(1).run([(0, 0, text)])[0] for text in texts]
    _C.set_num_threads(threads)
    steps = make(8)
    for cuts in ([1] * 40, [2, 1, 9, 1, 1, 26], [5, 18, 17]):
        for slot, text in enumerate(texts):
            found, start = [], 0
            for size in cuts:
                if start < len(text[0]):
                    others = [(slot + 3, 0, part(texts[1], 0, 3))] if start % 2 else []
                    found.append(steps.run([*others, (slot, start, part(text, start, start + size))])[-1])
                    start += size
            assert_same_bits(torch.cat(found), whole[slot])


def assert_step_may_be_computed_again(
    make: Callable[[int], Steps], text: Text, wrong: Sequence[Text]
) -> None:
    """Check that computing wrong tokens first at the fifth of nine tokens changes no bit of the results."""
    _C.set_num_threads(2)
    (whole,) = make(1).run([(0, 0, text)])
    steps = make(4)
    steps.run([(2, 0, part(text, 0, 4))])
    for other in (*wrong, part(text, 4, 6)):
        steps.run([(2, 4, other)])
    assert_same_bits(steps.run([(2, 6, part(text, 6, 9))])[0], whole[6:])


def assert_kept_states_resume(make: Callable[[int], Steps], text: Text, threads: int) -> None:
    """Check that resuming twelve tokens from states kept on the way, in other slots, changes no bit."""
    _C.set_num_threads(2)
    (whole,) = make(1).run([(0, 0, text)])
    _C.set_num_threads(threads)
    steps = make(4)
    steps.run([(1, 0, part(text, 2, 6))])  # leaves another text's state in the slot
    other, found = steps.run(
        [(0, 0, part(text, 0, 2)), (2, 0, part(text, 0, 9))], keeps=[(1, 3, 1), (1, 7, 0)]
    )
    assert_same_bits(other, whole[:2])
    assert_same_bits(found, whole[:9])
    # Before a row's first token, the kept state is the one that the row starts with.
    (found,) = steps.run([(1, 3, part(text, 3, 9))], resumes=[1], keeps=[(0, 3, 2)])
    assert_same_bits(found, whole[3:9])
    first, second, third = steps.run(
        [(0, 3, part(text, 3, 4)), (3, 7, part(text, 7, 12)), (2, 9, part(text, 9, 12))],
        resumes=[2, 0, -1],
        keeps=[(2, 9, 1)],
    )
    assert_same_bits(torch.cat([first, second, third]), torch.cat([whole[3:4], whole[7:], whole[9:]]))
    (found,) = steps.run([(0, 9, part(text, 9, 12))], resumes=[1])
    assert_same_bits(found, whole[9:])


def assert_wrong_states_are_refused(make: Callable[[int], Steps], text: Text) -> None:
    """Check that a step is refused as a whole if it resumes from a missing state or keeps one wrongly."""
    _C.set_num_threads(2)
    (whole,) = make(1).run([(0, 0, text)])
    steps = make(2)
    begun = [(0, 0, part(text, 0, 5)), (1, 0, part(text, 0, 5))]
    steps.run(begun, keeps=[(0, 3, 1)])
    following = [(0, 5, part(text, 5, 9)), (1, 3, part(text, 3, 9))]
    for resumes, keeps, message in (
        ([-1, 0], [], "place 0 keeps no state of 3 tokens"),
        ([-1, 3], [], "there is no place 3 of kept states"),
        ([1], [], "`resumes` has an entry a sequence"),
        ([-1, 1], [(0, 9, 0)], "a state cannot be kept at 9 of a row of 5 to 9"),
        ([-1, 1], [(0, 4, 0)], "a state cannot be kept at 4 of a row of 5 to 9"),
        ([-1, 1], [(0, 7, 0), (0, 6, 2)], "in the order of rows and positions"),
        ([-1, 1], [(0, 7, 0), (1, 6, 0)], "two states are kept in one place"),
        ([-1, 1], [(0, 7, 1)], "a state is kept where another row begins"),
        ([-1, 1], [(0, 7, 3)], "place of a kept state"),
        ([-1, 1], [(2, 7, 0)], "a state is kept of no row"),
    ):
        with pytest.raises(ValueError, match=message):
            steps.run(following, resumes, keeps)
    for num_drafts, message in (
        ([0], "`num_drafts` has an entry a sequence"),
        ([4, 0], "a row has places for 3 drafts, got 4"),
        ([0, -1], "a row has places for 3 drafts, got -1"),
        ([1, 0], "no state is kept among drafts"),
    ):
        with pytest.raises(ValueError, match=message):
            steps.run(following, [-1, 1], [(0, 6, 0)], num_drafts)
    found = steps.run(following, [-1, 1])
    assert_same_bits(torch.cat(found), torch.cat([whole[5:9], whole[3:9]]))


def assert_rejected_drafts_are_undone(make: Callable[[int], Steps], text: Text, wrong: Text) -> None:
    """Check that drafts, of which any number is right, change no bit of a text of twelve tokens."""
    _C.set_num_threads(2)
    (whole,) = make(1).run([(0, 0, text)])
    for num_right in range(NUM_DRAFTS + 1):
        steps = make(3)
        steps.run([(1, 0, part(text, 0, 4))])
        drafted = [torch.cat(pair) for pair in zip(part(text, 4, 5 + num_right), wrong, strict=True)]
        row = [rows[: 1 + NUM_DRAFTS] for rows in drafted]
        begin = 5 + num_right
        other, found = steps.run([(0, 0, part(text, 0, 2)), (1, 4, row)], num_drafts=[0, NUM_DRAFTS])
        assert_same_bits(other, whole[:2])
        assert_same_bits(found[: 1 + num_right], whole[4:begin])
        for _ in range(2):  # the first is void: its tokens turned out to be wrong only afterwards
            again = [rows[: 1 + NUM_DRAFTS] for rows in wrong]
            steps.run([(1, begin, again)], num_drafts=[NUM_DRAFTS])
            with pytest.raises(ValueError, match=f"slot 1 has no state of {begin + 9} tokens"):
                steps.run([(1, begin + 9, again)])
        (found,) = steps.run(
            [(1, begin, part(text, begin, 12))], num_drafts=[11 - begin] if begin > 7 else []
        )
        assert_same_bits(found, whole[begin:])
