"""Attention of `transformers` over whole prompts in one batch: finding the layers, and computing them.

There is no cache. A layer writes its keys and values to a scratch pool for one step, which all layers share,
and reads them with the decoders' kernel. This is the counterpart of `attention.py` and `discover.py` for
encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import CacheShape
from tgi_asgi.models.generic.attention import by_token, spec_of
from tgi_asgi.models.generic.backend import Backend
from tgi_asgi.models.generic.discover import (
    IGNORED,
    require_positions,
    run_probe,
    scale_of,
)
from tgi_asgi.models.generic.reach import Reach, reach_of
from tgi_asgi.models.generic.rules import LONGEST

# The number that encodes the first reach: exact in float32, and no value with which a model's code fills
# masks.
_FIRST = 1 << 22
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class WholeLayer:
    """One call of attention in a step: the shape of its heads, and what its tokens see."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    reach: Reach

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of its keys and values."""
        return self.num_kv_heads, self.head_dim, self.value_dim


def discover_whole(model: Any, max_positions: int) -> list[WholeLayer]:
    """Run a module without weights; return its attention layers in the order of calls.

    Raises:
        ModelLoadError: if the kernels do not support a layer, or positions do not reach it.
    """
    probe = _Probe(min(max_positions, LONGEST))
    run_probe(model, probe)
    name = type(model).__name__
    if probe.problems:
        raise ModelLoadError(f"{name}: {probe.problems[0]}")
    if not probe.layers:
        raise ModelLoadError(f"{name} writes its attention inline")
    require_positions(model)
    return probe.layers


class _Probe:
    """Records the calls of attention and the rules in their masks."""

    def __init__(self, length: int) -> None:
        self.layers: list[WholeLayer] = []
        self.problems: list[str] = []
        self._length = length
        self._reaches: list[Reach | None] = []

    def mask(self, *, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> Tensor:
        """Return a mask filled with the number of its reach."""
        self._reaches.append(reach_of(mask_function, self._length))
        return torch.full((1, 1, q_length, kv_length), float(_FIRST + len(self._reaches) - 1))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Record a call; return a tensor with a result's shape."""
        unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in IGNORED)
        if unknown:
            self.problems.append(f"attention takes {', '.join(unknown)}, which the kernels do not support")
        if key.shape[2] != query.shape[2]:
            self.problems.append("a layer attends to something other than the prompt")
        reach: Reach | None = Reach()
        if isinstance(attention_mask, Tensor):
            number = attention_mask.reshape(-1)[0].item() - _FIRST  # infinite for a mask of the model's own
            reach = self._reaches[int(number)] if 0 <= number < len(self._reaches) else None
        elif kwargs.get("is_causal", getattr(module, "is_causal", True)):
            reach = Reach(after=0)
        if reach is None:
            self.problems.append("a layer has a mask that is not a window, or that its own code makes")
        self.layers.append(
            WholeLayer(query.shape[1], key.shape[1], query.shape[3], value.shape[3], reach or Reach())
        )
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


class WholeLayers:
    """The attention layers of a model over the prompts of one step.

        layers = WholeLayers(found, backend, max_tokens=4096, max_rows=128, max_context=512)
        layers.begin([17, 200])                # prompts' lengths
        with running(layers):
            ...                                # the model calls each layer once
        layers.end()

    Args:
        layers: Layers in the order in which a step calls them.
        backend: The device that computes them.
        max_tokens, max_rows, max_context: Maximum tokens and prompts of a step, and length of a prompt.
    """

    def __init__(
        self, layers: Sequence[WholeLayer], backend: Backend, *, max_tokens: int, max_rows: int,
        max_context: int,
    ) -> None:  # fmt: skip
        self._layers = layers
        self._pools = {
            shape: backend.pool(
                [CacheShape(*shape)], num_blocks=max_tokens // _BLOCK + max_rows, block_size=_BLOCK,
                dtype="float32",
            )
            for shape in {layer.shape for layer in layers}
        }  # fmt: skip
        self._paged = {reach: backend.paged(max_context) for reach in {layer.reach for layer in layers}}
        self._specs: list[ops.AttentionSpec | None] = [None] * len(layers)
        self._next = 0

    def begin(self, lengths: Sequence[int]) -> None:
        """Begin a step of prompts with these lengths."""
        batch = _batch(lengths)
        ends = np.repeat(lengths, lengths)
        for reach, paged in self._paged.items():
            until = np.minimum(batch.positions + (1 + reach.ahead), ends).astype(np.int32)
            paged.begin(batch, torch.from_numpy(until))
        self._next = 0

    def end(self) -> None:
        """End a step.

        Raises:
            RuntimeError: if it made another number of calls than discovery found.
        """
        if self._next != len(self._layers):
            raise RuntimeError(f"a step called attention {self._next} times, not {len(self._layers)}")

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend within each prompt: [1, tokens, heads, value dims]."""
        index = self._next
        self._next += 1
        layer = self._layers[index]
        spec = self._specs[index]
        if spec is None:
            spec = spec_of(kwargs, scale=scale_of(query, kwargs), window=layer.reach.window)
            self._specs[index] = spec
        scratch, paged = self._pools[layer.shape].layers[0], self._paged[layer.reach]
        rows = paged.run(scratch, by_token(query), by_token(key), by_token(value), spec)
        return rows[None], None


def _batch(lengths: Sequence[int]) -> ops.FlatRows:
    """Lay out prompts one after the other, each starting at a new block."""
    sizes = np.asarray(lengths)
    blocks = -(-sizes // _BLOCK)
    first = np.cumsum(blocks) - blocks
    positions = np.concatenate([np.arange(length) for length in lengths])
    table = first[:, None] + np.minimum(np.arange(int(blocks.max())), blocks[:, None] - 1)
    return ops.FlatRows(
        ids=np.zeros(len(positions), np.int64),  # the module gets the ids
        positions=positions,
        slots=np.repeat(first * _BLOCK, sizes) + positions,
        query_start=np.cumsum([0, *lengths]),
        context_len=sizes,
        block_table=table.astype(np.int32),
        row_slots=np.arange(len(lengths)),
    )
