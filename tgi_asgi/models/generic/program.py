"""Steps of a `transformers` module: all tokens of all sequences in one call, in Python, on native kernels.

`SequentialProgram` is the fallback for models that native attention does not support: one sequence after the
other, each on a cache kept by the model's own code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.generic.attention import PagedLayers, running
from tgi_asgi.models.generic.discover import arguments
from tgi_asgi.models.generic.modules import Head, Mode
from tgi_asgi.models.generic.own_cache import own_cache
from tgi_asgi.models.generic.recurrent import RecurrentLayers
from tgi_asgi.models.generic.states import SlotStates, empty_cache
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.types import ImageInput


class Caller:
    """Calls a whole module and keeps its decoder's output, from which a step's further logits are computed.

    Args:
        model: Model with its weights.
        head: The model's head, which computes only the requested rows.
        device: Where the model is.
        decode: Function that replaces the decoder and everything before it.
    """

    def __init__(
        self, model: Any, head: Head, vocab_size: int, device: torch.device,
        decode: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self._model, self._head, self._vocab_size = model, head, vocab_size
        self._device = device
        self._instead = decode
        self._known: Any = None
        self._is_calling = False
        for decoder in decoders_of(model):
            decoder.forward = functools.partial(self._forward, type(decoder).forward.__get__(decoder))

    def compute(self, rows: Iterable[int], **inputs: Any) -> tuple[Tensor, Any]:
        """Return the logits [n_rows, vocab] of these tokens, and the decoder output for `compute_more`."""
        self._known, self._is_calling = None, True
        try:
            return self._call(rows, **inputs), self._known
        finally:
            self._known, self._is_calling = None, False

    def compute_more(self, rows: Iterable[int], known: Any) -> Tensor:
        """Return the logits of other tokens of an earlier call.

        Raises:
            RuntimeError: if that call returned no decoder output.
        """
        if known is None:
            raise RuntimeError("the last step has no decoder output, only logits")
        self._known, self._is_calling = known, True
        try:
            return self._call(rows, input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device))
        finally:
            self._known, self._is_calling = None, False

    def _call(self, rows: Iterable[int], **inputs: Any) -> Tensor:
        self._head.rows = torch.tensor(list(rows), dtype=torch.long, device=self._device)
        try:
            logits: Tensor = self._model(**arguments(self._model, **inputs)).logits
        finally:
            self._head.rows = None
        return logits[0, :, : self._vocab_size].float().contiguous()

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replace a decoder's `forward`: record the output of the outermost call, or return the known one."""
        if not self._is_calling:
            return forward(*args, **kwargs)
        if self._known is None:
            self._is_calling = False
            self._known = (self._instead or forward)(*args, **kwargs)
        return self._known


def decoders_of(model: Any) -> list[Any]:
    """Return the models that a module may call for the head's input: those that contain its embedding.

    `get_decoder` is not reliable: Llama 4 returns itself, ModernBERT a product. A model that also contains
    the head, as in Kosmos 2.5, is left out: it returns logits, only of the rows of its last call.
    """
    from transformers import PreTrainedModel

    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    parts = path.split(".")[:-1]
    around = (model.get_submodule(".".join(parts[: count + 1])) for count in range(len(parts)))
    head = model.get_output_embeddings()
    return [
        module
        for module in around
        if isinstance(module, PreTrainedModel) and all(each is not head for each in module.modules())
    ]


