"""Google's Gemma 4 (text): layers that share keys, embeddings for each layer, experts beside MLPs.

Layers without a window have wider heads, of which a part rotates, and may use their keys as values. In the
small models, the last layers read the keys and values of earlier ones, so that a prompt's tokens need only
the layers before them. Each layer then also has an embedding of its own for a token, which a gate lets in.

Source: `transformers.models.gemma4`, and llama.cpp's converter for GGUF files, whose keys
`gguf_modules/gemma.py` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tgi_asgi import ops
from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import MAX_HEADS, MAX_LAYERS, check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames
from tgi_asgi.models.family import Family
from tgi_asgi.models.gguf_modules.gemma import GEMMA4_NAMES
from tgi_asgi.models.layer_spec import LayerSizes, LayerSpec
from tgi_asgi.models.layer_tensors import read_norm
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.layers import SandwichLayer
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import check_layer_types, num_layers, read_sizes, text_of
from tgi_asgi.models.reading_experts import read_experts
from tgi_asgi.models.reading_rope import read_ropes_of_kinds
from tgi_asgi.models.rope import RopeTables

_SLIDING, _FULL = "sliding_attention", "full_attention"
_PERIOD = 6  # one layer in so many has no window, if the file does not list them
_ROPES: Mapping[str, Mapping[str, Any]] = {  # of configurations without `rope_parameters`
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    _FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


def read_gemma4(reader: Reader, architecture: str) -> ModelConfig:
    """Read Gemma 4's configuration, which models that accept images nest."""
    with text_of(reader) as text:
        check_computed(
            text.get("use_bidirectional_attention") in (None, False, "vision"),
            "use_bidirectional_attention concerns more than images",
        )
        return _read(text, architecture)


class _Heads(NamedTuple):
    """The KV heads of a layer."""

    number: int
    size: int


def _read(reader: Reader, architecture: str) -> ModelConfig:
    reader.drop("hidden_act")
    reader.rename(hidden_act=("hidden_activation",))
    reader.defaults(
        num_key_value_heads=4, head_dim=256, sliding_window=512, tie_word_embeddings=True,
        hidden_size_per_layer_input=256,
    )  # fmt: skip
    reader.require(attention_bias=False)
    sizes = read_sizes(reader, activation="gelu_tanh")
    kinds = _read_kinds(reader)
    num_own = len(kinds) - reader.integer("num_kv_shared_layers", 0)
    check(
        0 < num_own <= len(kinds) and set(kinds[:num_own]) == set(kinds),
        f"num_kv_shared_layers leaves {num_own} layers with keys, which must be of each kind",
    )
    heads = _read_heads(reader, kinds, sizes)
    ropes = read_ropes_of_kinds(reader, _sizes_by_kind(kinds, heads), _ROPES)
    inner = sizes["intermediate_size"]
    shared_inner = 2 * inner if reader.flag("use_double_wide_mlp", False) else inner
    has_equal_values = reader.flag("attention_k_eq_v", False)
    window, experts = reader.integer("sliding_window"), None
    if reader.flag("enable_moe_block", False):
        experts = read_experts(
            reader, count="num_experts", top_k="top_k_experts", is_renormalised=True, has_scales=True
        )
    reader.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
    layers = tuple(
        LayerSpec(
            ropes[kind],
            window if kind == _SLIDING else None,
            scale=1.0,
            experts=experts,
            sizes=LayerSizes(*heads[index], inner if index < num_own else shared_inner),
            keys_of=None if index < num_own else _last(kinds[:num_own], kind),
            values_are_keys=has_equal_values and kind == _FULL and index < num_own,
        )
        for index, kind in enumerate(kinds)
    )
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        has_qk_norm=True,
        has_value_norm=True,
        embedding_factor=sizes["hidden_size"] ** 0.5,
        layer_input_size=_read_inputs(reader, sizes["vocab_size"]),
        logits_cap=reader.number("final_logit_softcapping", 0.0),
        **sizes,
    )


def _last(kinds: Sequence[str], kind: str) -> int:
    """Return the last index of a kind."""
    return len(kinds) - 1 - kinds[::-1].index(kind)


def _read_kinds(reader: Reader) -> list[str]:
    """Return each layer's kind; the last has no window, whatever the file says."""
    count, given = num_layers(reader), reader.get("layer_types")
    kinds = [_SLIDING if (index + 1) % _PERIOD else _FULL for index in range(count)]
    if given is not None:
        kinds = list(check_layer_types(given, count))
    return [*kinds[:-1], _FULL]


