"""What the decoder of an encoder-decoder keeps of its sequences: of one alone, or of several in one cache.

    keys of one layer         [B, heads, M, dim]        M: the longest answer so far
    sequence 0, 3 tokens       y1  y2  y3
    sequence 1, 1 token         0   0  y1               shorter answers begin farther right,
    of the encoded prompts    [B, heads, N, dim]
    sequence 0, 2 tokens       p1  p2   0               shorter prompts end farther left

Nothing here changes a tensor in place: a cache that was copied stays as it was when the copy goes on, so that
a step can be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.models.generic.module_caches import copy_cache


@dataclass(slots=True)
class Answer:
    """What a sequence leaves for its next tokens.

    Attributes:
        prompt: Ids of the prompt's chunks, until all of them have come.
        encoded: The encoder's output, from then on.
        cache: Keys and values, if they are in a cache of their own.
        batch: Otherwise, those of several sequences.
        index: Which of these the sequence is.
    """

    prompt: list[Tensor] = field(default_factory=list)
    encoded: Any = None
    cache: Any = None
    batch: Batch | None = None
    index: int = 0

    def copy(self) -> Answer:
        """Return a copy that may go on without affecting this one."""
        return replace(self, prompt=list(self.prompt), cache=self.cache and _copy_pair(self.cache))

    def view(self) -> Any:
        """Return a cache of the sequence alone; it shares the memory of the batch, if it is in one."""
        return self.cache if self.batch is None else self.batch.part(self.index)

    def leave(self) -> None:
        """Give the sequence a cache of its own, so that it does not keep the others' memory alive."""
        if self.batch is not None:
            self.cache, self.batch = self.batch.part(self.index), None
            for part in (self.cache.self_attention_cache, self.cache.cross_attention_cache):
                for layer in part.layers:
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


@dataclass(slots=True)
class Batch:
    """The keys and values of several sequences.

    Attributes:
        cache: The cache, as in the picture above.
        num_prompt, num_answer: Tokens of each sequence in it.
    """

    cache: Any
    num_prompt: list[int]
    num_answer: list[int]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Batch:
        """Return a batch of these sequences, which may go on; it is a copy if they are one already."""
        known = answers[0].batch
        is_one = all(each.batch is known and each.index == index for index, each in enumerate(answers))
        if known is not None and is_one and len(known.num_answer) == len(answers):
            return Batch(_copy_pair(known.cache), known.num_prompt, known.num_answer)
        caches = [answer.view() for answer in answers]
        own = [cache.self_attention_cache for cache in caches]
        prompts = [cache.cross_attention_cache for cache in caches]
        num_answer = [int(each.get_seq_length()) for each in own]
        num_prompt = [int(each.get_seq_length()) for each in prompts]
        both = _pair(_joined(own, max(num_answer), at_end=True), _joined(prompts, max(num_prompt)))
        return cls(both, num_prompt, num_answer)

    def part(self, index: int) -> Any:
        """Return the keys and values of one sequence; they share the batch's memory."""
        prompt, answer = self.num_prompt[index], self.num_answer[index]
        own = _part(self.cache.self_attention_cache, index, answer, at_end=True)
        return _pair(own, _part(self.cache.cross_attention_cache, index, prompt))

    def masks(self) -> tuple[Tensor, Tensor]:
        """Return which tokens exist: of prompts [B, N], and of answers with one token more [B, M + 1]."""
        prompts, answers = torch.tensor(self.num_prompt)[:, None], torch.tensor(self.num_answer)[:, None]
        longest = max(self.num_answer)
        return (
            (torch.arange(max(self.num_prompt)) < prompts).long(),
            (torch.arange(longest + 1) >= longest - answers).long(),
        )


