"""GLM 4.5 to 4.7 and dots.llm1: standard decoders with experts as in DeepSeek V3."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import (
    leave_out_drafting,
    num_layers,
    read_biases,
    read_layers,
    read_sizes,
    read_windows,
)
from tgi_asgi.models.reading_experts import after_first_dense, read_corrected, with_experts


def read_glm4_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read GLM 4.5's configuration: half of each head rotates; a further layer only drafts."""
    reader.defaults(
        rms_norm_eps=1e-5, partial_rotary_factor=0.5, num_key_value_heads=8, moe_intermediate_size=1408,
        n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    if reader.is_gguf:
        leave_out_drafting(reader)
    sizes = read_sizes(reader)
    has_norm = reader.flag("use_qk_norm", reader.is_gguf and "blk.0.attn_q_norm.weight" in reader.tensors)
    layers = read_layers(reader, sizes, has_partial_rotary=True)
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, read_corrected(reader), after_first_dense(reader)),
        has_qk_norm=has_norm,
        **read_biases(reader, qkv="attention_bias"),
        **sizes,
    )


def read_dots1(reader: Reader, architecture: str) -> ModelConfig:
    """Read dots.llm1's configuration: norms per head, and a window from `max_window_layers` on."""
    reader.defaults(num_key_value_heads=32, sliding_window=4096, norm_topk_prob=False)
    if not reader.is_gguf:
        reader.replace("use_sliding_window", True)  # regardless of the file: `layer_types` decides
    sizes = read_sizes(reader)
    first = reader.integer("max_window_layers", 62)
    where = [index >= first for index in range(num_layers(reader))]
    layers = read_layers(reader, sizes, windows=read_windows(reader, where))
    experts = read_corrected(reader)
    check_computed(
        reader.is_gguf or experts.shared_size > 0, "dots.llm1 without shared experts is not supported"
    )
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, experts, after_first_dense(reader)),
        has_qk_norm=True,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


FAMILIES = (
    Family(
        "Glm4MoeForCausalLM",
        "glm4moe",
        read_glm4_moe,
        Decoder,
        gguf_names={"post_attention_layernorm": "post_attention_norm"},
        unused=("model.layers.{num_layers}.*", "blk.{num_layers}.*"),
    ),
    Family("Dots1ForCausalLM", "dots1", read_dots1, Decoder),
)
