"""Constrains slots to their grammars: computes a step's masks and advances matchers by the sampled tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tgi_asgi.runner.plan import Sampled, SlotStart
from tgi_asgi.text.constrain.grammar import Mask, Matcher

_ALL = -1  # all bits of a word set


class SlotMasks:
    """The matchers of all slots whose sequences have a grammar.

        masks.start(start)                    # for each slot start of a step
        mask = masks.compute(slots, drafts)   # before sampling; None if no row is constrained
        masks.accept(slots, samples)          # after sampling

    For use on the runner's thread. A step that raises between `compute` and `accept` changes nothing.

    Attributes:
        num_words: Number of words in a mask row; each covers 32 tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        self.num_words = -(-vocab_size // 32)
        self._slots: dict[int, _Slot] = {}

    def start(self, start: SlotStart) -> None:
        """Set the slot's grammar to that of its new sequence, or to none."""
        if start.grammar is None:
            self._slots.pop(start.slot, None)
        else:
            self._slots[start.slot] = _Slot(start, self.num_words * 32)

    def compute(self, slots: Sequence[int], drafts: Sequence[list[int]] = ()) -> npt.NDArray[np.int32] | None:
        """Compute masks [n_samples, n_words] for slots that will sample; return None if none has a grammar.

        A slot samples once, plus once after each of its `drafts`. Drafts are truncated in place at the first
        token that the grammar forbids, or at the grammar's end.
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
        """Return the tokens that the slot's grammar forces next; empty if it forces none."""
        one = self._slots.get(slot)
        return () if one is None or one.matcher.is_ended else one.matcher.forced_ids()

    def fill(self, slots: Sequence[int], masks: Mask) -> None:
        """Write the masks of the sampling slots to masks [n_slots, n_words]; all ones without a grammar."""
        masks[...] = _ALL
        bound = self._bound(slots)
        Matcher.fill_masks([one.matcher for _, one in bound], [row for row, _ in bound], masks)
        for row, one in bound:
            one.correct(masks[row])

    def accept(self, slots: Iterable[int], samples: Iterable[Sampled]) -> None:
        """Advance matchers by the sampled tokens, and mark samples that end or fail their sequences."""
        if not self._slots:
            return
        for slot, sampled in zip(slots, samples, strict=True):
            constrained = self._slots.get(slot)
            if constrained is not None:
                constrained.accept(sampled)

    def _bound(self, slots: Sequence[int]) -> list[tuple[int, _Slot]]:
        """Return (row, slot) pairs for grammars that have not ended; after its end any token is allowed."""
        return [
            (row, constrained)
            for row, slot in enumerate(slots)
            if (constrained := self._slots.get(slot)) is not None and not constrained.matcher.is_ended
        ]


class _Slot:
    """One constrained sequence."""

    __slots__ = ("_end_bits", "_num_before_end", "matcher")

    def __init__(self, start: SlotStart, num_bits: int) -> None:
        assert start.grammar is not None
        # With `min_tokens`, masks applied to free text, too (`Sequence.watch`).
        has_free_text = not start.min_tokens
        self.matcher: Matcher = start.grammar.matcher(start.output_ids, skips_free_text=has_free_text)
        # Samples before the first that may end the text, and the tokens that would end it.
        self._num_before_end = start.min_tokens - len(start.output_ids)
        self._end_bits = _bits(start.masked_ids, num_bits)

    def fill_along(self, drafts: Sequence[int], masks: Mask) -> int:
        """Write one mask per draft plus one, from row 0 on; return how many drafts the grammar allows.

        The matcher itself does not advance: a copy follows the drafts and stops before one that ends the
        text.
        """
        self.matcher.fill_mask(masks[0])
        self.correct(masks[0])
        ahead = self.matcher.copy()
        for count, token_id in enumerate(drafts):
            # To the matcher a forbidden token is an error, which takes 0.6 ms.
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
        """Clear bits of tokens that would end the text too early, if `num_ahead` drafts precede them."""
        if self.matcher.error is not None:
            mask[:] = _ALL
        elif self._num_before_end > num_ahead:
            longer = mask & ~self._end_bits
            if longer.any():  # else the text can only end here, despite `min_tokens`
                mask[:] = longer

    def accept(self, sampled: Sampled) -> None:
        """Advance the matcher by the sampled token."""
        if sampled.is_finite and not self.matcher.is_ended:
            self.matcher.accept(sampled.token_id)
            self._num_before_end -= 1
        sampled.is_last = self.matcher.is_ended
        sampled.failure = self.matcher.error


def _bits(ids: Sequence[int], num_bits: int) -> npt.NDArray[np.int32]:
    flags = np.zeros(num_bits, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
