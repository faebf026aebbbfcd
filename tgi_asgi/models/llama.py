"""The Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM and all who share their layout.

Plain Python over the operators: it is run to compute, and may be run once to be recorded. What `ops` returns
is opaque here; nothing in this file may look inside.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.batch import Batch
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.rope import make_rope_table


class Llama:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, a gated MLP.

    model = Llama(config, weights, torch.float32, max_positions=8192)
    x = model.forward(batch, kv)
    logits = model.logits(x, rows)
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, dtype: ops.Arithmetic, max_positions: int
    ) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = ops.linear_weight(weights.get("model.embed_tokens.weight", shape), dtype=dtype)
        self.layers = [Layer(config, weights, index, dtype) for index in range(config.num_layers)]
        self.norm = ops.vector(weights.get("model.norm.weight", (config.hidden_size,)))
        self.head = (
            self.embedding
            if config.has_tied_embeddings
            else ops.linear_weight(weights.get("lm_head.weight", shape), dtype=dtype)
        )
        self.rope = make_rope_table(config, weights, max_positions)

    def forward(self, batch: Batch, kv: Sequence[ops.KvLayer]) -> Tensor:
        """Return the residual x [n_tokens, hidden] float32 of a batch; writes keys and values to `kv`."""
        x = ops.embed(batch.ids, self.embedding)
        for layer, cache in zip(self.layers, kv, strict=True):
            x = layer.forward(x, batch, cache, self.rope)
        return x

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return logits [n_rows, vocab] float32 after the tokens at rows [n_rows] int32 of x."""
        return ops.head(x, rows, self.norm, self.config.norm_eps, self.head)


class Layer:
    """One transformer layer."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int, dtype: ops.Arithmetic) -> None:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def get(name: str, *shape: int) -> ops.WeightSource:
            return weights.get(f"model.layers.{index}.{name}", shape)

        self.eps, self.scale, self.window = config.norm_eps, config.scale, config.sliding_window
        self.attention_norm = ops.vector(get("input_layernorm.weight", hidden))
        self.qkv = ops.qkv_weight(
            get("self_attn.q_proj.weight", queries, hidden),
            get("self_attn.k_proj.weight", keys, hidden),
            get("self_attn.v_proj.weight", keys, hidden),
            biases=(
                get("self_attn.q_proj.bias", queries),
                get("self_attn.k_proj.bias", keys),
                get("self_attn.v_proj.bias", keys),
            )
            if config.has_qkv_bias
            else None,
            norms=ops.HeadNorms(
                ops.vector(get("self_attn.q_norm.weight", config.head_dim)),
                ops.vector(get("self_attn.k_norm.weight", config.head_dim)),
                config.norm_eps,
            )
            if config.has_qk_norm
            else None,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
        )
        self.output = ops.linear_weight(
            get("self_attn.o_proj.weight", hidden, queries),
            bias=get("self_attn.o_proj.bias", hidden) if config.has_output_bias else None,
            dtype=dtype,
        )
        self.mlp_norm = ops.vector(get("post_attention_layernorm.weight", hidden))
        self.gate_up = ops.gate_up_weight(
            get("mlp.gate_proj.weight", intermediate, hidden),
            get("mlp.up_proj.weight", intermediate, hidden),
            biases=(get("mlp.gate_proj.bias", intermediate), get("mlp.up_proj.bias", intermediate))
            if config.has_mlp_bias
            else None,
            dtype=dtype,
        )
        self.down = ops.linear_weight(
            get("mlp.down_proj.weight", hidden, intermediate),
            bias=get("mlp.down_proj.bias", hidden) if config.has_mlp_bias else None,
            dtype=dtype,
        )

    def forward(self, x: Tensor, batch: Batch, kv: ops.KvLayer, rope: ops.RopeTable) -> Tensor:
        """Add attention and MLP to the residual x [n_tokens, hidden] float32, in place."""
        a = ops.norm(x, self.attention_norm, self.eps)
        q = ops.qkv(a, self.qkv, batch.positions, batch.slots, kv, rope)
        a = ops.attention(q, kv, batch.tables, self.scale, self.window)
        x = ops.linear_add(a, self.output, x)
        a = ops.norm(x, self.mlp_norm, self.eps)
        a = ops.gate_up(a, self.gate_up)
        return ops.linear_add(a, self.down, x)
