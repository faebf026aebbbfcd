"""The decoder that most families are: norms, rotary positions, grouped-query attention, an MLP.

Plain Python over the operators: it is called once, to be recorded. A family that differs in a layer brings a
layer of its own (`families/olmo2.py`); one that differs in the names or the order of weights overrides where
they come from (`families/phi3.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        self.spec, self.prefix = config.layers[index], f"model.layers.{index}."

    def get(self, name: str, *shape: int) -> ops.WeightSource:
        """Return a tensor of this layer."""
        return self.weights.get(f"{self.prefix}{name}", shape)

    def norm(self, name: str, size: int | None = None) -> ops.NormWeight:
        """Return a norm of this layer, of the residual's width if no other is said."""
        return read_norm(self.config, self.weights, f"{self.prefix}{name}", size)

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
        query, key = (self.norm(f"self_attn.{name}_norm", self.config.head_dim) for name in ("q", "k"))
        return ops.HeadNorms(query, key, is_last=self.config.has_late_qk_norm)

    def qkv(self) -> ops.QkvWeight:
        """Make the weight of `ops.qkv`."""
        config, rope = self.config, self.spec.rope
        query, key, value = self.qkv_sources()
        return ops.qkv_weight(
            query, key, value, self.arithmetic, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, rotary_dim=None if rope is None else rope.dim,
            biases=self.qkv_biases(), norms=self.norms(), is_interleaved=config.has_interleaved_rope,
        )  # fmt: skip

    def sinks(self) -> Tensor | None:
        """Return the heads' sinks [num_heads] float32, if there are any."""
        return ops.vector(self.get("self_attn.sinks", self.config.num_heads)) if self.spec.has_sinks else None

    def up(self) -> ops.LinearWeight:
        """Make the weight of `ops.up`."""
        config = self.config
        sizes = config.intermediate_size, config.hidden_size
        return self.linear("mlp.up_proj", *sizes, has_bias=config.has_mlp_bias)

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
    """One transformer layer: each part reads a norm of the residual and adds to it.

    Attributes:
        up: the first half of the MLP, with a gate or without.
        alphas: the two numbers of xIELU, where that is the MLP's function.
    """

    alphas: tuple[float, float] | None = None

    def __init__(self, config: ModelConfig, weights: LayerWeights, index: int, ropes: RopeTables) -> None:
        self.config, self.spec, self.factor = config, config.layers[index], config.residual_factor
        self.rope, self.sinks = ropes.table(self.spec.rope), weights.sinks()
        self.slopes = None if self.spec.slopes is None else torch.tensor(self.spec.slopes)
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        self.make_norms(weights)
        self.qkv = weights.qkv()
        self.output = weights.linear("self_attn.o_proj", hidden, width, has_bias=config.has_output_bias)
        self.up = weights.gate_up() if config.has_gate else weights.up()
        self.down = weights.linear(
            "mlp.down_proj", hidden, config.intermediate_size, has_bias=config.has_mlp_bias
        )

    def make_norms(self, weights: LayerWeights) -> None:
        """Take the weights of the layer's norms."""
        self.attention_norm = weights.norm("input_layernorm")
        self.mlp_norm = weights.norm("post_attention_layernorm")

    def forward(self, x: ops.Value, cache: ops.Cache) -> ops.Value:
        """Add attention and MLP to the residual x [n_tokens, hidden]."""
        a = self.attend(ops.norm(x, self.attention_norm), cache)
        x = ops.linear_add(a, self.output, x, self.factor)
        a = self.activate(ops.norm(x, self.mlp_norm))
        return ops.linear_add(a, self.down, x, self.factor)

    def attend(self, a: ops.Value, cache: ops.Cache) -> ops.Value:
        """Return what the heads make of the activation a."""
        return self.attend_with(self.project(a, cache), cache)

    def project(self, a: ops.Value, cache: ops.Cache) -> ops.Value:
        """Return the queries of the activation a; its keys and values are written to the cache."""
        return ops.qkv(a, self.qkv, cache, self.rope, self.config.clip)

    def attend_with(self, q: ops.Value, cache: ops.Cache) -> ops.Value:
        """Return what queries find in the cache."""
        spec = self.spec
        return ops.attention(
            q, cache, spec.scale, window=spec.window, chunk=spec.chunk, soft_cap=spec.soft_cap,
            sinks=self.sinks, slopes=self.slopes,
        )  # fmt: skip

    def activate(self, a: ops.Value) -> ops.Value:
        """Return the first half of the MLP of the activation a."""
        if isinstance(self.up, ops.GateUpWeight):
            return ops.gate_up(a, self.up, self.config.activation)
        return ops.up(a, self.up, self.config.activation, self.alphas)