class ModuleProgram(Protocol):
    """A `Program` of the runner that is written in Python."""

    native: None
    _states: SlotStates[Any]

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

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with this prompt."""
        return None

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats: ...

    def run_head(self, rows: Sequence[int]) -> Floats: ...

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
        first_position: Position of a sequence's first token.
        mode: Shared settings of its products, including the step.
        decode: See `Caller`.
    """

    native = None

    def __init__(
        self, model: Any, head: Head, layers: PagedLayers, recurrent: RecurrentLayers | None, *,
        vocab_size: int, first_position: int, mode: Mode,
        decode: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self._mode = mode
        self._batch: ops.FlatRows | None = None
        self._device = mode.backend.device
        self._caller = Caller(model, head, vocab_size, self._device, decode)
        self._layers, self._recurrent, self._first_position = layers, recurrent, first_position
        self._states = SlotStates(lambda: empty_cache(model))
        self._known: Any = None

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; return the logits [n_rows, vocab] of `rows`, indices of tokens."""
        ids = torch.from_numpy(batch.ids.astype(np.int64))[None].to(self._device)
        positions = torch.from_numpy(batch.positions.astype(np.int64) + self._first_position)[None]
        self._known, self._batch = None, batch
        computing = self._mode.backend.computing()
        with torch.inference_mode(), computing, running(self._layers), self._adapting():
            self._begin(batch)
            try:
                logits, self._known = self._caller.compute(
                    rows, input_ids=ids, position_ids=positions.to(self._device), use_cache=False
                )
                self._layers.end()
                self._states.commit()
            finally:
                if self._recurrent is not None:
                    self._recurrent.end()
        return self._mode.backend.fetch(logits).numpy()

    def _begin(self, batch: ops.FlatRows) -> None:
        self._layers.begin(batch)
        if self._recurrent is not None:
            starts, lengths = spans(batch)
            states = self._states.begin(batch.row_slots.tolist(), starts, lengths)
            self._recurrent.begin(starts, lengths, states)

    def run_head(self, rows: Sequence[int]) -> Floats:
        """Compute the logits of other rows of the last step.

        Raises:
            RuntimeError: if no step has been computed.
        """
        if self._known is None:
            raise RuntimeError("no step has been computed")
        with torch.inference_mode(), self._adapting():
            return self._caller.compute_more(rows, self._known).cpu().numpy()

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
        states: Floats = self._known.last_hidden_state[0, start:stop].cpu().numpy()
        return states


class SequentialProgram(ModuleProgram):
    """One sequence after the other, on the model's own cache; without a cache, from its first token on.

    Args:
        model: Model with its weights and its own attention.
        device: Where it is.
    """

    native = None

    def __init__(self, model: Any, head: Head, *, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._caller = Caller(model, head, vocab_size, device)
        self._cache = own_cache(model)
        self._states: SlotStates[Any] = SlotStates(self._cache.make, self._cache.copy)
        self._vocab_size = vocab_size
        self._known: list[_Known] = []

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; see `GenericProgram.run`."""
        wanted = list(rows)
        ids = torch.from_numpy(batch.ids.astype(np.int64)).to(self._device)
        starts, lengths = spans(batch)
        self._known = []
        out = torch.empty(len(wanted), self._vocab_size)
        with torch.inference_mode():
            states = self._states.begin(batch.row_slots.tolist(), starts, lengths)
            first = 0
            for state, length in zip(states, lengths, strict=True):
                kept, inputs = self._cache.inputs(state.cache, ids[first : first + length])
                known = _Known(first, first + length, first + length - inputs["input_ids"].shape[1])
                places, mine = known.among(wanted)
                logits, known.output = self._caller.compute(mine, **inputs)
                out[places] = logits.cpu()
                state.cache = self._cache.after(kept, known.output)
                self._known.append(known)
                first += length
            self._states.commit()
        return out.numpy()

    def run_head(self, rows: Sequence[int]) -> Floats:
        """Compute the logits of other rows of the last step."""
        out = torch.empty(len(rows), self._vocab_size)
        with torch.inference_mode():
            for known in self._known:
                places, mine = known.among(rows)
                if places:
                    out[places] = self._caller.compute_more(mine, known.output).cpu()
        return out.numpy()

    def hidden(self, start: int, stop: int) -> Floats:
        """Return states of tokens of the last step; see `GenericProgram.hidden`."""
        parts = [
            known.output.last_hidden_state[0, max(start, known.first) - known.begin : stop - known.begin]
            for known in self._known
            if start < known.stop and known.first < stop
        ]
        states: Floats = torch.cat(parts).cpu().numpy()
        return states


@dataclass(slots=True)
class _Known:
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


def spans(batch: ops.FlatRows) -> tuple[list[int], list[int]]:
    """Return each sequence's first position in a step, and its number of tokens in it."""
    stops = batch.query_start
    return batch.positions[stops[:-1]].tolist(), np.diff(stops).tolist()
