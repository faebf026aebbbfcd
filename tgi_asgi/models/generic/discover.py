"""Properties of each attention layer of a module, found by running it once on zeros instead of weights.

The module runs with an attention function that records its calls, and a mask function that reads the rule
from the mask's predicate. A layer is identified by the order of calls: one module may be called for several
layers, and `layer_idx` is not always present.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.rules import LONGEST, Rule, UnknownRule, decode_rule, rule_of
from tgi_asgi.models.generic.zeros import NotProbed, run_on_zeros

PROBE = "tgi_probe"
PROBE_TOKENS = 3
# Arguments other than queries, keys and values that attention functions receive and may ignore.
IGNORED = frozenset({
    "attention_mask", "scaling", "dropout", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids",
    "use_cache", "output_attentions", "output_hidden_states", "training", "cache_position", "layer_idx",
    "past_key_values", "return_dict", "logits_to_keep", "head_mask", "output_router_logits", "deterministic",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "mm_token_type_ids", "seq_idx",
    "num_logits_to_keep", "labels", "inputs_embeds", "token_type_ids", "encoder_hidden_states",
    "encoder_attention_mask", "position_embeddings", "target_dtype", "implementation", "cache_params",
    "slopes", "cache",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One call of attention in a step: the shape of its heads, and which keys its queries see."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    rule: Rule
    scale: float  # factor on the scores
    is_plain: bool  # no soft cap, no sinks, no slopes


def discover(model: Any, max_positions: int) -> list[AttentionLayer]:
    """Run the module on three tokens without weights; return its attention layers in the order of calls.

    Raises:
        ModelLoadError: if the kernels do not support a layer, or positions do not reach it.
    """
    probe = _Probe(min(max_positions, LONGEST))
    run_probe(model, probe)
    if not probe.layers and not probe.problems and _has_no_interface(model):
        raise ModelLoadError(f"{type(model).__name__} writes its attention inline")
    if probe.problems:
        raise ModelLoadError(f"{type(model).__name__}: {probe.problems[0]}")
    if probe.layers and not probe.has_slopes:
        require_positions(model)
    return probe.layers


def run_with_cache(model: Any, name: str, make: Callable[[], Any], num_tokens: int = PROBE_TOKENS) -> Any:
    """Run the module on a few tokens without weights, with a cache under this name; return the cache.

    Args:
        make: Function that makes an empty cache, or returns None if the module itself makes it.

    Raises:
        NotProbed: if it does not run without weights.
    """
    with _installed(_NoProbe()), implementation(model, PROBE, PROBE), torch.no_grad():
        cache = make()
        try:
            found = run_on_zeros(model, num_tokens, **{name: cache, "use_cache": True})
        except NotProbed as error:
            raise NotProbed(f"{type(model).__name__} does not run without weights: {error}") from None
        return getattr(found, name, None) if cache is None else cache


class Probe(Protocol):
    """Records what a module asks of attention, in place of computing it."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Record a call; return a tensor with a result's shape."""

    def mask(self, *, q_length: int, kv_length: int, mask_function: Any) -> Tensor:
        """Return a mask filled with a number that stands for its function."""


