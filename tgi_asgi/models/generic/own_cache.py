"""What a model that runs one sequence at a time keeps of each sequence, in the form that its code wants."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tgi_asgi.models.generic.caller import decoders_of
from tgi_asgi.models.generic.discover import PROBE_TOKENS, run_with_cache
from tgi_asgi.models.generic.module_caches import FLOAT_BYTES, copy_cache, empty_cache, tensors_of
from tgi_asgi.models.generic.source_code import class_source
from tgi_asgi.models.generic.states import KEPT
from tgi_asgi.models.generic.zeros import NotProbed

_LISTS = ("state", "mems")  # of tensors: RWKV's, XLNet's
CACHE_NAMES = ("cache", "past_key_values", "cache_params", *_LISTS)  # the first since transformers 5.24
# Models with a cache argument that nothing can be continued from: a sequence is computed anew in each step.
WITHOUT_CACHE = {
    "BltForCausalLM": "its patches of bytes may grow, and its cache does not know them",
    "XLMWithLMHeadModel": "its cache wants all tokens again",
}


class OwnCache(Protocol):
    """Makes, copies and uses what is kept of a sequence."""

    def make(self) -> Any:
        """Return what is kept of a sequence before its first token."""

    def copy(self, kept: Any) -> Any:
        """Return a copy that may change without affecting the original."""

    def inputs(self, kept: Any, ids: Tensor) -> tuple[Any, dict[str, Any]]:
        """Return what to keep, as far as it is known before the call, and the model's inputs for new tokens.

        Args:
            ids: The new tokens [n_tokens]; the inputs may repeat earlier ones before them.
        """

    def after(self, kept: Any, output: Any) -> Any:
        """Return what to keep after a call, given the decoder's output."""


class GivenCache:
    """A cache that the model's code is given, and changes in place."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name, self.make, self.copy = name, make, copy_cache

    def inputs(self, kept: Any, ids: Tensor) -> tuple[Any, dict[str, Any]]:
        """Return the same cache, and the new tokens with it."""
        return kept, {"input_ids": ids[None], self._name: kept, "use_cache": True}

    def after(self, kept: Any, output: Any) -> Any:
        """Return the same cache."""
        return kept


class ReturnedCache(GivenCache):
    """A cache of a kind of its own, which the model's code makes in the first call, and returns (RWKV)."""

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda: None)

    def after(self, kept: Any, output: Any) -> Any:
        """Return the cache that came back."""
        return getattr(output, self._name)


class WholeText:
    """No cache: the tokens themselves are kept, and each call computes all of them again."""

    def make(self) -> Tensor:
        """Return no tokens."""
        return torch.empty(0, dtype=torch.long)

    def copy(self, kept: Tensor) -> Tensor:
        """Return the same tokens, which never change."""
        return kept

    def inputs(self, kept: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return all tokens, to keep and to compute."""
        kept = torch.cat([kept.to(ids.device), ids])
        return kept, {"input_ids": kept[None], "use_cache": False}

    def after(self, kept: Tensor, output: Any) -> Tensor:
        """Return the same tokens."""
        return kept


def own_cache(model: Any) -> OwnCache:
    """Return how a model is run one sequence at a time."""
    name = cache_name(model)
    if name is None or type(model).__name__ in WITHOUT_CACHE:
        return WholeText()
    if makes_own_kind(model):
        return ReturnedCache(name)
    return GivenCache(name, lambda: empty_cache(model))


def cache_name(model: Any) -> str | None:
    """Return the name of a module's cache argument; None if it has none that is known."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def makes_own_kind(model: Any) -> bool:
    """Return whether a model's cache is not one of `transformers`: lists of tensors, or its own class."""
    from transformers import Cache
    from transformers.cache_utils import CacheLayerMixin

    kinds = [each for each in _own_classes(model) if each.__name__.endswith("Cache") and _uses(model, each)]
    are_known = all(issubclass(each, (Cache, CacheLayerMixin)) for each in kinds)
    return cache_name(model) in _LISTS or not are_known


def has_own_layers(model: Any) -> bool:
    """Return whether a model's code defines a layer's cache of its own (DeepSeek V4)."""
    from transformers.cache_utils import CacheLayerMixin

    return any(issubclass(each, CacheLayerMixin) for each in _own_classes(model))


def _uses(model: Any, kind: type[Any]) -> bool:
    """Return whether a model's decoder uses a class, and not only its audio tower (Muse Spark)."""
    code = {type(model), *map(type, decoders_of(model)[-1].modules())}
    return any(kind.__name__ in class_source(each) for each in code)


def _own_classes(model: Any) -> list[type[Any]]:
    name = type(model).__module__
    found = [each for each in vars(sys.modules[name]).values() if isinstance(each, type)]
    return [each for each in found if each.__module__ == name]


def own_sizes(model: Any) -> tuple[int, int] | None:
    """Return the bytes of both states of a sequence, and how many numbers each token adds; needs no weights.

    None if the model does not run without weights.
    """
    cache, name = own_cache(model), cache_name(model)
    if isinstance(cache, WholeText) or name is None:
        return 0, 0

    def size(num_tokens: int) -> int:
        kept = run_with_cache(model, name, cache.make, num_tokens)
        return sum(tensor.numel() for tensor in tensors_of(kept, with_tokens=True))

    try:
        once, twice = size(PROBE_TOKENS), size(2 * PROBE_TOKENS)
    except NotProbed:
        return None
    per_token = -(-(twice - once) // PROBE_TOKENS)
    return KEPT * FLOAT_BYTES * max(once - PROBE_TOKENS * per_token, 0), per_token
