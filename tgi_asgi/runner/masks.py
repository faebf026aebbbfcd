"""Keeps constrained slots to their grammars: computes masks while the model runs, takes what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.runner.plan import Sampled, SlotStart
from tgi_asgi.text.grammar import Mask, Matcher

_ALL = -1  # every bit of a word set


class SlotMasks:
    """The matchers of all slots whose sequences have a grammar.

        masks.start(start)                    # for each slot start of a step
        pending = masks.begin(slots)          # before the forward pass; a thread computes
        mask = masks.finish(pending)          # before the draw; None if no row is constrained
        masks.accept(slots, drawn)            # after it

    For the runner's thread. A step that raises between `begin` and `accept` changes nothing.
    """

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._slots: dict[int, _Slot] = {}
        self._executor: ThreadPoolExecutor | None = None  # made for the first grammar

    def start(self, start: SlotStart) -> None:
        """Give a slot the grammar of its new sequence, or none."""
        if start.grammar is None:
            self._slots.pop(start.slot, None)
        else:
            self._slots[start.slot] = _Slot(start, self._num_words * 32)

    def begin(self, slots: Sequence[int]) -> Future[Tensor] | None:
        """Begin to compute masks [n_slots, n_words] for slots that will draw; None if none has a grammar."""
        if not self._slots.keys() & set(slots):
            return None
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="tgi-masks")
        return self._executor.submit(self._compute, [self._slots.get(slot) for slot in slots])

    def finish(self, pending: Future[Tensor] | None) -> Tensor | None:
        """Wait for masks."""
        return None if pending is None else pending.result()

    def accept(self, slots: Iterable[int], drawn: Iterable[Sampled]) -> None:
        """Move matchers on by the tokens drawn, and mark those that end or fail their sequences."""
        if not self._slots:
            return
        for slot, sampled in zip(slots, drawn, strict=True):
            constrained = self._slots.get(slot)
            if constrained is not None:
                constrained.accept(sampled)

    def close(self) -> None:
        """End the thread."""
        if self._executor is not None:
            self._executor.shutdown()

    def _compute(self, slots: Sequence[_Slot | None]) -> Tensor:
        masks = np.full((len(slots), self._num_words), _ALL, np.int32)
        for mask, slot in zip(masks, slots, strict=True):
            if slot is not None:
                slot.fill(mask)
        return torch.from_numpy(masks)


class _Slot:
    """One constrained sequence."""

    __slots__ = ("_early", "_matcher", "_num_early")

    def __init__(self, start: SlotStart, num_bits: int) -> None:
        assert start.grammar is not None
        self._matcher: Matcher = start.grammar.matcher(start.output_ids)
        self._num_early = start.min_tokens - len(start.output_ids)  # draws to come that should not end it
        self._early = _bits(start.masked_ids, num_bits)  # what would end it

    def fill(self, mask: Mask) -> None:
        """Write what may be drawn; a sequence that has ended may draw anything: nobody takes it."""
        if self._matcher.is_ended:
            return
        self._matcher.fill_mask(mask)
        if self._matcher.error is not None:
            mask[:] = _ALL
        elif self._num_early > 0:
            longer = mask & ~self._early
            if longer.any():  # else the text can only end here, whatever `min_tokens` wants
                mask[:] = longer

    def accept(self, sampled: Sampled) -> None:
        """Take the token drawn."""
        if sampled.is_finite and not self._matcher.is_ended:
            self._matcher.accept(sampled.token_id)
            self._num_early -= 1
        sampled.is_last = self._matcher.is_ended
        sampled.failure = self._matcher.error


def _bits(ids: Sequence[int], num_bits: int) -> npt.NDArray[np.int32]:
    flags = np.zeros(num_bits, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
