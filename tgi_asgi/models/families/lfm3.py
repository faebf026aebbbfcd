"""Liquid AI's LFM3: short convolutions, windows, norms before and after each part, and a gate for each head.

Source: `transformers.models.lfm3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tgi_asgi import ops
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.layers import SandwichLayer
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import check_layer_types, num_layers, read_biases, read_sizes
from tgi_asgi.models.reading_rope import read_ropes_of_kinds
from tgi_asgi.models.recurrent import ShortConv
from tgi_asgi.models.recurrent_specs import ShortConvSpec

_CONV, _SLIDING, _FULL = "conv", "sliding_attention", "full_attention"
_ROPES: Mapping[str, Mapping[str, Any]] = {  # of configurations without `rope_parameters`
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    _FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def read_lfm3(reader: Reader, architecture: str) -> ModelConfig:
    """Read LFM3's configuration."""
    reader.drop("hidden_act")
    reader.prefer(norm_eps="rms_norm_eps")
    reader.defaults(
        vocab_size=128000, hidden_size=2048, intermediate_size=7680, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=128000, head_dim=128,
        tie_word_embeddings=True, sliding_window=256,
    )  # fmt: skip
    sizes = read_sizes(reader, eps="norm_eps", default_eps=1e-5)
    head_dim, has_gates = sizes["head_dim"], reader.flag("use_attention_gate", True)
    check_computed(reader.flag("use_sandwich_norm", True), "use_sandwich_norm is false")
    check_computed(not has_gates or head_dim % 32 == 0, f"heads with a gate have {head_dim} dims")
    kinds = _read_kinds(reader)
    ropes = read_ropes_of_kinds(reader, dict.fromkeys(_ROPES.keys() & kinds, head_dim), _ROPES)
    window = reader.integer("sliding_window", 0) or None
    layer = LayerSpec(None, None, head_dim**-0.5)
    conv = ShortConvSpec(
        sizes["hidden_size"], reader.integer("conv_L_cache", 7), reader.flag("conv_bias", False)
    )
    of_kinds = {
        _CONV: replace(layer, recurrent=conv), _FULL: replace(layer, rope=ropes.get(_FULL)),
        _SLIDING: replace(layer, rope=ropes.get(_SLIDING), window=window),
    }  # fmt: skip
    return ModelConfig(
        architecture=architecture,
        layers=tuple(of_kinds[kind] for kind in kinds),
        has_qk_norm=True,
        has_head_gates=has_gates,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


def _read_kinds(reader: Reader) -> list[str]:
    """Return each layer's kind, by default in groups of four."""
    count, kinds = num_layers(reader), reader.get("layer_types")
    if kinds is not None:
        return check_layer_types(kinds, count, (_CONV, _SLIDING, _FULL))
    return [{2: _FULL, 0: _SLIDING if index else _CONV}.get(index % 4, _CONV) for index in range(count)]


class _Weights(LayerWeights):
    """The weights of a layer, whose heads may have a gate each."""

    def output_gate(self) -> ops.LinearWeight | None:
        """Make the weight of the gates on heads' results, if there are any."""
        if not self.config.has_head_gates:
            return None
        names = ("self_attn.gate_proj", "self_attn.g_proj")  # in files, and in transformers' module
        name = next((name for name in names if self.has(f"{name}.weight")), names[0])
        return self.linear(name, self.config.num_heads, self.config.hidden_size, has_bias=False)


class _Layer(SandwichLayer):
    """A layer with norms before and after each part, the first of which may be a short convolution."""

    @property
    def products(self) -> Mapping[str, ops.LinearWeight]:
        """The product of heads' gates."""
        return {} if self.gate is None else {"self_attn.g_proj": self.gate}

    def forward(self, x: ops.Value, cache: ops.Cache, /) -> ops.Value:
        """Add attention, or a convolution, and MLP to the residual x [n_tokens, hidden]."""
        if not isinstance(self.recurrent, ShortConv):
            return super().forward(x, cache)
        rows = self.recurrent.rows(ops.norm(x, self.attention_norm), cache)
        return self.add_mlp_between(ops.norm_add(rows, self.attention_end, x))


class Lfm3(Decoder):
    """The decoder with LFM3's weight names."""

    layer_class = _Layer
    weights_class = _Weights
    checkpoint = CheckpointLayout(
        names={
            "model.norm": "model.embedding_norm",
            "input_layernorm": "operator_norm",
            "post_attention_layernorm": "post_operator_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffn_norm",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        }
    )


FAMILIES = (Family("Lfm3ForCausalLM", None, read_lfm3, Lfm3),)