@contextlib.contextmanager
def _installed(probe: Probe) -> Iterator[None]:
    """Install a probe's attention and mask functions, and skip experts, which need values."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(PROBE, probe.attend)
    AttentionMaskInterface.register(PROBE, probe.mask)
    ALL_EXPERTS_FUNCTIONS.register(PROBE, lambda module, hidden, *args, **kwargs: hidden)
    packed, chunked = masking_utils.find_packed_sequence_indices, masking_utils.chunked_overlay
    masking: Any = masking_utils
    masking.find_packed_sequence_indices = lambda position_ids: None  # requires values
    masking.chunked_overlay = lambda size, padding: chunked(size, torch.zeros(1, dtype=torch.long))
    try:
        yield
    finally:
        masking.find_packed_sequence_indices, masking.chunked_overlay = packed, chunked


def run_probe(model: Any, probe: Probe) -> None:
    """Run a module with a probe in place of its attention.

    Raises:
        ModelLoadError: if it does not run without weights.
    """
    with _installed(probe), implementation(model, PROBE, PROBE), torch.no_grad():
        try:
            run_on_zeros(model, PROBE_TOKENS)
        except NotProbed as error:
            raise ModelLoadError(f"{type(model).__name__} does not run without weights: {error}") from None


def require_positions(model: Any) -> None:
    """Refuse a module that positions would not reach: several ignore unknown arguments silently.

    Raises:
        ModelLoadError: if neither it nor its decoder accepts `position_ids` by name.
    """
    for part in (model, model.base_model, _decoder(model)):
        if part is not None and "position_ids" in inspect.signature(part.forward).parameters:
            return
    raise ModelLoadError(f"positions do not reach the layers of {type(model).__name__}")


def _decoder(model: Any) -> Any:
    try:
        return model.get_decoder()
    except (AttributeError, NotImplementedError):
        return None


def _has_no_interface(model: Any) -> bool:
    return not model._can_set_attn_implementation() and any(
        "attention" in type(module).__name__.lower() for module in model.modules()
    )


class _Probe:
    """Records the calls of attention and the rules in their masks."""

    def __init__(self, length: int) -> None:
        self.layers: list[AttentionLayer] = []
        self.problems: list[str] = []
        self.has_slopes = False  # linear biases: positions have no other effect
        self._length = length

    def mask(self, *, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> Tensor:
        """Return a mask filled with the number of its rule."""
        return torch.full((1, 1, q_length, kv_length), float(rule_of(mask_function, self._length)))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Record a call; return a tensor with a result's shape."""
        heads, tokens = query.shape[1], query.shape[2]
        unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in IGNORED)
        if unknown:
            self.problems.append(f"attention takes {', '.join(unknown)}, which the kernels do not support")
        for name, dim in (("head_dim", query.shape[3]), ("value_dim", value.shape[3])):
            try:
                ops.cached_head_dim(dim, "float32", name)
            except ValueError as error:
                self.problems.append(f"the cache does not support a layer's heads: {error}")
        self.has_slopes |= kwargs.get("slopes") is not None
        rule = Rule()
        if isinstance(attention_mask, Tensor):
            try:
                rule = decode_rule(int(attention_mask.reshape(-1)[0]))
            except UnknownRule as error:
                self.problems.append(f"a layer has {error}")
        elif not kwargs.get("is_causal", getattr(module, "is_causal", True)):
            self.problems.append("a layer has no mask, and is not causal")
        self.layers.append(
            AttentionLayer(
                num_heads=heads,
                num_kv_heads=key.shape[1],
                head_dim=query.shape[3],
                value_dim=value.shape[3],
                rule=rule,
                scale=scale_of(query, kwargs),
                is_plain=all(kwargs.get(name) is None for name in ("softcap", "s_aux", "slopes")),
            )
        )
        return query.new_empty(query.shape[0], tokens, heads, value.shape[3]), None


class _NoProbe:
    """Records nothing."""

    def mask(self, *, q_length: int, kv_length: int, mask_function: Any, **_: Any) -> Tensor:
        """Return a mask that hides nothing."""
        return torch.zeros(1, 1, q_length, kv_length)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        """Return a tensor with a result's shape."""
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def scale_of(query: Tensor, kwargs: Mapping[str, Any]) -> float:
    """Return the factor on the scores: the call's, or by default head_dim**-0.5."""
    scale = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


@contextlib.contextmanager
def implementation(model: Any, attention: str, experts: str | None = None) -> Iterator[None]:
    """Switch a module's attention, and its experts if given, to the implementations of these names."""
    configs = configurations(model)
    before = [(each, each._attn_implementation, each._experts_implementation) for each in configs]
    try:
        for each in configs:
            each._attn_implementation_internal = attention
            if experts is not None:
                each._experts_implementation_internal = experts
        yield
    finally:
        for each, own_attention, own_experts in before:
            each._attn_implementation_internal = own_attention
            each._experts_implementation_internal = own_experts


def configurations(model: Any) -> list[Any]:
    """Return the configurations that a module's parts read, each once."""
    found = {id(each): each for each in (model.config, model.config.get_text_config())}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