def _read_heads(reader: Reader, kinds: Sequence[str], sizes: Mapping[str, Any]) -> list[_Heads]:
    """Return each layer's KV heads, which `per_layer_config` lists, or which are those of its kind."""
    sliding = _Heads(sizes["num_kv_heads"], sizes["head_dim"])
    count, size = "num_global_key_value_heads", "global_head_dim"
    if not reader.has("per_layer_config"):
        full = _Heads(sliding.number, reader.integer(size, 512))
        if reader.flag("attention_k_eq_v", False) and reader.get(count) is not None:
            full = full._replace(number=reader.positive(count, MAX_HEADS))
        return [full if kind == _FULL else sliding for kind in kinds]
    reader.ignore(count, size)
    given = reader.get("per_layer_config") or {}
    check(isinstance(given, dict), f"per_layer_config must be an object, got {str(given)[:100]}")
    found = [sliding] * len(kinds)
    for key, values in given.items():  # "05", and numbers from GGUF files
        index = int(key) if len(str(key)) < 10 and str(key).isdecimal() else MAX_LAYERS
        check(index < len(kinds), f"per_layer_config has no layer {str(key)[:100]!r}")
        found[index] = _heads_of_layer(values, sliding)
    return found


def _heads_of_layer(values: Any, usual: _Heads) -> _Heads:
    """Return the heads of one entry of `per_layer_config`."""
    check(isinstance(values, dict), f"per_layer_config must have objects, got {str(values)[:100]}")
    unknown = set(values) - {"num_key_value_heads", "head_dim"}
    check_computed(not unknown, f"per_layer_config has {', '.join(map(str, unknown))[:100]}")
    layer = Reader.of_json(values)
    return _Heads(layer.integer("num_key_value_heads", usual.number), layer.integer("head_dim", usual.size))


def _sizes_by_kind(kinds: Sequence[str], heads: Sequence[_Heads]) -> dict[str, int]:
    """Return the size of each kind's heads, which has one rotary embedding."""
    found: dict[str, int] = {}
    for kind, each in zip(kinds, heads, strict=True):
        size = found.setdefault(kind, each.size)
        check_computed(size == each.size, f"{kind} has heads of {size} and of {each.size} dims")
    return found


def _read_inputs(reader: Reader, vocab_size: int) -> int:
    """Return the size of the layers' own embeddings, which must be of all tokens; 0: there are none."""
    size = reader.integer("hidden_size_per_layer_input")
    if size:
        rows = reader.integer("vocab_size_per_layer_input", 262144)
        check_computed(rows == vocab_size, f"vocab_size_per_layer_input is {rows}, vocab_size {vocab_size}")
        check_computed(size % 32 == 0, f"hidden_size_per_layer_input is {size}, not a multiple of 32")
    return size


class _Weights(LayerWeights):
    """The weights of a layer, whose experts are not part of its MLP."""

    expert_names = (
        ExpertNames(
            router="router.proj", scales="router.per_expert_scale", experts="experts",
            joined="experts.gate_up_proj", joined_down="experts.down_proj", is_joined=True,
        ),
    )  # fmt: skip


class _Layer(SandwichLayer):
    """A layer that scales its result, and may have experts beside its MLP and an embedding of its own."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, index: int, ropes: RopeTables) -> None:
        super().__init__(config, weights, index, ropes)
        hidden, size = config.hidden_size, config.layer_input_size
        self.scale, self.first_input = _scalar(weights), index * size
        if self.experts is not None:
            self.make_mlp(weights)
            scale = ops.vector(weights.get("router.scale", hidden)) * np.float32(hidden**-0.5)
            self.router_norm = ops.NormWeight.rms(hidden, config.norm_eps, weight=scale)
            self.experts_norm = weights.norm("pre_feedforward_layernorm_2")
            self.experts_end = weights.norm("post_feedforward_layernorm_2")
            self.only_mlp_end = weights.norm("post_feedforward_layernorm_1")
        if size:
            self.input_gate = weights.linear("per_layer_input_gate", size, hidden, has_bias=False)
            self.input_projection = weights.linear("per_layer_projection", hidden, size, has_bias=False)
            self.input_norm = weights.norm("post_per_layer_input_norm")

    @property
    def products(self) -> Mapping[str, ops.LinearWeight]:
        """The products of the layer's own embedding."""
        if not self.config.layer_input_size:
            return {}
        return {"per_layer_input_gate": self.input_gate, "per_layer_projection": self.input_projection}

    def forward(self, x: ops.Value, cache: ops.Cache, /, inputs: ops.Value | None = None) -> ops.Value:
        """Add attention, MLP and the layer's columns of `inputs` to the residual, and scale it."""
        rows = ops.linear(self.attend(ops.norm(x, self.attention_norm), cache), self.output)
        x = ops.norm_add(rows, self.attention_end, x)
        rows = self._mlp(x)
        if inputs is None:
            return ops.norm_add(rows, self.mlp_end, x, scale=self.scale)
        x = ops.norm_add(rows, self.mlp_end, x)
        gate = ops.linear(ops.activation(x), self.input_gate)
        a = ops.act_mul(gate, inputs, self.config.activation, self.first_input)
        return ops.norm_add(ops.linear(a, self.input_projection), self.input_norm, x, scale=self.scale)

    def _mlp(self, x: ops.Value) -> ops.Value:
        """Return what MLP and experts compute of the residual, as rows."""
        rows = ops.linear(self.activate(ops.norm(x, self.mlp_norm)), self.down)
        if self.experts is None:
            return rows
        found = self.experts.rows(ops.norm(x, self.router_norm), ops.norm(x, self.experts_norm))
        return ops.norm_add(rows, self.only_mlp_end, ops.norm_in_place(found, self.experts_end))