class RowPositions:
    """Gives each sequence of a batch its own positions, in a decoder that looks them up in a table.

        positions.begin([3, 1])      # tokens of each sequence in the cache
        ...                          # the table is called once for each sequence, as if that were alone
        positions.end()

    Args:
        table: The decoder's module for positions. Its arguments are the tokens or their shape, and their
            position or the number of tokens in the cache.
    """

    def __init__(self, table: nn.Module) -> None:
        self._forward: Callable[..., Tensor] = table.forward
        self._num_answer: list[int] | None = None
        table.forward = self._call

    @classmethod
    def in_place_of(cls, table: nn.Module) -> RowPositions:
        """Return the one that a table has, or give it one."""
        owner = getattr(table.forward, "__self__", None)
        return owner if isinstance(owner, cls) else cls(table)

    def begin(self, num_answer: list[int]) -> None:
        """Look up the positions of a batch from now on."""
        self._num_answer = num_answer

    def end(self) -> None:
        """Look up positions as before."""
        self._num_answer = None

    def _call(self, *args: Any, **kwargs: Any) -> Tensor:
        sizes = self._num_answer
        if sizes is None:
            return self._forward(*args, **kwargs)

        def of_row(value: Any, index: int) -> Any:
            """Return what an argument would be for one sequence: ids, their shape, the cache's length."""
            if isinstance(value, Tensor):
                is_position = value.numel() == 1 and int(value) == max(sizes)
                return value * 0 + sizes[index] if is_position else value[index : index + 1]
            if isinstance(value, tuple):
                return (1, *value[1:])
            return sizes[index] if type(value) is int else value

        rows = [
            self._forward(
                *(of_row(value, index) for value in args),
                **{name: of_row(value, index) for name, value in kwargs.items()},
            )
            for index in range(len(sizes))
        ]
        return torch.stack([row.reshape(1, row.shape[-1]) for row in rows])


def empty_pair(model: Any) -> Any:
    """Return an empty cache for one sequence."""
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    # A cache takes the number of its layers from the configuration, and T5's has that of the encoder there. A
    # cache without a configuration grows as layers come, but knows no windows; T5 has none.
    counts_encoder = hasattr(config, "num_decoder_layers")
    return _pair(DynamicCache() if counts_encoder else DynamicCache(config=config), DynamicCache())


def _pair(own: Any, prompt: Any) -> Any:
    from transformers import EncoderDecoderCache

    return EncoderDecoderCache(own, prompt)


def _copy_pair(cache: Any) -> Any:
    """Copy the answers' part; that of the encoded prompts does not change once it exists."""
    return _pair(copy_cache(cache.self_attention_cache), cache.cross_attention_cache)


def _joined(caches: Sequence[Any], size: int, *, at_end: bool = False) -> Any:
    """Return one cache of several sequences, padded at the end, or if `at_end` before the first token."""

    def padded(tensor: Tensor, longest: int) -> Tensor:
        missing = longest - tensor.shape[2]
        return nn.functional.pad(tensor, (0, 0, missing, 0) if at_end else (0, 0, 0, missing))

    made = copy_cache(caches[0])
    for index, layer in enumerate(made.layers):
        parts = [cache.layers[index] for cache in caches]
        longest = max(part.keys.shape[2] for part in parts)
        layer.keys = torch.cat([padded(part.keys, longest) for part in parts])
        layer.values = torch.cat([padded(part.values, longest) for part in parts])
        _set_size(layer, size)
    return made


def _part(cache: Any, index: int, size: int, *, at_end: bool = False) -> Any:
    """Return the cache of one sequence of several, which has `size` tokens."""
    made = copy_cache(cache)
    for layer in made.layers:
        kept = min(size, layer.keys.shape[2])  # a layer with a window has fewer
        at = slice(layer.keys.shape[2] - kept, None) if at_end else slice(kept)
        layer.keys, layer.values = (
            layer.keys[index : index + 1, :, at],
            layer.values[index : index + 1, :, at],
        )
        _set_size(layer, size)
    return made


def _set_size(layer: Any, size: int) -> None:
    """Tell a layer with a window how many tokens it has seen."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = size
