"""One step's inputs and results as single buffers, each copied to or from the device at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops.cuda_batch import CudaBatch
from tgi_asgi.ops.cuda_sample_state import DeviceSamples
from tgi_asgi.ops.layout import round_up
from tgi_asgi.ops.sample import SampleResult

_ALIGNMENT = 16
_ENTRY_BYTES = 4  # int32
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.int64: np.dtype(np.int64), torch.int32: np.dtype(np.int32), torch.float32: np.dtype(np.float32),
    torch.bool: np.dtype(np.bool_),
}  # fmt: skip
_Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Section:
    """An array in a buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int  # byte
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Sections:
    """Arrays that lie one behind the other, each aligned."""

    all: tuple[_Section, ...]
    num_bytes: int
    firsts: npt.NDArray[np.int64]  # of all, and the byte behind the last

    @classmethod
    def of(cls, arrays: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> _Sections:
        """Lay out arrays, given as names, shapes and types."""
        placed, first, firsts = [], 0, [0]
        for name, shape, dtype in arrays:
            count = torch.Size(shape).numel() * dtype.itemsize
            placed.append(_Section(name, shape, dtype, first, count))
            first += round_up(count, _ALIGNMENT)
            firsts.append(first)
        return cls(tuple(placed), first, np.array(firsts))

    def tensors(self, memory: Tensor) -> dict[str, Tensor]:
        """Return the arrays in memory [num_bytes or more] uint8."""
        views = {dtype: memory[: self.num_bytes].view(dtype) for dtype in {part.dtype for part in self.all}}
        found = {}
        for part in self.all:
            first, size = part.first // part.dtype.itemsize, part.num_bytes // part.dtype.itemsize
            flat = views[part.dtype][first : first + size]
            found[part.name] = flat if len(part.shape) == 1 else flat.view(part.shape)
        return found

    def arrays(self, memory: _Array) -> dict[str, _Array]:
        """Return the arrays in the host's memory; numpy's take a tenth of the time of torch's tensors."""
        return {
            part.name: np.ndarray(part.shape, _NUMPY[part.dtype], memory, part.first) for part in self.all
        }


class StepShape(NamedTuple):
    """Sizes of a step's inputs. Steps that differ only in the last two have the same graphs."""

    num_tokens: int
    num_sequences: int
    num_rows: int  # rows of logits
    num_decodes: int  # sequences that decode one token; they come first
    max_query_len: int  # longest query of the other sequences
    has_adapters: bool = False  # a token has one
    num_entries: int = 0  # of block tables, which are new
    prompt_lens: tuple[tuple[int, int], ...] = ()  # per other sequence: tokens in this step, and in total

    @property
    def sections(self) -> _Sections:
        """The inputs, without the entries of block tables, which are uploaded behind them."""
        return _step_sections(self.num_tokens, self.num_sequences, self.num_rows, self.num_decodes)

    @property
    def num_bytes(self) -> int:
        """Size of what is uploaded."""
        return self.sections.num_bytes + self.num_entries * _ENTRY_BYTES

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes of the inputs, as `DeviceRows.write` takes them."""
        return self.num_tokens, self.num_sequences, self.num_rows, self.num_decodes, self.num_entries

    @property
    def num_prompts(self) -> int:
        return self.num_sequences - self.num_decodes

    @property
    def graph(self) -> tuple[int, ...]:
        """The sizes that choose a step's graphs."""
        return self[:6]


@functools.lru_cache(4096)  # steps of the same shape follow each other
def _step_sections(t: int, s: int, r: int, decodes: int) -> _Sections:
    """Lay out the inputs, in the order of `DeviceInput` in csrc/bindings/device_rows.h."""
    return _Sections.of(
        [
            ("slots", (t,), torch.int64),
            ("ids", (t,), torch.int32),
            ("positions", (t,), torch.int32),
            ("adapters", (t,), torch.int32),
            ("query_start", (s + 1,), torch.int32),
            ("context_len", (s,), torch.int32),
            ("table_slots", (s,), torch.int32),
            ("table_firsts", (s,), torch.int32),
            ("table_starts", (s,), torch.int32),
            ("from_slot", (decodes,), torch.int32),
            ("rows", (r,), torch.int32),
            ("row_slots", (r,), torch.int32),
            ("mask_rows", (r,), torch.int32),
        ]
    )


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """A step's inputs on the device."""

    shape: StepShape
    slots: Tensor  # [n_tokens] int64; -1: padding
    ids: Tensor  # [n_tokens] int32
    positions: Tensor  # [n_tokens] int32
    adapters: Tensor  # [n_tokens] int32: slot of each token's adapter; -1: none
    query_start: Tensor  # [n_sequences + 1] int32
    context_len: Tensor  # [n_sequences] int32; 0: padding
    table_slots: Tensor  # [n_sequences] int32: slots, which keep their sequences' block tables; -1: padding
    table_firsts: Tensor  # [n_sequences] int32: the first column whose entry is new
    table_starts: Tensor  # [n_sequences] int32: where in `entries` it is
    from_slot: Tensor  # [n_decodes] int32: slot to read the last token from; -1: use `ids`
    rows: Tensor  # [n_rows] int32: tokens whose logits are computed
    row_slots: Tensor  # [n_rows] int32: sampling slots; -1: none
    mask_rows: Tensor  # [n_rows] int32: rows of the grammar masks; -1: none
    entries: Tensor  # int32, as far as the memory reaches

    @classmethod
    def view(cls, memory: Tensor, shape: StepShape) -> StepBuffers:
        """Lay the inputs out in memory [num_bytes or more] uint8."""
        entries = memory[shape.sections.num_bytes :].view(torch.int32)
        return cls(shape, **shape.sections.tensors(memory), entries=entries)

    def clear(self) -> None:
        """Make everything padding, which writes to no cache and samples for no slot."""
        for field in fields(self)[1:]:
            getattr(self, field.name).zero_()
        for tensor in (
            self.slots, self.adapters, self.table_slots, self.from_slot, self.row_slots, self.mask_rows
        ):  # fmt: skip
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
    return _result_sections(num_rows, max_top).num_bytes


def view_result(memory: Tensor, num_rows: int, max_top: int) -> DeviceSamples:
    """Lay sampling results out in memory [result_bytes] uint8; top entries last, so copies can skip them."""
    return DeviceSamples(**_result_sections(num_rows, max_top).tensors(memory))


def host_result(memory: _Array, num_rows: int, max_top: int) -> SampleResult:
    """Return the results that were copied to the host's memory."""
    return SampleResult(**_result_sections(num_rows, max_top).arrays(memory))


@functools.lru_cache(4096)
def result_firsts(num_rows: int, max_top: int) -> tuple[int, ...]:
    """Return the results' first bytes, in the order of `DeviceResult` in csrc/bindings/device_queue.h."""
    firsts = {part.name: part.first for part in _result_sections(num_rows, max_top).all}
    return tuple(firsts[field.name] for field in fields(DeviceSamples))


@functools.lru_cache(4096)
def _result_sections(num_rows: int, max_top: int) -> _Sections:
    shapes = {"top_ids": (num_rows, max_top), "top_logprobs": (num_rows, max_top)}
    dtypes = {"is_finite": torch.bool, "logprobs": torch.float32, "top_logprobs": torch.float32}
    names = sorted((field.name for field in fields(DeviceSamples)), key=lambda name: name in shapes)
    return _Sections.of(
        [(name, shapes.get(name, (num_rows,)), dtypes.get(name, torch.int32)) for name in names]
    )
