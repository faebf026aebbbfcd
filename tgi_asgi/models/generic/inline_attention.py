"""Attention of six older architectures whose code writes it inline, redirected to the attention interface.

Only the computation of scores is replaced; projections and rotary embeddings stay the model's own. The linear
biases of BLOOM, Falcon and MPT (Press et al., ALiBi) become one slope per head: a bias that depends only on
the key's position differs from ALiBi's by a constant per row, which the softmax cancels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.generic.rules import window_rule

# Prefix of this package's attention implementations: the probe's, and that of steps.
_PREFIX = "tgi"


def adapt_attention(model: Any) -> None:
    """Redirect a model's inline attention to the interface whenever a native implementation is selected."""
    for module in model.modules():
        kind = type(module)
        install = _KINDS.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
        if install is not None:
            install(module, model.config)
    if type(model).__name__ == "MptForCausalLM":
        _let_mpt_do_without_mask()


def _is_native(config: Any) -> bool:
    return str(config._attn_implementation).startswith(_PREFIX)


def _attend(
    module: Any, config: Any, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int = 0,
    slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return [1, tokens, heads, dims] of queries, keys and values [1, heads, tokens, dims]."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    rule = torch.full((1, 1, 1, 1), float(window_rule(window)))  # encoded like the probe's masks
    rows: Tensor = function(module, query, key, value, rule, scaling=scale, slopes=slopes)[0]
    return rows


def _with_scores(scale: Callable[[Any], float], window: Callable[[Any, Any], int]) -> Any:
    """Make the replacement for `_attn(query, key, value, mask)`, which returns [1, heads, tokens, dims]."""

    def install(module: Any, config: Any) -> None:
        own = getattr(module, "_attn", None)
        if own is None:  # since transformers 5.24, two of the three use the interface themselves
            return

        def attn(query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
            if not _is_native(config):
                return own(query, key, value, attention_mask)
            rows = _attend(
                module, config, query, key, value, scale=scale(module), window=window(module, config)
            )
            return rows.transpose(1, 2), None

        module._attn = attn

    return install


def _neo_window(module: Any, config: Any) -> int:
    return int(config.window_size) if module.attention_type == "local" else 0


def _install_forward(forward: Callable[..., Any], module: Any, config: Any) -> None:
    own = module.forward

    @functools.wraps(own)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if not _is_native(config):
            return own(*args, **kwargs)
        return forward(module, config, *args, **kwargs)

    module.forward = replaced


def _bloom(module: Any, config: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> Any:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    slopes = torch.tensor(alibi_slopes(module.num_heads))
    rows = _attend(module, config, query, key, value, scale=module.inv_norm_factor, slopes=slopes)
    return module.dense(rows.flatten(2)) + residual, None


def _falcon(
    module: Any, config: Any, hidden_states: Tensor, alibi: Tensor | None, *_: Any,
    position_embeddings: Any = None, **__: Any,
) -> Any:  # fmt: skip
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    query, key, value = (
        each.transpose(1, 2) for each in module._split_heads(module.query_key_value(hidden_states))
    )
    slopes = None
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    else:  # Falcon also scales the biases
        slopes = torch.tensor(alibi_slopes(module.num_heads)) * module.inv_norm_factor
    scale = 1 / math.sqrt(module.head_dim)
    rows = _attend(module, config, query, key, value, scale=scale, slopes=slopes)
    return module.dense(rows.flatten(2)), None


def _mpt(module: Any, config: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv)
    heads = (1, mixed.shape[1], module.n_heads, module.head_dim)
    query, key, value = (each.reshape(heads).transpose(1, 2) for each in mixed.chunk(3, dim=2))
    slopes = torch.tensor(alibi_slopes(module.n_heads))
    rows = _attend(module, config, query, key, value, scale=module.softmax_scale, slopes=slopes)
    return module.out_proj(rows.flatten(2)), None


def _let_mpt_do_without_mask() -> None:
    """Give MPT, which converts its mask to booleans, an unused mask when there is none."""
    from transformers.masking_utils import create_causal_mask
    from transformers.models.mpt import modeling_mpt

    def create(config: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros(1) if _is_native(config) else create_causal_mask(config, *args, **kwargs)

    module: Any = modeling_mpt
    module.create_causal_mask = create


_KINDS: dict[str, Callable[[Any, Any], None]] = {
    "BloomAttention": functools.partial(_install_forward, _bloom),
    "FalconAttention": functools.partial(_install_forward, _falcon),
    "MptAttention": functools.partial(_install_forward, _mpt),
    "GPTJAttention": _with_scores(lambda module: 1 / float(module.scale_attn), lambda module, config: 0),
    "CodeGenAttention": _with_scores(lambda module: 1 / float(module.scale_attn), lambda module, config: 0),
    "GPTNeoSelfAttention": _with_scores(lambda module: 1.0, _neo_window),
}
