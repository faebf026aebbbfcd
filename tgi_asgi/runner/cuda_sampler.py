"""Samples a step's tokens on the device: uploads grammar masks, runs the kernels, fetches the results.

The kernels use fixed buffers for every step, so that the sampling of a padded step can be a graph. Masks are
uploaded between the graphs of the forward pass and of sampling, only for rows that have a grammar. Results
are then copied to the step's own pinned memory, which a graph cannot address.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops.cuda_sample_state import CudaSampleState
from tgi_asgi.ops.sample import SampleResult
from tgi_asgi.runner.cuda_buffers import StepBuffers, host_result, result_bytes, view_result
from tgi_asgi.runner.cuda_device import Command, Copy, Device
from tgi_asgi.runner.masks import SlotMasks
from tgi_asgi.runner.plan import Sampled, SlotStart
from tgi_asgi.runner.sampling import start_slot


@dataclass(frozen=True, slots=True)
class SampleStaging:
    """Pinned memory for one step in flight."""

    masks: Tensor  # [max_rows, n_words] int32
    results: Tensor  # [n_bytes] uint8
    array: npt.NDArray[np.uint8]  # the same memory
    drafts: Tensor  # [3, num_spares] int32


class FetchedSamples(NamedTuple):
    """The samples of a step on the way to the host.

    Attributes:
        copy: The copy to the host, which comes after the sampling.
    """

    copy: Copy
    num_rows: int
    max_top: int

    def collect(self) -> SampleResult:
        """Return the samples; valid once the device has made the copy, until the next but one step."""
        return host_result(self.copy.target.numpy(), self.num_rows, self.max_top)


class CudaSampler:
    """The sampling state, grammars and buffers of all slots.

        sampler.start(start)                             # for each slot start of a step
        masked = sampler.masked(slots)                   # goes up with the step's inputs
        sampler.start_grammar(start)                     # once the steps before are done
        copies = sampler.masks(slots, staging)           # before sampling
        sampler.sample(logits, buffers)                  # or its graph
        samples = sampler.samples(num_rows, staging, is_listing=sampler.lists(slots))
        samples.copy                                     # after sampling
        sampler.accept(slots, unpack(samples.collect())) # on the thread that waited for it

    Args:
        max_top: Maximum number of log-probabilities that a slot can request besides its token's.
        num_spares: Number of spare slots, for rows with drafts.
        max_rows: Maximum number of rows of a step; None: one for each slot.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, max_top: int, device: Device, *,
        num_spares: int = 0, max_rows: int | None = None,
    ) -> None:  # fmt: skip
        rows = num_slots if max_rows is None else max_rows
        self.state = CudaSampleState(
            num_slots, vocab_size, device.device, num_spares=num_spares, max_rows=rows
        )
        self._grammars = SlotMasks(vocab_size)
        self._constrained: set[int] = set()  # slots with a grammar
        self._listing: set[int] = set()  # slots that request top log-probabilities
        self._max_top = max_top
        self._device = device
        self._masks = torch.zeros(rows, self._grammars.num_words, dtype=torch.int32, device=device.device)
        self._results = torch.zeros(result_bytes(rows, max_top), dtype=torch.uint8, device=device.device)
        self._draft_graphs: tuple[Command, Command] | None = None

    def constrains(self, slots: Iterable[int]) -> bool:
        """Return whether one of these slots has a grammar, be it of a sequence that has ended."""
        return bool(self._constrained) and not self._constrained.isdisjoint(slots)

    def staging(self) -> SampleStaging:
        """Allocate pinned memory for one step in flight."""
        masks = self._device.pinned(self._masks.nbytes).view(torch.int32).view(self._masks.shape)
        drafts = self.state.drafts
        results = self._device.pinned(self._results.nbytes)
        return SampleStaging(
            masks,
            results,
            results.numpy(),
            self._device.pinned(drafts.nbytes).view(torch.int32).view(drafts.shape),
        )

    def capture_drafts(self) -> None:
        """Capture what steps with drafts do before and after the sampling."""
        state = self.state
        self._draft_graphs = (
            self._device.capture(state.prepare_drafts), self._device.capture(state.accept_drafts)
        )  # fmt: skip

    def drafted(
        self, spares: Sequence[Sequence[int]], staging: SampleStaging
    ) -> tuple[list[Command], list[Command]]:
        """Return what comes before and after the sampling of a step with drafts.

        Args:
            spares: As `CudaSampleState.drafts`.
        """
        assert self._draft_graphs is not None, "`capture_drafts` comes first"
        prepare, accept = self._draft_graphs
        staging.drafts.numpy()[...] = spares
        return [Copy(self.state.drafts, staging.drafts, staging.drafts.nbytes), prepare], [accept]

    def start(self, start: SlotStart) -> None:
        """Reset a slot for a new sequence.

        Raises:
            ValueError: if it requests more than `max_top` log-probabilities.
        """
        if (start.sampling.logprobs or 0) > self._max_top:
            raise ValueError(
                f"at most {self._max_top} top log-probabilities are kept, not {start.sampling.logprobs}"
            )
        start_slot(self.state, start)
        _put_in(self._constrained, start.slot, start.grammar is not None)
        _put_in(self._listing, start.slot, bool(start.sampling.logprobs))

    def start_grammar(self, start: SlotStart) -> None:
        """Set the slot's grammar, or none. All tokens sampled by earlier steps must have been accepted."""
        self._grammars.start(start)

    def masked(self, slots: Sequence[int]) -> list[int]:
        """Return those slots that have a grammar, in the order of their masks."""
        return [slot for slot in slots if slot in self._constrained] if self._constrained else []

    def masks(self, slots: Sequence[int], staging: SampleStaging) -> list[Copy]:
        """Compute the masks of those slots that have a grammar; return the copies of them to the device."""
        masked = self.masked(slots)
        if not masked:
            return []
        masks = staging.masks[: len(masked)]
        self._grammars.fill(masked, masks.numpy())
        return [Copy(self._masks, masks, masks.nbytes)]

    def masks_along(
        self, drafts: Mapping[int, list[int]], staging: SampleStaging
    ) -> tuple[set[int], list[Copy]]:
        """Compute masks for slots and for the positions after their drafts.

        Drafts are truncated in place, as in `SlotMasks.compute`. Returns the slots that have masks, as many
        as drafts and one more, in the order of `drafts`; and their copies to the device.
        """
        masked = self.masked(list(drafts))
        masks = self._grammars.compute(masked, [drafts[slot] for slot in masked])
        if masks is None:
            return set(), []
        staged = staging.masks[: len(masks)]
        staged.numpy()[...] = masks
        return set(masked), [Copy(self._masks, staged, staged.nbytes)]

    def certain(self, slot: int) -> Sequence[int]:
        """Return the tokens that the slot's grammar forces next, as `SlotMasks.certain`."""
        return self._grammars.certain(slot)

    def sample(self, logits: Tensor, buffers: StepBuffers) -> None:
        """Sample a token for each row of logits; capturable, as it uses fixed buffers and never waits."""
        num_rows = buffers.shape.num_rows
        results = view_result(self._results, num_rows, self._max_top)
        self.state.sample(logits[:num_rows], buffers.row_slots, self._masks, buffers.mask_rows, results)

    def lists(self, slots: Iterable[int]) -> bool:
        """Return whether one of these slots requests top log-probabilities."""
        return bool(self._listing) and not self._listing.isdisjoint(slots)

    def samples(self, num_rows: int, staging: SampleStaging, *, is_listing: bool) -> FetchedSamples:
        """Return the samples of a step; `is_listing`: with the top entries."""
        max_top = self._max_top if is_listing else 0
        copy = Copy(staging.results, self._results, result_bytes(num_rows, max_top))
        return FetchedSamples(copy, num_rows, max_top)

    def accept(self, slots: Iterable[int], sampled: Iterable[Sampled]) -> None:
        """Advance grammars by the sampled tokens, and mark samples that end or fail their sequences."""
        self._grammars.accept(slots, sampled)


def _put_in(slots: set[int], slot: int, is_in: bool) -> None:
    if is_in:
        slots.add(slot)
    else:
        slots.discard(slot)
