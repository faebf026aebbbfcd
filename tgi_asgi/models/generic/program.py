"""Steps of a `transformers` module: all tokens of all sequences in one call, in Python, on native kernels.

`SequentialProgram` is the fallback for models that native attention does not support: one sequence after the
other, each on a cache kept by the model's own code.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.generic.attention import PagedLayers, running
from tgi_asgi.models.generic.caller import Caller
from tgi_asgi.models.generic.delta_nets import NativeStates
from tgi_asgi.models.generic.module_caches import empty_cache
from tgi_asgi.models.generic.modules import Head, Mode
from tgi_asgi.models.generic.own_cache import own_cache
from tgi_asgi.models.generic.recurrent import RecurrentLayers
from tgi_asgi.models.generic.states import RowSpan, SlotStates
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.text_program import TextProgram


class ModuleProgram(TextProgram, ABC):
    """A `Program` of the runner that is written in Python."""

    native = None
    _states: SlotStates[Any] | NativeStates

    @property
    def num_steps(self) -> int:
        """Number of steps that have been computed, including the last one's states."""
        return self._states.num_steps

    def roll_back_to(self, num_steps: int) -> None:
        """Discard the states of a step that was computed after the first `num_steps` and then failed."""
        if self.num_steps > num_steps:
            self._states.forget()

    def discard_states(self, slot: int, num_tokens: int) -> None:
        """Discard the states of a slot after more than `num_tokens` tokens."""
        self._states.discard(slot, num_tokens)

    @abstractmethod
    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; return the logits [n_rows, vocab] of `rows`, indices of tokens."""

    @abstractmethod
    def run_head(self, rows: Sequence[int]) -> Floats:
        """Compute the logits of other rows of the last step."""

    def run_and_sample(
        self,
        batch: ops.FlatRows,
        rows: Sequence[int],
        slots: Sequence[int],
        state: ops.SampleState,
        mask: npt.NDArray[np.int32] | None = None,
        drafts: Sequence[int] = (),
    ) -> ops.SampleResult:
        """Compute a step and sample a token after each of `rows`; see `CpuProgram.run_and_sample`."""
        return ops.sample(self.run(batch, rows), state, slots, mask=mask, drafts=drafts)


class GenericProgram(ModuleProgram):
    """All sequences of a step in one call of the module.

    Args:
        model: Model with its weights, set to native attention.
        head: Head that computes only the requested rows.
        layers: The model's attention layers.
        recurrent: The model's recurrent layers, if any.
        native_states: Their states, if they run on native kernels.
        first_position: Position of a sequence's first token.
        mode: Shared settings of its products, including the step.
        decode: See `Caller`.
    """

    def __init__(
        self, model: Any, head: Head, layers: PagedLayers, recurrent: RecurrentLayers | None, *,
        vocab_size: int, first_position: int, mode: Mode, native_states: NativeStates | None = None,
        decode: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self._mode = mode
        self._batch: ops.FlatRows | None = None
        self._device = mode.backend.device
        self._caller = Caller(model, head, vocab_size, self._device, decode)
        self._layers, self._recurrent, self._first_position = layers, recurrent, first_position
        self._slot_states: SlotStates[Any] = SlotStates(lambda: empty_cache(model))
        self._native_states = native_states
        self._states = self._slot_states if native_states is None else native_states
        self._output: Any = None

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; see `ModuleProgram.run`."""
        ids = torch.from_numpy(batch.ids.astype(np.int64))[None].to(self._device)
        positions = torch.from_numpy(batch.positions.astype(np.int64) + self._first_position)[None]
        self._output, self._batch = None, batch
        computing = self._mode.backend.computing()
        with torch.inference_mode(), computing, running(self._layers), self._adapting():
            self._begin(batch)
            try:
                logits, self._output = self._caller.compute(
                    rows, input_ids=ids, position_ids=positions.to(self._device), use_cache=False
                )
                self._layers.end()
                self._states.commit()
            finally:
                for layers in (self._recurrent, self._native_states):
                    if layers is not None:
                        layers.end()
        return self._mode.backend.fetch(logits).numpy()

    def _begin(self, batch: ops.FlatRows) -> None:
        self._layers.begin(batch)
        if self._native_states is not None:
            self._native_states.begin(batch)
        elif self._recurrent is not None:
            parts = spans(batch)
            states = self._slot_states.begin(parts, self._recurrent.together(parts))
            self._recurrent.begin(parts, states)

    def run_head(self, rows: Sequence[int]) -> Floats:
        """Compute the logits of other rows of the last step.

        Raises:
            RuntimeError: if no step has been computed.
        """
        if self._output is None:
            raise RuntimeError("no step has been computed")
        with torch.inference_mode(), self._adapting():
            return self._caller.compute_more(rows, self._output).cpu().numpy()

    @contextlib.contextmanager
    def _adapting(self) -> Iterator[None]:
        """Give the products access to the step, for its adapters."""
        self._mode.step = self._batch
        try:
            yield
        finally:
            self._mode.step = None

    def hidden(self, start: int, stop: int) -> Floats:
        """Return the states [n_tokens, hidden] after the last norm, for tokens of the last step."""
        states: Floats = self._output.last_hidden_state[0, start:stop].cpu().numpy()
        return states


