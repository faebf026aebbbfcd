"""The decoder that most families are: RMSNorm, rotary positions, grouped-query attention, a gated MLP.

Plain Python over the operators: it is called once, to be recorded. A family that differs in a layer brings a
layer of its own (`families/olmo2.py`); one that differs in the names or the order of weights overrides where
they come from (`families/phi3.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.rope import RopeTables

Sources = list[ops.WeightSource]


class LayerWeights:
    """The weights of one layer, by their canonical names, which are those of `transformers`."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int, arithmetic: ops.Arithmetic) -> None:
        self.config, self.weights, self.arithmetic = config, weights, arithmetic
        self.prefix = f"model.layers.{index}."

    def get(self, name: str, *shape: int) -> ops.WeightSource:
        """Return a tensor of this layer."""
        return self.weights.get(f"{self.prefix}{name}", shape)

    def vector(self, name: str, size: int) -> Tensor:
        """Return a norm's weight [size] float32."""
        return ops.vector(self.get(f"{name}.weight", size))

    def qkv_sources(self) -> Sources:
        """Return the matrices of q, k and v."""
        return [
            self.get(f"self_attn.{name}.weight", rows, self.config.hidden_size)
            for name, rows in self._heads()
        ]

    def qkv_biases(self) -> Sources | None:
        """Return their biases, if they have any."""
        if not self.config.has_qkv_bias:
            return None
        return [self.get(f"self_attn.{name}.bias", rows) for name, rows in self._heads()]

    def gate_up_sources(self) -> Sources:
        """Return the matrices of gate and up."""
        shape = (self.config.intermediate_size, self.config.hidden_size)
        return [self.get(f"mlp.{name}.weight", *shape) for name in ("gate_proj", "up_proj")]

    def gate_up_biases(self) -> Sources | None:
        """Return their biases, if they have any."""
        if not self.config.has_mlp_bias:
            return None
        return [
            self.get(f"mlp.{name}.bias", self.config.intermediate_size) for name in ("gate_proj", "up_proj")
        ]

    def norms(self) -> ops.HeadNorms | None:
        """Return the norms of queries and keys, if there are any: here of each head."""
        if not self.config.has_qk_norm:
            return None
        size = self.config.head_dim
        query, key = (self.vector(f"self_attn.{name}_norm", size) for name in ("q", "k"))
        return ops.HeadNorms(query, key, self.config.norm_eps)

    def qkv(self) -> ops.QkvWeight:
        """Make the weight of `ops.qkv`."""
        config = self.config
        query, key, value = self.qkv_sources()
        return ops.qkv_weight(
            query, key, value, self.arithmetic, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, rotary_dim=config.rotary_dim, biases=self.qkv_biases(),
            norms=self.norms(),
        )  # fmt: skip

    def gate_up(self) -> ops.GateUpWeight:
        """Make the weight of `ops.gate_up`."""
        gate, up = self.gate_up_sources()
        return ops.gate_up_weight(gate, up, self.arithmetic, biases=self.gate_up_biases())

    def linear(self, name: str, rows: int, columns: int, *, has_bias: bool) -> ops.LinearWeight:
        """Make the weight of a single product."""
        bias = self.get(f"{name}.bias", rows) if has_bias else None
        return ops.linear_weight(self.get(f"{name}.weight", rows, columns), self.arithmetic, bias=bias)

    def _heads(self) -> tuple[tuple[str, int], ...]:
        keys = self.config.num_kv_heads * self.config.head_dim
        return (("q_proj", self.config.num_heads * self.config.head_dim), ("k_proj", keys), ("v_proj", keys))


class Layer:
    """One transformer layer: each part reads a norm of the residual and adds to it."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, index: int, ropes: RopeTables) -> None:
        spec = config.layers[index]
        self.eps, self.factor, self.activation = config.norm_eps, config.residual_factor, config.activation
        self.scale, self.window, self.rope = spec.scale, spec.window, ropes.table(spec.rope)
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        self.make_norms(weights, hidden)
        self.qkv = weights.qkv()
        self.output = weights.linear("self_attn.o_proj", hidden, width, has_bias=config.has_output_bias)
        self.gate_up = weights.gate_up()
        self.down = weights.linear(
            "mlp.down_proj", hidden, config.intermediate_size, has_bias=config.has_mlp_bias
        )

    def make_norms(self, weights: LayerWeights, hidden: int) -> None:
        """Take the weights of the layer's norms."""
        self.attention_norm = weights.vector("input_layernorm", hidden)
        self.mlp_norm = weights.vector("post_attention_layernorm", hidden)

    def forward(self, x: ops.Value, cache: ops.Cache) -> ops.Value:
        """Add attention and MLP to the residual x [n_tokens, hidden]."""
        a = ops.norm(x, self.attention_norm, self.eps)
        x = ops.linear_add(self.attend(a, cache), self.output, x, self.factor)
        a = ops.norm(x, self.mlp_norm, self.eps)
        a = ops.gate_up(a, self.gate_up, self.activation)
        return ops.linear_add(a, self.down, x, self.factor)

    def attend(self, a: ops.Value, cache: ops.Cache) -> ops.Value:
        """Return what the heads make of the activation a."""
        q = ops.qkv(a, self.qkv, cache, self.rope)
        return ops.attention(q, cache, self.scale, window=self.window)


class Decoder:
    """A decoder-only transformer; a `Model`.

        model = Decoder(config, weights, ops.Packing(is_exact=True), max_positions=8192)
        recorder = record(model, pool.layers)

    Attributes:
        layer_class, weights_class: what a family may replace.
        path: of the module that has the layers, as adapters name it.
    """

    layer_class: type[Layer] = Layer
    weights_class: type[LayerWeights] = LayerWeights

    def __init__(
        self, config: ModelConfig, weights: Weights, arithmetic: ops.Arithmetic, max_positions: int
    ) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.config, self.path = config, "model"
        ropes = RopeTables(config, weights, max_positions)
        embedding = weights.get("model.embed_tokens.weight", shape)
        self.embedding = ops.linear_weight(embedding, arithmetic, is_vocabulary=True)
        self.layers = [
            self.layer_class(config, self.weights_class(config, weights, index, arithmetic), index, ropes)
            for index in range(config.num_layers)
        ]
        self.norm = ops.vector(weights.get("model.norm.weight", (config.hidden_size,)))
        self.head = self.embedding
        if config.num_labels:
            labels = weights.get("score.weight", (config.num_labels, config.hidden_size))
            self.head = ops.linear_weight(labels, arithmetic, is_vocabulary=True)
        elif config.has_head and not config.has_tied_embeddings:
            head = weights.get("lm_head.weight", shape)
            self.head = ops.linear_weight(head, arithmetic, is_vocabulary=True)

    def forward(self, batch: ops.RecordedBatch, caches: Sequence[ops.Cache]) -> ops.Value:
        """Return the residual of a batch, as `Model.forward` says."""
        x = ops.embed(batch, self.embedding, self.config.embedding_factor)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.forward(x, cache)
        return x

    def logits(self, x: ops.Value) -> ops.Value:
        """Return logits [n_rows, vocab], as `Model.logits` says."""
        return ops.head(x, self.norm, self.config.norm_eps, self.head, scale=self.config.logits_scale)
