"""The tokens of one step on a CUDA device, as launches read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi.ops.cuda_list import Input, Size

SIZES = (
    Size.TOKENS, Size.DECODES, Size.PROMPTS, Size.KNOWN_PROMPTS, Size.UNKNOWN_PROMPTS, Size.MAX_QUERY_LEN,
    Size.ADAPTED, Size.IMAGE_ROWS,
)  # fmt: skip
INPUTS = (
    Input.IDS, Input.POSITIONS, Input.SLOTS, Input.QUERY_START, Input.CONTEXT_LEN, Input.BLOCK_TABLE,
    Input.PROMPT_LENS, Input.ADAPTERS, Input.IMAGE_TOKENS, Input.IMAGE_ROWS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CudaImageRows:
    """Rows of images on the device, for the operator `image_rows`."""

    tokens: Tensor  # [n] int64, the step's tokens that have rows
    rows: Tensor  # [levels, n, hidden] float32


@dataclass(frozen=True, slots=True)
class CudaBatch:
    """The tokens of one step on the device, sequence by sequence: sequences of one token come first.

    A padding sequence has context length 0, and its token has slot -1.
    """

    ids: Tensor  # [n_tokens] int32
    positions: Tensor  # [n_tokens] int32
    slots: Tensor  # [n_tokens] int64
    query_start: Tensor  # [n_sequences + 1] int32
    context_len: Tensor  # [n_sequences] int32
    block_table: Tensor  # [n_sequences, max_blocks] int32
    num_decodes: int  # sequences of one token, which come first
    max_query_len: int  # of the other sequences
    # (tokens in this step, tokens in total) of each other sequence; outside graphs the host may know them.
    prompt_lens: Sequence[tuple[int, int]] = ()
    adapters: Tensor | None = None  # [n_tokens] int32: slot of each token's adapter, -1: none; None: no token
    images: CudaImageRows | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.context_len.shape[0])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that select launches, in the order of `SIZES`."""
        num_prompts = self.num_sequences - self.num_decodes
        num_known = len(self.prompt_lens)
        num_unknown = 0 if num_known else num_prompts
        num_adapted = 0 if self.adapters is None else self.num_tokens
        return (
            self.num_tokens, self.num_decodes, num_prompts, num_known, num_unknown, self.max_query_len,
            num_adapted, 0 if self.images is None else len(self.images.tokens),
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that launches read, in the order of `INPUTS`."""
        lens = torch.tensor(self.prompt_lens) if self.prompt_lens else torch.empty(0, 2, dtype=torch.int64)
        none, images = self.ids[:0], self.images
        return (
            self.ids, self.positions, self.slots, self.query_start, self.context_len, self.block_table, lens,
            none if self.adapters is None else self.adapters,
            *((none, none) if images is None else (images.tokens, images.rows)),
        )  # fmt: skip
