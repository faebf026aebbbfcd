"""Sampling parameters and history of every slot, in the arrays that the `sample` kernel reads.

The runner starts a slot when it assigns it to a sequence; each `sample` call advances it by one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tgi_asgi import _C
from tgi_asgi.types import LogprobsMode, SamplingParams

# csrc/params.h, SampleSlot: the kernel reads this memory directly; a test checks that the two are equal.
SLOT = np.dtype(
    [
        ("temperature", np.float32),  # 0: greedy
        ("top_k", np.int32),  # 0: off
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("typical_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("seed", np.uint64),
        ("position", np.int64),  # of the next token to be sampled; the counter of its random number
        ("masked_until", np.int64),  # the masked ids cannot be sampled at positions below this one
        ("choice", np.int32),
        ("last_id", np.int32),  # sampled last
        ("num_biased", np.int32),
        ("num_masked", np.int32),
        ("num_top", np.int32),
        ("flags", np.int32),
    ]
)
WANTS_LOGPROBS = 1
IS_PROCESSED = 2
_FIRST_CAPACITY = 32
BAN = -100.0  # a bias of this or less forbids the token, as OpenAI documents


class SampleState:
    """Sampling state of each slot: one record of parameters, token counts, biased and masked ids.

        state = SampleState(num_slots=128, vocab_size=49152)
        state.start(3, SamplingParams(temperature=0.7, seed=1), choice=0, prompt_ids=[1, 2, 3])
        result = sample(logits, state, [3])

    Not thread-safe: only the runner's thread starts slots and samples from them.

    Attributes:
        records: [num_slots] of `SLOT`; may be read at any time between calls of `sample`.
        last_ids: [num_slots] int32, the token that each slot sampled last: a view of the records.
        counts: [num_slots, vocab_size] int32: twice the count in the output, plus one if in the prompt.
            Maintained, and its memory committed, only for slots with penalties.
        arrays: All of the state, in the form that the extension samples from.
    """

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.records = np.zeros(num_slots, dtype=SLOT)
        # A step may sample from a slot that the step before failed to start. With a penalty, it would count a
        # token that `start` does not know of.
        self.records["repetition_penalty"] = 1.0
        self.last_ids = self.records["last_id"]
        self.counts: npt.NDArray[np.int32] = np.zeros((num_slots, vocab_size), dtype=np.int32)
        self._is_counted = np.zeros(num_slots, dtype=bool)
        self._biased = _Lists(num_slots)
        self._masked = _Lists(num_slots)
        self.record_bytes = self.records.view(np.uint8).reshape(num_slots, SLOT.itemsize)
        self.arrays = _C.SampleArrays(self.record_bytes, self.counts)
        self._share_lists()

    def start(
        self,
        slot: int,
        sampling: SamplingParams,
        *,
        choice: int,
        prompt_ids: Sequence[int],
        begun: Sequence[int] | None = None,
        output_ids: Sequence[int] = (),
        min_tokens: int = 0,
        masked_ids: Sequence[int] = (),
    ) -> None:
        """Assign the slot to a sequence, whose `output_ids` are empty unless it is resumed.

        The next token sampled is that of position `len(prompt_ids) + len(output_ids)`. Until the output has
        `min_tokens`, `masked_ids` cannot be sampled. Penalties count the tokens of `begun`, if given, instead
        of the prompt's.

        Raises:
            ValueError: if the slot is out of range, or a token id that is read.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"`slot` must be in [0, {self.num_slots}), got {slot}")
        biased_ids = [token for token, _ in sampling.logit_bias]
        # What is not read is not checked: of a long prompt, for each choice, that would take 6 ms.
        read_ids = prompt_ids if has_penalties(sampling) else prompt_ids[-1:]
        for ids in (biased_ids, masked_ids, read_ids, output_ids):
            if len(ids) and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                raise ValueError(f"token ids must be in [0, {self.vocab_size})")
        record = self.records[slot]
        for name in (
            "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
            "presence_penalty",
        ):  # fmt: skip
            record[name] = getattr(sampling, name)
        record["top_k"] = min(sampling.top_k, self.vocab_size)
        record["seed"] = sampling.seed
        record["choice"] = choice
        record["position"] = len(prompt_ids) + len(output_ids)
        record["last_id"] = (output_ids or prompt_ids or (0,))[-1]
        record["masked_until"] = len(prompt_ids) + min_tokens
        record["num_masked"] = self._masked.set(slot, masked_ids, [-math.inf] * len(masked_ids))
        values = [-math.inf if bias <= BAN else bias for _, bias in sampling.logit_bias]
        record["num_biased"] = self._biased.set(slot, biased_ids, values)
        self._share_lists()
        record["num_top"] = min(sampling.logprobs or 0, self.vocab_size)
        record["flags"] = _flags(sampling)
        self._count(slot, sampling, prompt_ids if begun is None else begun, output_ids)

    @property
    def lists(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Biased ids [num_slots, capacity], their biases, and masked ids; valid until the next `start`."""
        return self._biased.ids, self._biased.values, self._masked.ids

    def _share_lists(self) -> None:
        """Pass the lists' addresses to the extension; the arrays are replaced when they grow."""
        self.arrays.set_lists(*self.lists)

    def _count(
        self, slot: int, sampling: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None:
        """Count the sequence's tokens, if a penalty will read the counts."""
        row = self.counts[slot]
        if self._is_counted[slot]:
            row[:] = 0
        self._is_counted[slot] = has_penalties(sampling)
        if self._is_counted[slot]:
            row[np.asarray(prompt_ids, dtype=np.int64)] = 1
            np.add.at(row, np.asarray(output_ids, dtype=np.int64), 2)


def has_penalties(sampling: SamplingParams) -> bool:
    """Return whether these parameters depend on the tokens so far."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _flags(sampling: SamplingParams) -> int:
    wants = WANTS_LOGPROBS if sampling.logprobs is not None else 0
    return wants | (IS_PROCESSED if sampling.logprobs_mode is LogprobsMode.PROCESSED else 0)


class _Lists:
    """A short list of (id, value) per slot, in two rectangular arrays that grow to the longest list seen."""

    def __init__(self, num_slots: int) -> None:
        self.ids = np.zeros((num_slots, _FIRST_CAPACITY), np.int32)
        self.values = np.zeros((num_slots, _FIRST_CAPACITY), np.float32)

    def set(self, slot: int, ids: Sequence[int], values: Sequence[float]) -> int:
        """Store a slot's list and return its length."""
        capacity = int(self.ids.shape[1])
        if len(ids) > capacity:
            extra = max(len(ids), 2 * capacity) - capacity
            self.ids = np.pad(self.ids, ((0, 0), (0, extra)))
            self.values = np.pad(self.values, ((0, 0), (0, extra)))
        self.ids[slot, : len(ids)] = ids
        self.values[slot, : len(ids)] = values
        return len(ids)
