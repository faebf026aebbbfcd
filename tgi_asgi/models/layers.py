"""The layers that most families consist of.

Plain Python over the operators: a layer is called once, to be recorded. A family that computes differently
overrides `Layer`. `layer_weights.py` reads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tgi_asgi import ops
from tgi_asgi.models import cutting
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.rope import RopeTables


class Layer:
    """One transformer layer: each part reads a norm of the residual and adds to it.

    Attributes:
        recurrent: Part that replaces attention; None: the layer has attention, with `qkv` and `output`.
        num_caches: Number of caches that `forward` accepts.
        gate: Gate on the heads' results; None: no gate.
        latent: Latent attention, if the layer uses it; it then has no `qkv`.
        experts: The layer's experts; in most families they replace the MLP.
        has_mlp: Whether the layer has an MLP, `up` and `down`.
        up: First half of the MLP, with or without a gate.
        alphas: The two parameters of xIELU, if that is the MLP's activation.
    """

    alphas: tuple[float, float] | None = None
    has_mlp = False
    num_caches = 1

    def __init__(self, config: ModelConfig, weights: LayerWeights, index: int, ropes: RopeTables) -> None:
        self.config, self.spec, self.factor = config, config.layers[index], config.residual_factor
        cut = config.cut
        self.rope, self.sinks = ropes.table(self.spec.rope), weights.sinks()
        self.query_scales = ropes.query_scales(self.spec.query_growth)
        self.slopes = None if self.spec.slopes is None else np.array(self.spec.slopes, np.float32)
        if cut is not None:
            self.sinks, self.slopes = (
                None if each is None else each[cut.heads.start : cut.heads.stop].copy()
                for each in (self.sinks, self.slopes)
            )
        hidden, width = config.hidden_size, config.head_dim
        self.make_norms(weights)
        self.recurrent = weights.recurrent()
        self.latent = weights.latent()
        self.gate: ops.LinearWeight | None = None
        if self.latent is not None and self.spec.latent is not None:
            width = self.spec.latent.value_dim
        elif self.spec.attends:
            self.qkv = weights.qkv()
            self.gate = weights.output_gate()
        if self.spec.attends:
            self.output = weights.linear_columns(
                "self_attn.o_proj", hidden, config.num_heads * width,
                None if cut is None else cutting.of_heads(cut.heads, width), has_bias=config.has_output_bias,
            )  # fmt: skip
        self.experts = weights.experts()
        if self.experts is None and self.spec.part != "mixer":
            self.make_mlp(weights)

    @property
    def products(self) -> Mapping[str, ops.LinearWeight]:
        """Products that only layers of this class have, by their names."""
        return {}

    def make_mlp(self, weights: LayerWeights) -> None:
        """Read the weights of the MLP."""
        config, cut, self.has_mlp = self.config, self.config.cut, True
        self.up = weights.gate_up() if config.has_gate else weights.up()
        self.down = weights.linear_columns(
            "mlp.down_proj", config.hidden_size, config.intermediate_size,
            None if cut is None else cut.inner, has_bias=config.has_mlp_bias,
        )  # fmt: skip

    def make_norms(self, weights: LayerWeights) -> None:
        """Read the weights of the layer's norms."""
        self.attention_norm = weights.norm("input_layernorm")
        self.mlp_norm = weights.norm("post_attention_layernorm")

    def forward(self, x: ops.Value, cache: ops.Cache, /) -> ops.Value:
        """Add attention, or what replaces it, and MLP to the residual x [n_tokens, hidden]."""
        x = self.add_mixer(ops.norm(x, self.attention_norm), x, cache)
        return self.add_mlp(ops.norm(x, self.mlp_norm), x)

    def add_mixer(self, a: ops.Value, x: ops.Value, cache: ops.Cache) -> ops.Value:
        """Add attention of the activation a, or what replaces it, to the residual x."""
        if self.recurrent is not None:
            return self.recurrent.add(a, x, cache, self.factor)
        return ops.linear_add(self.attend(a, cache), self.output, x, self.factor)

    def add_mlp(self, a: ops.Value, x: ops.Value) -> ops.Value:
        """Add the MLP of the activation a, or experts, to the residual x."""
        if self.experts is not None:
            return self.experts.add(a, x, self.factor)
        return ops.linear_add(self.activate(a), self.down, x, self.factor)

    def attend(self, a: ops.Value, cache: ops.Cache) -> ops.Value:
        """Return the heads' results for the activation a."""
        if self.latent is not None:
            return self.latent.attend(a, cache, self.rope, self.spec.scale)
        # Before keys and values: after them, a step needs the last layer's activation for few tokens only.
        gate = None if self.gate is None else ops.linear(a, self.gate)
        return self.attend_with(self.project(a, cache), cache, gate)

    def project(self, a: ops.Value, cache: ops.Cache) -> ops.Value:
        """Return the queries of the activation a; its keys and values are written to the cache."""
        return ops.qkv(a, self.qkv, cache, self.rope, self.config.clip, self.query_scales)

    def attend_with(self, q: ops.Value, cache: ops.Cache, gate: ops.Value | None = None) -> ops.Value:
        """Return the attention of the queries over the cache, multiplied by the gates if given."""
        given = self.spec
        spec = ops.AttentionSpec(
            given.scale,
            given.window,
            soft_cap=given.soft_cap,
            sinks=self.sinks,
            slopes=self.slopes,
            sees_ahead=given.sees_ahead,
        )
        return ops.attention(q, cache, spec, gate=gate)

    def activate(self, a: ops.Value) -> ops.Value:
        """Return the first half of the MLP for the activation a."""
        if isinstance(self.up, ops.GateUpWeight):
            return ops.gate_up(a, self.up, self.config.activation)
        return ops.up(a, self.up, self.config.activation, self.alphas)