def _scalar(weights: LayerWeights) -> float:
    """Return the factor on a layer's result; llama.cpp's files may lack it."""
    if weights.is_gguf and not weights.has("layer_scalar"):
        return 1.0
    return float(ops.vector(weights.get("layer_scalar", 1))[0])


class Gemma4(Decoder):
    """The decoder with embeddings for each layer, if the model has them.

    A token's input of a layer is the sum of two: its row in the layer's own table, and a part of a product of
    its first residual, normalised by layers.
    """

    layer_class = _Layer
    weights_class = _Weights
    checkpoint = CheckpointLayout(part="language_model")

    def __init__(
        self, config: ModelConfig, weights: Weights, arithmetic: ops.Arithmetic, max_positions: int
    ) -> None:
        super().__init__(config, weights, arithmetic, max_positions)
        size = config.layer_input_size
        if not size:
            return
        hidden, all_sizes = config.hidden_size, config.num_layers * size
        table = weights.get("model.embed_tokens_per_layer.weight", (config.vocab_size, all_sizes))
        self.input_table = ops.linear_weight(table, arithmetic, is_vocabulary=True)
        source = weights.get("model.per_layer_model_projection.weight", (all_sizes, hidden))
        self.input_projection = ops.linear_weight(source, arithmetic)
        # The product is divided by the root of `hidden` before the norm, and the sum of both parts by that of
        # 2 after it; factors before a norm only change its epsilon.
        norm = read_norm(
            config, weights, "model.per_layer_projection_norm", size, eps=config.norm_eps * hidden
        )
        self.input_norm = replace(norm, weight=norm.weight * np.float32(0.5**0.5))

    @property
    def products(self) -> Mapping[str, ops.LinearWeight]:
        """The product of which each layer's input is a part."""
        if not self.config.layer_input_size:
            return {}
        return {"model.per_layer_model_projection": self.input_projection}

    def forward(self, batch: ops.RecordedBatch, caches: Sequence[ops.Cache]) -> ops.Value:
        """Return the residual stream of a batch, as described in `Model.forward`."""
        x = self.add_images(self.embed(batch), 0)
        inputs = self._inputs(batch, x) if self.config.layer_input_size else None
        for layer, cache in zip(self.layers, caches, strict=True):
            assert isinstance(layer, _Layer)
            x = layer.forward(x, cache, inputs)
        return x

    def _inputs(self, batch: ops.RecordedBatch, x: ops.Value) -> ops.Value:
        """Return the inputs of all layers, rows [n_tokens, layers * size]."""
        rows = ops.norm_in_place(ops.linear(ops.activation(x), self.input_projection), self.input_norm)
        factor = (self.config.layer_input_size / 2) ** 0.5
        return ops.embed_add(batch, self.input_table, rows, factor)


_UNUSED = (
    "*.rotary_emb.*", "rope_freqs.weight", "model.vision_tower.*", "model.audio_tower.*",
    "model.embed_vision.*", "model.embed_audio.*",
)  # fmt: skip

FAMILIES = tuple(
    Family(
        architecture,
        "gemma4",
        read_gemma4,
        Gemma4,
        gguf_names={**GEMMA4_NAMES, "rope_freqs": None},  # the configuration says what it does
        unused=_UNUSED,
    )
    for architecture in ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")
)
