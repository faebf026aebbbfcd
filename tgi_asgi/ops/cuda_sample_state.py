"""Sampling parameters and history of every slot on a CUDA device, and the draw from them.

A slot is started from the host; afterwards the device alone moves it on, so that a step's draw needs nothing
of the step before but what is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.ops.sample import SampleResult
from tgi_asgi.ops.sample_state import SLOT, SampleState, has_penalties
from tgi_asgi.types import SamplingParams

_kernels: Any = torch.ops.tgi_cuda


class CudaSampleState:
    """A `SampleState` whose arrays are the device's.

        state = CudaSampleState(num_slots=128, vocab_size=49152, device=torch.device("cuda"))
        state.start(3, SamplingParams(temperature=0.7, seed=1), choice=0, prompt_ids=[1, 2, 3])
        state.draw(logits, slots, None, result)

    Attributes:
        last_ids: [num_slots] int32 on the device, the token that each slot drew last.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._host = SampleState(num_slots, vocab_size)
        self._records = torch.zeros(num_slots, SLOT.itemsize, dtype=torch.uint8, device=device)
        self._counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self._lists: list[Tensor] = [part.to(device) for part in (*self._host.biased, self._host.masked)]
        self._scratch = torch.empty(num_slots, vocab_size, device=device)
        host_address = self._host.records.__array_interface__["data"][0]
        offset = self._host.last_ids.__array_interface__["data"][0] - host_address
        self.last_ids = self._records.view(torch.int32)[:, offset // 4]

    def start(self, slot: int, sampling: SamplingParams, **history: Any) -> None:
        """Give the slot to a sequence, as `SampleState.start` does.

        Raises:
            ValueError: the slot or a token id is out of range.
        """
        self._host.start(slot, sampling, **history)
        self._records[slot] = self._host.record_bytes[slot].to(self._records.device)
        if has_penalties(sampling):
            self._counts[slot] = self._host.counts_tensor[slot].to(self._counts.device)
        for index, part in enumerate((*self._host.biased, self._host.masked)):
            if part.shape != self._lists[index].shape:  # a longer list than any before
                self._lists[index] = part.to(self._lists[index].device)
            else:
                self._lists[index][slot] = part[slot].to(self._lists[index].device)

    def max_top(self, slots: Sequence[int]) -> int:
        """Return the largest number of top log-probabilities that one of these slots wants."""
        return int(self._host.records["num_top"][list(slots)].max(initial=0))

    def draw(self, logits: Tensor, slots: Tensor, mask: Tensor | None, result: SampleResult) -> None:
        """Draw a token for each row of logits into `result`, all on the device; as the operator `sample`.

        A row whose slot is -1 is padding.
        """
        biased_ids, biased_values, masked_ids = self._lists
        _kernels.sample(
            logits, slots, self._records, self._counts, biased_ids, biased_values, masked_ids, mask,
            self._scratch, result.token_ids, result.is_finite, result.logprobs, result.top_ids,
            result.top_logprobs, result.num_top,
        )  # fmt: skip