class SinglePartLayer(Layer):
    """A layer with one part only, a mixer or an MLP, and one norm."""

    def make_norms(self, weights: LayerWeights) -> None:
        """Read the weights of the norm."""
        self.num_caches = 1 if self.spec.has_mixer else 0
        self.only_norm = weights.norm("input_layernorm")

    def forward(self, x: ops.Value, *caches: ops.Cache) -> ops.Value:
        """Add the layer's part to the residual x [n_tokens, hidden]."""
        a = ops.norm(x, self.only_norm)
        return self.add_mixer(a, x, *caches) if self.spec.has_mixer else self.add_mlp(a, x)


class ParallelLayer(Layer):
    """A layer whose parts both read the layer's input, through one norm or two, and add to it."""

    def make_norms(self, weights: LayerWeights) -> None:
        """Read the weights of the layer's norms."""
        self.attention_norm = self.mlp_norm = weights.norm("input_layernorm")
        if self.config.has_mlp_norm:
            self.mlp_norm = weights.norm("post_attention_layernorm")

    def forward(self, x: ops.Value, cache: ops.Cache, /) -> ops.Value:
        """Add attention and MLP to the residual x [n_tokens, hidden].

        The MLP's norm is computed after the keys and values, even if it is the same norm: after them, a step
        needs the last layer's activation for few tokens only.
        """
        q = self.project(ops.norm(x, self.attention_norm), cache)
        a = ops.norm(x, self.mlp_norm)
        x = ops.linear_add(self.attend_with(q, cache), self.output, x, self.factor)
        return ops.linear_add(self.activate(a), self.down, x, self.factor)


class HybridLayer(Layer):
    """A layer with attention and recurrence in parallel, and constant factors around each part.

    Input factors are folded into the weights of the norm before the part. The MLP's applies to gate and up
    alike.
    """

    num_caches = 2

    def __init__(self, config: ModelConfig, weights: LayerWeights, index: int, ropes: RopeTables) -> None:
        super().__init__(config, weights, index, ropes)
        assert self.spec.hybrid is not None and self.recurrent is not None
        self.parts, self.state = self.spec.hybrid, self.recurrent
        self.state_norm = _scaled(self.attention_norm, self.parts.state.read)
        self.attention_norm = _scaled(self.attention_norm, self.parts.attention.read)
        self.mlp_norm = _scaled(self.mlp_norm, self.parts.mlp.read)

    def forward(self, x: ops.Value, cache: ops.Cache, /, *states: ops.Cache) -> ops.Value:
        """Add attention, state and MLP to the residual x [n_tokens, hidden].

        Both caches are written before the residual changes, and attention comes last: after the writes, a
        step needs the last layer's activation for few tokens only.
        """
        (state,) = states
        a = ops.norm(x, self.attention_norm)
        q = self.project(a, cache)
        if self.parts.state.read != self.parts.attention.read:
            a = ops.norm(x, self.state_norm)
        x = self.state.add(a, x, state, self.parts.state.added)
        x = ops.linear_add(self.attend_with(q, cache), self.output, x, self.parts.attention.added)
        a = ops.norm(x, self.mlp_norm)
        return ops.linear_add(self.activate(a), self.down, x, self.parts.mlp.added)


def _scaled(norm: ops.NormWeight, factor: float) -> ops.NormWeight:
    """Return an RMSNorm multiplied by `factor`."""
    return replace(norm, weight=norm.weight * factor)


class PostNormLayer(Layer):
    """A layer whose parts read the residual itself and add a norm of their result (OLMo 2, EXAONE 4).

    Source: OLMo et al., 2 OLMo 2 Furious, arXiv 2501.00656, section 2.
    """

    def make_norms(self, weights: LayerWeights) -> None:
        """Read the weights of the norms after the parts."""
        self.attention_norm = weights.norm("post_attention_layernorm")
        self.mlp_norm = weights.norm("post_feedforward_layernorm")

    def forward(self, x: ops.Value, cache: ops.Cache, /) -> ops.Value:
        """Add attention and MLP to the residual x [n_tokens, hidden]."""
        rows = ops.linear(self.attend(ops.activation(x), cache), self.output)
        x = ops.norm_add(rows, self.attention_norm, x, self.factor)
        a = self.activate(ops.activation(x))
        return ops.norm_add(ops.linear(a, self.down), self.mlp_norm, x, self.factor)


class SandwichLayer(Layer):
    """A layer with a norm before and after each part (Gemma 2, GLM-4)."""

    def make_norms(self, weights: LayerWeights) -> None:
        """Read the weights of attention's two norms, and of the MLP's."""
        self.attention_norm = weights.norm("input_layernorm")
        self.attention_end = weights.norm("post_attention_layernorm")
        self.mlp_norm = weights.norm("pre_feedforward_layernorm")
        self.mlp_end = weights.norm("post_feedforward_layernorm")

    def forward(self, x: ops.Value, cache: ops.Cache, /) -> ops.Value:
        """Add attention and MLP to the residual x [n_tokens, hidden]."""
        rows = ops.linear(self.attend(ops.norm(x, self.attention_norm), cache), self.output)
        return self.add_mlp_between(ops.norm_add(rows, self.attention_end, x, self.factor))

    def add_mlp_between(self, x: ops.Value) -> ops.Value:
        """Add the MLP, between its two norms, to the residual x."""
        rows = ops.linear(self.activate(ops.norm(x, self.mlp_norm)), self.down)
        return ops.norm_add(rows, self.mlp_end, x, self.factor)
