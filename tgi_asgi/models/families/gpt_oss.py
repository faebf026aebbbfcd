"""OpenAI's gpt-oss: attention sinks, a window in every other layer, experts with biases and clamped gates.

Source: gpt-oss model card, arXiv 2508.10925.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tgi_asgi import ops
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.experts import ExpertNames, ExpertProducts, Matrices, each_expert, make_products, stack
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import ExpertsSpec, LayerSpec
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes, read_windows
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts
from tgi_asgi.models.reading_rope import default_rope
from tgi_asgi.ops.arrays import Floats

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def read_gpt_oss(reader: Reader, architecture: str) -> ModelConfig:
    """Read gpt-oss's configuration; even-numbered layers have the window. Its gates are silu's, always."""
    reader.drop("hidden_act")
    reader.defaults(
        rms_norm_eps=1e-5, head_dim=64, num_key_value_heads=8, sliding_window=128, attention_bias=True,
        rope_theta=150000.0, num_local_experts=128, num_experts_per_tok=4,
    )  # fmt: skip
    default_rope(reader, _YARN)
    if not reader.is_gguf:
        reader.replace("use_sliding_window", True)  # regardless of the file: `layer_types` decides
    sizes = read_sizes(reader)
    reader.ignore("initial_context_length", "experts_per_token", "swiglu_alpha", "swiglu_limit")
    where = [index % 2 == 0 for index in range(num_layers(reader))]
    if reader.is_gguf:
        window = reader.integer("sliding_window")
        windows = [window if has else None for has in where]
    else:
        windows = read_windows(reader, where)
    clamp = (reader.number("swiglu_limit", 7.0), reader.number("swiglu_alpha", 1.702), 1.0)
    experts = read_experts(
        reader, count="num_local_experts", top_k="num_experts_per_tok", size="intermediate_size",
        is_renormalised=True, has_bias=True, clamp=clamp,
    )  # fmt: skip
    reader.ignore("moe_intermediate_size")
    layers = read_layers(reader, sizes, windows=windows)
    layers = tuple(replace(layer, has_sinks=True) for layer in layers)
    if reader.is_gguf:
        layers = tuple(map(_untruncated, layers))
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, experts, everywhere),
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


def _untruncated(layer: LayerSpec) -> LayerSpec:
    """Return a layer whose YaRN does not round its range of pairs, which GGUF files do not record."""
    rope = layer.rope
    if rope is None or rope.scaling is None:
        return layer
    return replace(layer, rope=replace(rope, scaling=replace(rope.scaling, is_truncated=False)))


class GptOssWeights(LayerWeights):
    """A layer whose experts are MXFP4, or floats with columns outermost; gate and up rows alternate.

    In files of llama.cpp and of tools that quantise, gate, up and down are apart.
    """

    def sinks(self) -> Floats:
        """Return the heads' attention sinks [num_heads] float32."""
        name = "self_attn.sinks"
        return ops.vector(self.get(name if self.has(name) else f"{name}.weight", self.config.num_heads))

    def expert_products(self, names: ExpertNames, spec: ExpertsSpec) -> Iterator[ExpertProducts]:
        """Yield gate and up, and down, of each expert in turn."""
        is_apart = self.is_gguf or self.has("mlp.experts.0.gate_proj.weight")
        read = self._apart if is_apart else self._of_openai
        for matrices, biases in read(spec):
            yield make_products(self, matrices, biases)

    def _apart(self, spec: ExpertsSpec) -> Iterator[tuple[Matrices, Matrices]]:
        """Yield each expert's matrices and biases as llama.cpp and tools that quantise write them."""
        hidden, inner, count = self.config.hidden_size, spec.intermediate_size, spec.num_experts
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}

        def read(name: str, *shape: int) -> Iterator[ops.WeightSource]:
            return each_expert(self, "mlp.experts", name, count, *shape)

        matrices = [read(f"{name}.weight", *shape) for name, shape in shapes.items()]
        biases = [read(f"{name}.bias", rows) for name, (rows, _) in shapes.items()]
        yield from zip(zip(*matrices, strict=True), zip(*biases, strict=True), strict=True)

    def _of_openai(self, spec: ExpertsSpec) -> Iterator[tuple[Matrices, Matrices]]:
        hidden, inner, count = self.config.hidden_size, spec.intermediate_size, spec.num_experts
        both = stack(self, "mlp.experts.gate_up_proj_bias", count, 2 * inner)
        of_down = stack(self, "mlp.experts.down_proj_bias", count, hidden)
        gate_ups = self._matrices("gate_up_proj", count, 2 * inner, hidden)
        downs = self._matrices("down_proj", count, hidden, inner)
        for gate_up, down, of_gate_up, bias_of_down in zip(gate_ups, downs, both, of_down, strict=True):
            gate, up = (ops.every_nth_row(gate_up, first, 2) for first in (0, 1))
            bias = ops.vector(of_gate_up)
            of_gate, of_up = (ops.from_floats(bias[first::2]) for first in (0, 1))
            yield (gate, up, down), (of_gate, of_up, bias_of_down)

    def _matrices(self, name: str, count: int, rows: int, columns: int) -> Iterator[ops.WeightSource]:
        """Yield each expert's matrix [rows, columns]."""
        if self.has(f"mlp.experts.0.{name}.weight"):
            for index in range(count):
                yield self.get(f"mlp.experts.{index}.{name}.weight", rows, columns)
            return
        for turned in stack(self, f"mlp.experts.{name}", count, columns, rows):
            yield turned.transposed()


class GptOss(Decoder):
    """The decoder with gpt-oss's weights."""

    weights_class = GptOssWeights
    checkpoint = CheckpointLayout(names={"mlp.gate": "mlp.router"})


_GGUF_NAMES = {
    "self_attn.sinks": "attn_sinks",
    "post_attention_layernorm": "post_attention_norm",
}
FAMILIES = (Family("GptOssForCausalLM", "gpt-oss", read_gpt_oss, GptOss, gguf_names=_GGUF_NAMES),)
