"""Float64 reference for a decoder with one sequence: slow and plain."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tests.reference.layers import activate, linear, rms_norm, rotate
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.layer_spec import RopeSpec


class DecodedWeights(Protocol):
    """Weights by canonical names, decoded to float32."""

    def decoded_values(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of this shape."""


def decoder_logits(config: ModelConfig, weights: DecodedWeights, ids: list[int]) -> Tensor:
    """Return the logits after every token [n_tokens, vocab]."""
    hidden, middle = config.hidden_size, config.intermediate_size
    table = weights.decoded_values("model.embed_tokens.weight", (config.vocab_size, hidden))
    x = table.double()[ids] * config.embedding_factor
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."

        def vector(name: str, size: int = hidden, prefix: str = prefix) -> Tensor:
            return weights.decoded_values(prefix + name, (size,))

        def matrix(name: str, rows: int, columns: int, prefix: str = prefix) -> Tensor:
            return weights.decoded_values(prefix + name, (rows, columns))

        a = rms_norm(x, vector("input_layernorm.weight"), config.norm_eps)
        heads = []
        for name, count in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            size = count * config.head_dim
            bias = vector(f"self_attn.{name}_proj.bias", size) if config.has_qkv_bias else None
            product = linear(a, matrix(f"self_attn.{name}_proj.weight", size, hidden), bias)
            part = product.view(len(ids), count, config.head_dim)
            if config.has_qk_norm and name != "v":
                part = rms_norm(
                    part, vector(f"self_attn.{name}_norm.weight", config.head_dim), config.norm_eps
                )
            heads.append(part if name == "v" else _rotated(part, config.layers[index].rope))
        spec = config.layers[index]
        attended = _attend(*heads, scale=spec.scale, window=spec.window)
        output = matrix("self_attn.o_proj.weight", hidden, config.num_heads * config.head_dim)
        x = x + config.residual_factor * linear(attended, output)
        a = rms_norm(x, vector("post_attention_layernorm.weight"), config.norm_eps)
        gate, up = (linear(a, matrix(f"mlp.{name}_proj.weight", middle, hidden)) for name in ("gate", "up"))
        down = matrix("mlp.down_proj.weight", hidden, middle)
        x = x + config.residual_factor * linear(activate(gate, config.activation) * up, down)
    x = rms_norm(x, weights.decoded_values("model.norm.weight", (hidden,)), config.norm_eps)
    head = weights.decoded_values("lm_head.weight", (config.vocab_size, hidden))
    return linear(x, table if config.has_tied_embeddings else head) * config.logits_scale


def _rotated(heads: Tensor, rope: RopeSpec | None) -> Tensor:
    if rope is None:
        return heads
    inverse = rope.theta ** -(torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim)
    angles = torch.arange(len(heads), dtype=torch.float64)[:, None] * inverse
    return rotate(heads, angles.cos(), angles.sin())


def _attend(q: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Attend q [n, heads, dim] to key and value [n, KV heads, dim], each to at most `window` positions."""
    n, heads, _ = q.shape
    key, value = (part.repeat_interleave(heads // key.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", q, key) * scale
    back = torch.arange(n)[:, None] - torch.arange(n)
    is_seen = (back >= 0) & (back < (n if window is None else window))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_seen, -torch.inf).softmax(-1), value).flatten(
        1
    )