class SequentialProgram(ModuleProgram):
    """One sequence after the other, on the model's own cache; without a cache, from its first token on.

    Args:
        model: Model with its weights and its own attention.
        device: Where it is.
        decode: See `Caller`.
    """

    def __init__(
        self, model: Any, head: Head, *, vocab_size: int, device: torch.device,
        decode: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self._device = device
        self._caller = Caller(model, head, vocab_size, device, decode)
        self._cache = own_cache(model)
        self._states: SlotStates[Any] = SlotStates(self._cache.make, self._cache.copy)
        self._vocab_size = vocab_size
        self._computed: list[_Computed] = []

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; see `ModuleProgram.run`."""
        wanted = list(rows)
        ids = torch.from_numpy(batch.ids.astype(np.int64)).to(self._device)
        parts = spans(batch)
        self._computed = []
        out = torch.empty(len(wanted), self._vocab_size)
        with torch.inference_mode():
            first = 0
            for index, (state, part) in enumerate(zip(self._states.begin(parts), parts, strict=True)):
                stop = first + part.length
                kept, inputs = self._cache.inputs(state.cache, ids[first:stop])
                computed = _Computed(first, stop, stop - inputs["input_ids"].shape[1])
                places, mine = computed.among(wanted)
                logits, computed.output = self._compute(mine, batch, index, inputs)
                out[places] = logits.cpu()
                state.cache = self._cache.after(kept, computed.output)
                self._computed.append(computed)
                first = stop
            self._states.commit()
        return out.numpy()

    def _compute(
        self, rows: list[int], batch: ops.FlatRows, index: int, inputs: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Compute the sequence of this index in a step; see `Caller.compute`."""
        return self._caller.compute(rows, **inputs)

    def run_head(self, rows: Sequence[int]) -> Floats:
        """Compute the logits of other rows of the last step."""
        out = torch.empty(len(rows), self._vocab_size)
        with torch.inference_mode():
            for computed in self._computed:
                places, mine = computed.among(rows)
                if places:
                    out[places] = self._caller.compute_more(mine, computed.output).cpu()
        return out.numpy()

    def hidden(self, start: int, stop: int) -> Floats:
        """Return states of tokens of the last step; see `GenericProgram.hidden`."""
        parts = [
            each.states(start, stop) for each in self._computed if start < each.stop and each.first < stop
        ]
        states: Floats = torch.cat(parts).cpu().numpy()
        return states


@dataclass(slots=True)
class _Computed:
    """What a step has computed of one sequence.

    Attributes:
        first: Index of the sequence's first token in the step.
        stop: Index after its last token.
        begin: Where the output's first token would be: before `first`, if earlier tokens were computed again.
        output: The decoder's output.
    """

    first: int
    stop: int
    begin: int
    output: Any = None

    def among(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return which of these rows of a step are the sequence's, and where they are in the output."""
        places = [at for at, row in enumerate(rows) if self.first <= row < self.stop]
        return places, [rows[at] - self.begin for at in places]

    def states(self, start: int, stop: int) -> Tensor:
        """Return the states of those tokens [start, stop) of the step that are the sequence's."""
        states: Tensor = self.output.last_hidden_state
        return states[0, max(start, self.first) - self.begin : stop - self.begin]


def spans(batch: ops.FlatRows) -> list[RowSpan]:
    """Return each sequence's part of a step."""
    stops, slots = batch.query_start, batch.row_slots.tolist()
    starts, lengths = batch.positions[stops[:-1]].tolist(), np.diff(stops).tolist()
    resumes = [None if place < 0 else place for place in batch.resumes.tolist()] or [None] * len(slots)
    keeps: list[list[tuple[int, int]]] = [[] for _ in slots]
    for row, position, place in batch.keeps:
        keeps[row].append((position, place))
    return [RowSpan(*row) for row in zip(slots, starts, lengths, resumes, keeps, strict=True)]
