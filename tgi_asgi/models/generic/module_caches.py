"""The caches in which modules of `transformers` keep what they have computed of a sequence.

Nothing is known of them but that they are made of tensors, lists, dicts and objects: here these are copied,
joined to batches and measured. `states.py` decides which caches there are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.discover import run_with_cache
from tgi_asgi.models.generic.zeros import NotProbed

FLOAT_BYTES = 4
# Tensors that each update replaces, and never writes into: one for each token.
_REPLACED = frozenset({"keys", "values", "indexer_keys", "indexer_position_ids"})
_CONTAINERS = (Tensor, list, tuple, dict)  # may change in place; others, such as configurations, are shared


def copy_cache(cache: Any) -> Any:
    """Return a copy of a cache that may change in place without affecting it; keys and values are shared."""
    return _changed([cache], lambda tensors: tensors[0].clone())


def fork(cache: Any) -> Any:
    """Return a copy of a cache whose layers are the same objects until `copy_layer` has copied them."""
    made = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list | dict):
            setattr(made, name, copy.copy(value))
    return made


def copy_layer(cache: Any, forked: Any, layer: int) -> None:
    """Copy what a cache has of one layer to its fork: the entry `layer` of each of its lists and dicts."""
    _put_layer(cache, forked, layer, copy_cache)


def join_layer(caches: Sequence[Any], joined: Any, layer: int) -> None:
    """Put one layer's states of several sequences into `joined`, a fork of the first, as one batch."""
    rest = caches[1:]

    def join(name: str, value: Any) -> Any:
        return _batch([value, *(vars(cache)[name][layer] for cache in rest)])

    for name, value in vars(caches[0]).items():
        if _has_layer(value, layer):
            getattr(joined, name)[layer] = join(name, value[layer])


def part_layer(joined: Any, caches: Sequence[Any], layer: int) -> None:
    """Put the sequences' parts of a layer of `joined` into their own caches, as copies."""
    for index, cache in enumerate(caches):
        _put_layer(joined, cache, layer, partial(_copied_row, index=index))


def _put_layer(cache: Any, other: Any, layer: int, change: Callable[[Any], Any]) -> None:
    for name, value in vars(cache).items():
        mine = getattr(other, name, None)
        if _has_layer(value, layer) and isinstance(mine, list | dict):
            if isinstance(mine, list):
                mine.extend(value[len(mine) :])
            mine[layer] = change(value[layer])
        elif not isinstance(value, _CONTAINERS):
            setattr(other, name, value)  # such as whether there is a state


def _has_layer(value: Any, layer: int) -> bool:
    return layer < len(value) if isinstance(value, list) else isinstance(value, dict) and layer in value


def _batch(values: Sequence[Any]) -> Any:
    """Return the states of several sequences as one batch; values other than tensors are the same in all."""
    return _changed(values, torch.cat)


def _copied_row(value: Any, index: int) -> Any:
    """Return one sequence's part of joined states; a copy, so that it does not hold the others' memory."""
    return _changed([value], lambda tensors: tensors[0][index : index + 1].clone())


def _changed(values: Sequence[Any], change: Callable[[list[Tensor]], Tensor]) -> Any:
    """Return a copy of the first value with all tensors changed; `change` gets those of all values."""
    first = values[0]
    if isinstance(first, Tensor):
        return change(list(values))
    if isinstance(first, dict):
        made = copy.copy(first)
        made.update((name, _changed([value[name] for value in values], change)) for name in first)
        return made
    if isinstance(first, list | tuple):
        return type(first)([_changed(each, change) for each in zip(*values, strict=True)])
    if not hasattr(first, "__dict__") or isinstance(first, type):
        return copy.deepcopy(first)
    made = copy.copy(first)
    for name, value in vars(first).items():
        if name not in _REPLACED and isinstance(value, _CONTAINERS):
            setattr(made, name, _changed([vars(each)[name] for each in values], change))
    return made


def state_bytes(model: Any, cache_name: str | None) -> int:
    """Return the bytes of a sequence's state, without its keys and values; needs no weights.

    Raises:
        ModelLoadError: if the size cannot be determined.
    """
    if cache_name is None:
        return 0
    try:
        cache = run_with_cache(model, cache_name, lambda: empty_cache(model))
    except NotProbed as error:
        raise ModelLoadError(f"the size of a sequence's states cannot be determined: {error}") from None
    return FLOAT_BYTES * sum(tensor.numel() for tensor in tensors_of(cache))


def tensors_of(cache: Any, *, with_tokens: bool = False) -> Iterator[Tensor]:
    """Yield the tensors of a cache: its states, and with `with_tokens` also what it keeps of each token."""
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, list | tuple | dict):
        for value in cache.values() if isinstance(cache, dict) else cache:
            yield from tensors_of(value, with_tokens=with_tokens)
    elif hasattr(cache, "__dict__") and not isinstance(cache, type):
        for name, value in vars(cache).items():
            if isinstance(value, _CONTAINERS) and (with_tokens or name not in _REPLACED):
                yield from tensors_of(value, with_tokens=with_tokens)


def empty_cache(model: Any) -> Any:
    """Return an empty cache for one sequence, of the model's own class if it has one (MiniMax)."""
    from transformers import DynamicCache

    written_in = sys.modules[type(model).__module__]
    for value in vars(written_in).values():
        if (
            isinstance(value, type)
            and issubclass(value, DynamicCache)
            and value.__module__ == written_in.__name__
        ):
            return value()
    return DynamicCache(config=model.config.get_text_config(decoder=True))
