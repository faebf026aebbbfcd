"""Steps of one operator over a pool of states: what it reads and writes is NaN where nothing was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.reference.compare import assert_same_bits
from tgi_asgi import _C, ops
from tgi_asgi.ops import Kind, Value

MAX_TOKENS = 64
Text = Sequence[Tensor]  # the rows of each input


def part(text: Text, start: int, stop: int) -> list[Tensor]:
    """Return some tokens of a text."""
    return [rows[start:stop] for rows in text]


@dataclass(frozen=True)
class Shape:
    """A `StateShape`."""

    num_channels: int
    num_taps: int
    num_floats: int = 0


class Steps:
    """A program of one operator, whose states are the second layer's of a pool.

    Args:
        operator: makes its value of the inputs' and of the layer.
        columns: of each input.
    """

    def __init__(
        self,
        operator: Callable[[Sequence[Value], ops.StateLayer], Value],
        shape: Shape,
        columns: Sequence[int],
        num_slots: int,
    ) -> None:
        pool = ops.StatePool([Shape(3, 2), shape], num_slots=num_slots)
        recorder = ops.Recorder()
        self._inputs = [recorder.value(Kind.ROWS, count) for count in columns]
        self._out = operator(self._inputs, pool.layers[1])
        self._program = ops.CpuProgram(
            recorder, max_tokens=MAX_TOKENS, max_sequences=num_slots, max_rows=1, max_context=1000,
            inputs=self._inputs, outputs=[self._out],
        )  # fmt: skip

    def run(self, parts: Sequence[tuple[int, int, Sequence[Tensor]]]) -> list[Tensor]:
        """Compute parts of sequences: their slots, where they begin, and their rows of each input."""
        lengths = [len(rows[0]) for _, _, rows in parts]
        total = sum(lengths)
        for value in (*self._inputs, self._out):
            self._array(value)[:] = np.nan
        for index, value in enumerate(self._inputs):
            self._program.write(value, torch.cat([rows[index] for _, _, rows in parts]))
        zeros = np.zeros(total, np.int32)
        batch = ops.FlatRows(
            ids=zeros, positions=zeros, slots=zeros.astype(np.int64), query_start=np.cumsum([0, *lengths]),
            context_len=np.array([start + len(rows[0]) for _, start, rows in parts]),
            block_table=np.zeros((len(parts), 1), np.int32), row_slots=[slot for slot, _, _ in parts],
        )  # fmt: skip
        self._program.run(batch, ())
        padding = self._array(self._out)[:total, self._out.columns :]
        assert not padding.any(), "what products read behind the columns must be zeros"
        return list(self._program.read(self._out, total).split(lengths))

    def _array(self, value: Value) -> np.ndarray:
        found: np.ndarray = self._program._calls.buffers.of(value, "rows").array()
        return found


def assert_steps_leave_bits_alone(make: Callable[[int], Steps], texts: Sequence[Text], threads: int) -> None:
    """Hold texts cut into steps, beside others and in slots used before, to each alone and whole.

    Args:
        make: returns steps of so many slots.
        texts: three, of which the second has three tokens at least.
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
    """Hold a text of nine tokens, at whose fifth steps of other texts are computed first, to it whole."""
    _C.set_num_threads(2)
    (whole,) = make(1).run([(0, 0, text)])
    steps = make(4)
    steps.run([(2, 0, part(text, 0, 4))])
    for other in (*wrong, part(text, 4, 6)):
        steps.run([(2, 4, other)])
    assert_same_bits(steps.run([(2, 6, part(text, 6, 9))])[0], whole[6:])
