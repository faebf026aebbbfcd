"""Keeps constrained slots to their grammars: computes the masks of a step, takes what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tgi_asgi.runner.plan import Sampled, SlotStart
from tgi_asgi.text.constrain.grammar import Mask, Matcher

_ALL = -1  # every bit of a word set


class SlotMasks:
    """The matchers of all slots whose sequences have a grammar.

        masks.start(start)                    # for each slot start of a step
        mask = masks.compute(slots, drafts)   # before the draw; None if no row is constrained
        masks.accept(slots, drawn)            # after it

    For the runner's thread. A step that raises between `compute` and `accept` changes nothing.

    Attributes:
        num_words: of 32 tokens each, in a row of a mask.
    """

    def __init__(self, vocab_size: int) -> None:
        self.num_words = -(-vocab_size // 32)
        self._slots: dict[int, _Slot] = {}

    def start(self, start: SlotStart) -> None:
        """Give a slot the grammar of its new sequence, or none."""
        if start.grammar is None:
            self._slots.pop(start.slot, None)
        else:
            self._slots[start.slot] = _Slot(start, self.num_words * 32)

    def compute(self, slots: Sequence[int], drafts: Sequence[list[int]] = ()) -> npt.NDArray[np.int32] | None:
        """Compute masks [n_draws, n_words] for slots that will draw; None if none has a grammar.

        A slot draws once, and once more behind each of its `drafts`, which are cut short in place where its
        grammar allows no more of them, or ends.
        """
        if not self._bound(slots):
            return None
        if not any(drafts):
            masks = np.empty((len(slots), self.num_words), np.int32)
            self.fill(slots, masks)
            return masks
        masks = np.full((len(slots) + sum(map(len, drafts)), self.num_words), _ALL, np.int32)
        row = 0
        plain: list[tuple[int, _Slot]] = []
        for slot, following in zip(slots, drafts, strict=True):
            one = self._slots.get(slot)
            if one is not None and not one.matcher.is_ended:
                if following:
                    del following[one.fill_along(following, masks[row:]) :]
                else:
                    plain.append((row, one))
            row += 1 + len(following)
        Matcher.fill_masks([one.matcher for _, one in plain], [at for at, _ in plain], masks)
        for at, one in plain:
            one.correct(masks[at])
        return masks[:row]

    def certain(self, slot: int) -> Sequence[int]:
        """Return the tokens that must come next in a slot, where its grammar knows them."""
        one = self._slots.get(slot)
        return () if one is None or one.matcher.is_ended else one.matcher.forced_ids()

    def fill(self, slots: Sequence[int], masks: Mask) -> None:
        """Write the masks of slots that will draw to masks [n_slots, n_words]: all ones without a grammar."""
        masks[...] = _ALL
        bound = self._bound(slots)
        Matcher.fill_masks([one.matcher for _, one in bound], [row for row, _ in bound], masks)
        for row, one in bound:
            one.correct(masks[row])

    def accept(self, slots: Iterable[int], drawn: Iterable[Sampled]) -> None:
        """Move matchers on by the tokens drawn, and mark those that end or fail their sequences."""
        if not self._slots:
            return
        for slot, sampled in zip(slots, drawn, strict=True):
            constrained = self._slots.get(slot)
            if constrained is not None:
                constrained.accept(sampled)

    def _bound(self, slots: Sequence[int]) -> list[tuple[int, _Slot]]:
        """Return those that have a grammar, with their rows; one that has ended may draw anything."""
        if not self._slots:
            return []
        return [
            (row, constrained)
            for row, slot in enumerate(slots)
            if (constrained := self._slots.get(slot)) is not None and not constrained.matcher.is_ended
        ]


class _Slot:
    """One constrained sequence."""

    __slots__ = ("_early", "_num_early", "matcher")

    def __init__(self, start: SlotStart, num_bits: int) -> None:
        assert start.grammar is not None
        self.matcher: Matcher = start.grammar.matcher(start.output_ids)
        self._num_early = start.min_tokens - len(start.output_ids)  # draws to come that should not end it
        self._early = _bits(start.masked_ids, num_bits)  # what would end it

    def fill_along(self, drafts: Sequence[int], masks: Mask) -> int:
        """Write masks from row 0 on, one more than drafts; return how many of these can be drawn.

        The matcher stays where it is: a copy goes along the drafts, and stops before one that ends the text.
        """
        self.matcher.fill_mask(masks[0])
        self.correct(masks[0])
        if self.matcher.error is not None:
            return 0
        ahead = self.matcher.copy()
        for count, token_id in enumerate(drafts):
            if not masks[count].view(np.uint32)[token_id // 32] >> token_id % 32 & 1:
                return count
            ahead.accept(token_id)
            if ahead.is_ended:
                return count
            ahead.fill_mask(masks[count + 1])
            if ahead.error is not None:
                masks[count + 1] = _ALL
                return count
            self.correct(masks[count + 1], num_ahead=count + 1)
        return len(drafts)

    def correct(self, mask: Mask, num_ahead: int = 0) -> None:
        """Take out of the matcher's mask, behind so many drafts, what would end the text too early."""
        if self.matcher.error is not None:
            mask[:] = _ALL
        elif self._num_early > num_ahead:
            longer = mask & ~self._early
            if longer.any():  # else the text can only end here, whatever `min_tokens` wants
                mask[:] = longer

    def accept(self, sampled: Sampled) -> None:
        """Take the token drawn."""
        if sampled.is_finite and not self.matcher.is_ended:
            self.matcher.accept(sampled.token_id)
            self._num_early -= 1
        sampled.is_last = self.matcher.is_ended
        sampled.failure = self.matcher.error


def _bits(ids: Sequence[int], num_bits: int) -> npt.NDArray[np.int32]:
    flags = np.zeros(num_bits, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