class ParallelLayer(Layer):
    """A layer whose parts both read the residual as it comes, by one norm, and add to it."""

    def make_norms(self, weights: LayerWeights) -> None:
        """Take the weights of the layer's norm."""
        self.attention_norm = self.mlp_norm = weights.norm("input_layernorm")

    def forward(self, x: ops.Value, cache: ops.Cache) -> ops.Value:
        """Add attention and MLP to the residual x [n_tokens, hidden].

        The MLP's norm is computed behind the keys and values, be it the same: of the last layer's a step
        needs that of few tokens only.
        """
        q = self.project(ops.norm(x, self.attention_norm), cache)
        a = ops.norm(x, self.mlp_norm)
        x = ops.linear_add(self.attend_with(q, cache), self.output, x, self.factor)
        return ops.linear_add(self.activate(a), self.down, x, self.factor)


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
        self.positions = self.read_positions(weights) if config.has_learnt_positions else None
        self.layers = [
            self.layer_class(config, self.weights_class(config, weights, index, arithmetic), index, ropes)
            for index in range(config.num_layers)
        ]
        self.norm = read_norm(config, weights, "model.norm")
        self.head = self.embedding
        if config.num_labels:
            labels = weights.get("score.weight", (config.num_labels, config.hidden_size))
            self.head = ops.linear_weight(labels, arithmetic, is_vocabulary=True)
        elif config.has_head and (not config.has_tied_embeddings or config.has_head_bias):
            head = embedding if config.has_tied_embeddings else weights.get("lm_head.weight", shape)
            bias = weights.get("lm_head.bias", shape[:1]) if config.has_head_bias else None
            self.head = ops.linear_weight(head, arithmetic, bias=bias, is_vocabulary=True)

    def read_positions(self, weights: Weights) -> Tensor:
        """Return what each position adds to its token's embedding: [positions, hidden] float32."""
        shape = (self.config.context_length, self.config.hidden_size)
        return ops.vector(weights.get("model.embed_positions.weight", shape)).view(shape)

    def forward(self, batch: ops.RecordedBatch, caches: Sequence[ops.Cache]) -> ops.Value:
        """Return the residual of a batch, as `Model.forward` says."""
        x = self.embed(batch)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.forward(x, cache)
        return x

    def embed(self, batch: ops.RecordedBatch) -> ops.Value:
        """Return the residual that the layers begin with."""
        return ops.embed(batch, self.embedding, self.config.embedding_factor, self.positions)

    def logits(self, x: ops.Value) -> ops.Value:
        """Return logits [n_rows, vocab], as `Model.logits` says."""
        config = self.config
        return ops.head(x, self.norm, self.head, scale=config.logits_scale, cap=config.logits_cap)


def read_norm(config: ModelConfig, weights: Weights, name: str, size: int | None = None) -> ops.NormWeight:
    """Read a norm, of the kind that the configuration says: [size], or of the residual's width."""
    columns = config.hidden_size if size is None else size
    weight = bias = None
    if config.has_norm_weight:
        weight = ops.vector(weights.get(f"{name}.weight", (columns,))) + config.norm_offset
    if not config.has_layer_norm:
        return ops.NormWeight.rms(columns, config.norm_eps, weight=weight)
    if config.has_norm_bias:
        bias = ops.vector(weights.get(f"{name}.bias", (columns,)))
    return ops.NormWeight.layer(columns, config.norm_eps, weight=weight, bias=bias)
