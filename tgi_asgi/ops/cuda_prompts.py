"""The launches of prompts' attention that other libraries compute instead of the native kernel.

They need the prompts' lengths on the host; steps without them, such as graphs, use the native kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.cuda_attention import (
    GatheredAttention,
    Gathering,
    PromptAttention,
    can_gather,
    choose_gathering,
    workspace_shapes,
)
from tgi_asgi.ops.cuda_flashinfer import FlashInfer, PlannedAttention, can_plan
from tgi_asgi.ops.cuda_kv import CudaKvLayer
from tgi_asgi.ops.cuda_list import Condition, Input, LaunchList, Size, prompts_of
from tgi_asgi.ops.cuda_scratch import Scratch
from tgi_asgi.ops.cuda_sdpa import Workspace

_kernels: Any = torch.ops.tgi_cuda
_WHEN = Condition(Size.KNOWN_PROMPTS, 1)


class PromptLibraries:
    """Adds launches to a program's list, layer by layer.

    Args:
        wanted: What computes the layers that it supports.
        max_blocks: Number of columns of the block tables.

    Attributes:
        gathering: Which prompts torch's attention computes; None: none of the layers added so far.
    """

    def __init__(
        self, wanted: PromptAttention, launches: LaunchList, scratch: Scratch, max_blocks: int
    ) -> None:
        self._wanted, self._launches, self._scratch = wanted, launches, scratch
        self._max_blocks = max_blocks
        self.gathering: Gathering | None = None
        self._has_chosen = False
        self._flashinfer: FlashInfer | None = None  # created by the first layer that uses it
        self._planned: dict[tuple[object, ...], PlannedAttention] = {}  # by what layers with one plan share

    def add(
        self, layer: CudaKvLayer, spec: AttentionSpec, query: Tensor, kind: tuple[Any, ...], out: Tensor
    ) -> bool:
        """Add a layer's launches for prompts of known lengths; return whether there are any.

        Args:
            query, out: [max_tokens, num_heads, head_dim].
            kind: The native kernel's arguments that describe the layer.
        """
        if self._wanted is PromptAttention.FLASHINFER and can_plan(spec, layer.head_dim):
            planned = self._planned_for(layer, spec, query)
            self._launches.add(
                functools.partial(planned.attend, layer), query, Size.DECODES, out, when=_WHEN
            )  # fmt: skip
            return True
        gathering = self._gathering_of(layer, spec, query)
        if gathering is None:
            return False
        gathered = self._gathered(gathering, layer, spec.scale, query, kind)
        self._launches.add(
            functools.partial(_attend_gathered, gathered), query, prompts_of(Input.BLOCK_TABLE),
            prompts_of(Input.QUERY_START), prompts_of(Input.CONTEXT_LEN), Size.DECODES, Input.PROMPT_LENS,
            out, when=_WHEN,
        )  # fmt: skip
        return True

    def _gathering_of(self, layer: CudaKvLayer, spec: AttentionSpec, query: Tensor) -> Gathering | None:
        """Return what computes the layer, chosen by the first: they differ in their specs, not in shapes."""
        if self._wanted not in (PromptAttention.AUTO, PromptAttention.SDPA) or not can_gather(spec):
            return None
        if not self._has_chosen:
            self._has_chosen = True
            is_wanted = self._wanted is PromptAttention.SDPA
            self.gathering = choose_gathering(query, layer.pool.shape[2], is_wanted=is_wanted)
        return self.gathering

    def _gathered(
        self, gathering: Gathering, layer: CudaKvLayer, scale: float, query: Tensor, kind: tuple[Any, ...]
    ) -> GatheredAttention:
        """Return a layer's attention by `gathering`; layers share its memory."""
        kv, queries = workspace_shapes(layer, self._max_blocks, query.shape)
        space = Workspace(self._scratch.buffer("gathered", kv), self._scratch.buffer("queries", queries))

        def attend(
            query: Tensor, starts: Tensor, lengths: Tensor, tables: Tensor, longest: int, out: Tensor
        ) -> None:
            _kernels.attention_prefill(query, layer.pool, starts, lengths, tables, longest, *kind, out)

        return GatheredAttention(gathering, layer, scale, space, attend)

    def _planned_for(self, layer: CudaKvLayer, spec: AttentionSpec, query: Tensor) -> PlannedAttention:
        """Return FlashInfer's plan for a layer; the first layer of its kind launches the planning."""
        self._flashinfer = self._flashinfer or FlashInfer(query.device)
        kind = (spec.scale, spec.window, spec.soft_cap, *layer.pool.shape[1:], *query.shape[1:])
        if kind not in self._planned:
            planned = self._planned[kind] = PlannedAttention(self._flashinfer, spec, layer.pool, query)
            self._launches.add(
                functools.partial(_plan_prompts, planned), prompts_of(Input.BLOCK_TABLE), Input.PROMPT_LENS,
                when=_WHEN,
            )  # fmt: skip
        return self._planned[kind]


def _attend_gathered(
    gathered: GatheredAttention, query: Tensor, block_table: Tensor, query_start: Tensor, context_len: Tensor,
    first: int, lengths: Tensor, out: Tensor,
) -> None:  # fmt: skip
    gathered.attend(query, block_table, query_start, context_len, first, lengths.tolist(), out)


def _plan_prompts(planned: PlannedAttention, block_table: Tensor, lengths: Tensor) -> None:
    planned.plan(block_table, lengths.tolist())
