"""One step's inputs and results as single buffers, each copied to or from the device at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops import FlatRows
from tgi_asgi.ops.cuda_batch import CudaBatch
from tgi_asgi.ops.cuda_sample_state import DeviceSamples

_ALIGNMENT = 16

_Section = tuple[str, tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's inputs."""

    num_tokens: int
    num_sequences: int
    num_rows: int  # rows of logits
    num_decodes: int  # sequences that decode one token; they come first
    max_query_len: int  # longest query of the other sequences
    num_columns: int  # of the uploaded block tables: the blocks of the longest sequence
    prompt_lens: tuple[tuple[int, int], ...] = ()  # per other sequence: tokens in this step, and in total
    has_adapters: bool = False  # a token has one

    def sections(self) -> list[_Section]:
        t, s, r = self.num_tokens, self.num_sequences, self.num_rows
        return [
            ("slots", (t,), torch.int64),
            ("ids", (t,), torch.int32),
            ("positions", (t,), torch.int32),
            ("adapters", (t,), torch.int32),
            ("query_start", (s + 1,), torch.int32),
            ("context_len", (s,), torch.int32),
            ("from_slot", (self.num_decodes,), torch.int32),
            ("rows", (r,), torch.int32),
            ("row_slots", (r,), torch.int32),
            ("mask_rows", (r,), torch.int32),
            ("block_table", (s, self.num_columns), torch.int32),
        ]

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.sections())

    @property
    def num_prompts(self) -> int:
        return self.num_sequences - self.num_decodes

    @property
    def graph(self) -> tuple[int, ...]:
        """Key of the step's graph: graphs read no prompt lengths, and block tables from a fixed place."""
        return (
            self.num_tokens, self.num_sequences, self.num_rows, self.num_decodes, self.max_query_len,
            self.has_adapters,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """A step's inputs, on the host or the device."""

    shape: StepShape
    slots: Tensor  # [n_tokens] int64; -1: padding
    ids: Tensor  # [n_tokens] int32
    positions: Tensor  # [n_tokens] int32
    adapters: Tensor  # [n_tokens] int32: slot of each token's adapter; -1: none
    query_start: Tensor  # [n_sequences + 1] int32
    context_len: Tensor  # [n_sequences] int32; 0: padding
    from_slot: Tensor  # [n_decodes] int32: slot to read the last token from; -1: use `ids`
    rows: Tensor  # [n_rows] int32: tokens whose logits are computed
    row_slots: Tensor  # [n_rows] int32: sampling slots; -1: none
    mask_rows: Tensor  # [n_rows] int32: rows of the grammar masks; -1: none
    block_table: Tensor  # [n_sequences, n_columns] int32

    @classmethod
    def view(cls, memory: Tensor, shape: StepShape) -> StepBuffers:
        """Lay the inputs out in memory [num_bytes] uint8."""
        return cls(shape, **_views(memory, shape.sections()))

    def fill(
        self,
        batch: FlatRows,
        from_slot: Sequence[int],
        rows: Sequence[int],
        row_slots: Sequence[int],
        mask_rows: Sequence[int],
        adapters: npt.NDArray[np.int32],
    ) -> None:
        """Write a batch of at most this shape; the rest becomes padding.

        The first `len(from_slot)` sequences decode; the others are placed where the shape's other sequences
        begin.
        """
        decodes, first, r = len(from_slot), self.shape.num_decodes, len(rows)
        (table,) = batch.block_tables  # one table for all layers
        for target, values, padding in (
            (self.slots, batch.slots, -1),
            (self.ids, batch.ids, 0),
            (self.positions, batch.positions, 0),
            (self.adapters, adapters, -1),
            (self.context_len, batch.context_len, 0),
            (self.block_table[:, : table.shape[1]], table, 0),
        ):
            source = torch.from_numpy(values)
            behind = first + len(source) - decodes
            target[:decodes], target[decodes:first] = source[:decodes], padding
            target[first:behind], target[behind:] = source[decodes:], padding
        # No kernel reads the entries of decoding sequences.
        starts = torch.from_numpy(batch.query_start[decodes:]) + (first - decodes)
        self.query_start[:first] = 0
        self.query_start[first : first + len(starts)] = starts
        self.query_start[first + len(starts) :] = starts[-1]
        self.from_slot[:decodes], self.from_slot[decodes:] = torch.tensor(from_slot, dtype=torch.int32), -1
        self.rows[:r], self.rows[r:] = torch.tensor(rows, dtype=torch.int32), 0
        self.row_slots[:r], self.row_slots[r:] = torch.tensor(row_slots, dtype=torch.int32), -1
        self.mask_rows[:r], self.mask_rows[r:] = torch.tensor(mask_rows, dtype=torch.int32), -1

    def clear(self) -> None:
        """Make everything padding, which writes to no cache and samples for no slot."""
        for field in fields(self)[1:]:
            getattr(self, field.name).zero_()
        for tensor in (self.slots, self.adapters, self.from_slot, self.row_slots, self.mask_rows):
            tensor.fill_(-1)

    def batch(self, block_tables: Tensor) -> CudaBatch:
        """Return the batch for a program, with tables [n_sequences or more, max_blocks]."""
        return CudaBatch(
            self.ids, self.positions, self.slots, self.query_start, self.context_len,
            block_tables[: self.shape.num_sequences], self.shape.num_decodes, self.shape.max_query_len,
            self.shape.prompt_lens, self.adapters if self.shape.has_adapters else None,
        )  # fmt: skip


def result_bytes(num_rows: int, max_top: int) -> int:
    """Return the size of the sampling results."""
    return _num_bytes(_result_sections(num_rows, max_top))


def view_result(memory: Tensor, num_rows: int, max_top: int) -> DeviceSamples:
    """Lay sampling results out in memory [result_bytes] uint8; top entries last, so copies can skip them."""
    return DeviceSamples(**_views(memory, _result_sections(num_rows, max_top)))


def _result_sections(num_rows: int, max_top: int) -> list[_Section]:
    shapes = {"top_ids": (num_rows, max_top), "top_logprobs": (num_rows, max_top)}
    dtypes = {"is_finite": torch.bool, "logprobs": torch.float32, "top_logprobs": torch.float32}
    names = sorted((field.name for field in fields(DeviceSamples)), key=lambda name: name in shapes)
    return [(name, shapes.get(name, (num_rows,)), dtypes.get(name, torch.int32)) for name in names]


def _num_bytes(sections: Sequence[_Section]) -> int:
    return sum(_padded(shape, dtype) for _, shape, dtype in sections)


def _views(memory: Tensor, sections: Sequence[_Section]) -> dict[str, Tensor]:
    views, first = {}, 0
    for name, shape, dtype in sections:
        count = torch.Size(shape).numel() * dtype.itemsize
        views[name] = memory[first : first + count].view(dtype).view(shape)
        first += _padded(shape, dtype)
    return views


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
