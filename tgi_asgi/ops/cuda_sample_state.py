"""Sampling parameters and history of every slot on a CUDA device, and sampling from them.

The host starts a slot; afterwards only the device advances it, so that a step's sampling needs nothing from
the previous step that is not already on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.ops.arrays import Ints
from tgi_asgi.ops.logprobs import TokenLogprobs
from tgi_asgi.ops.sample_state import SLOT, SampleState, has_penalties
from tgi_asgi.types import SamplingParams

_kernels: Any = torch.ops.tgi_cuda
MAX_IDS = 2048  # biased or masked ids per slot; fixed, because graphs hold the lists' addresses


@dataclass(frozen=True, slots=True)
class DeviceSamples:
    """The fields of a `SampleResult` as tensors on the device."""

    token_ids: Tensor
    is_finite: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    num_top: Tensor


class CudaSampleState:
    """A `SampleState` whose arrays are on the device.

        state = CudaSampleState(num_slots=128, vocab_size=49152, device=torch.device("cuda"))
        state.start(3, SamplingParams(temperature=0.7, seed=1), choice=0, prompt_ids=[1, 2, 3])
        state.sample(logits, slots, None, None, result)

    All arrays keep their addresses, so that sampling can be part of a CUDA graph.

    Rows after drafts are sampled in spare slots, the last `num_spares`: see `prepare_drafts`.

    Args:
        max_rows: Maximum number of rows that are sampled at once; None: one for each slot.

    Attributes:
        records: [num_slots + num_spares, bytes of a `SampleSlot` (csrc/params.h)] uint8 on the device.
        drafts: [3, num_spares] int32 on the device, of each spare slot: the slot that it continues (-1 if it
            is not used), its number among the drafts of that slot, from 1, and its draft. A slot's are
            adjacent and in order.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, device: torch.device, *,
        num_spares: int = 0, max_rows: int | None = None,
    ) -> None:  # fmt: skip
        self._host = SampleState(num_slots, vocab_size)
        num_all, rows = num_slots + num_spares, num_slots if max_rows is None else max_rows
        self.records = torch.zeros(num_all, SLOT.itemsize, dtype=torch.uint8, device=device)
        self._counts = torch.zeros(num_all, vocab_size, dtype=torch.int32, device=device)
        self._biased_ids, self._biased_values, self._masked_ids = (
            torch.zeros(num_all, MAX_IDS, dtype=part.dtype, device=device) for part in self._host_lists()
        )
        self._scratch = torch.empty(rows, vocab_size, device=device)
        self._workspace = torch.empty(_kernels.sample_workspace_bytes(rows), dtype=torch.uint8, device=device)
        self.drafts = torch.full((3, num_spares), -1, dtype=torch.int32, device=device)

    def start(self, slot: int, sampling: SamplingParams, **history: Any) -> None:
        """Assign the slot to a sequence; see `SampleState.start`.

        Raises:
            ValueError: if the slot, a token id or a parameter is out of range, or more than `MAX_IDS` are
                biased or masked.
        """
        num_biased, num_masked = len(sampling.logit_bias), len(history.get("masked_ids", ()))
        if max(num_biased, num_masked) > MAX_IDS:
            raise ValueError(f"at most {MAX_IDS} tokens may be biased, and as many masked")
        self._host.start(slot, sampling, **history)
        self._host.arrays.check_record(slot)  # on the device, nothing checks it
        _put(self.records[slot], torch.from_numpy(self._host.record_bytes[slot]))
        if has_penalties(sampling):
            self._put_counts(slot)
        there = (self._biased_ids, self._biased_values, self._masked_ids)
        counts = (num_biased, num_biased, num_masked)
        for target, source, count in zip(there, self._host_lists(), counts, strict=True):
            if count > 0:
                _put(target[slot, :count], source[slot, :count])

    def _put_counts(self, slot: int) -> None:
        """Upload a slot's counts, only those of tokens that occur; the device sets the others to 0."""
        row = self._host.counts[slot]
        ids = np.flatnonzero(row)
        up = torch.from_numpy(np.stack([ids, row[ids]])).to(self._counts.device, non_blocking=True)
        self._counts[slot].zero_().scatter_(0, up[0], up[1].int())

    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        mask: Tensor | None,
        mask_rows: Tensor | None,
        result: DeviceSamples,
    ) -> None:
        """Sample a token for each row of logits into `result`, entirely on the device; see `sample`.

        A row whose slot is -1 is padding. `mask` [n_masks, n_words] has rows for only some of the logits;
        `mask_rows` [n_rows] int32 is each row's index in it, or -1 for none.
        """
        _kernels.sample(
            logits, slots, self.records, self._counts, self._biased_ids, self._biased_values,
            self._masked_ids, mask, mask_rows, self._scratch, self._workspace, result.token_ids,
            result.is_finite, result.logprobs, result.top_ids, result.top_logprobs, result.num_top,
        )  # fmt: skip

    def prepare_drafts(self) -> None:
        """Make the spare slots that `drafts` uses copies of their slots, as if the drafts had been sampled.

        `sample` then samples in them as it does in any slot. Capturable.
        """
        _kernels.draft_slots(
            self.records, self._counts, self._biased_ids, self._biased_values, self._masked_ids, *self.drafts
        )

    def accept_drafts(self) -> None:
        """Move slots on by what their spare slots have sampled, as far as the drafts before are right.

        A slot itself has sampled one token. Nothing is left of tokens after a wrong draft. Capturable.
        """
        _kernels.accept_drafts(self.records, self._counts, *self.drafts)

    def _host_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(map(torch.from_numpy, self._host.lists))  # type: ignore[return-value]


def token_logprobs(logits: Tensor, token_ids: Ints, num_top: int) -> TokenLogprobs:
    """Score logits [n, vocab] on the device, as `logprobs.token_logprobs` does; the results are on the host.

    Raises:
        ValueError: if a token id is out of range, or `num_top` is more than the vocabulary.
    """
    (rows, vocab), device = logits.shape, logits.device
    if not 0 <= num_top <= vocab or ((token_ids < 0) | (token_ids >= vocab)).any():
        raise ValueError(f"token ids must be in [0, {vocab}), and `num_top` no more than {vocab}")
    logprobs, top_logprobs = torch.empty(rows, device=device), torch.empty(rows, num_top, device=device)
    top_ids = torch.empty(rows, num_top, dtype=torch.int32, device=device)
    _kernels.token_logprobs(logits, torch.from_numpy(token_ids).to(device), logprobs, top_ids, top_logprobs)
    return TokenLogprobs(*(found.cpu().numpy() for found in (logprobs, top_ids, top_logprobs)))


def _put(target: Tensor, source: Tensor) -> None:
    """Copy from pageable memory. CUDA stages a copy of it, so the host may overwrite it at once."""
    target.copy_(source, non_blocking=True)
