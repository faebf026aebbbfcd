"""InternLM 2, EXAONE 3, MiniCPM 1, 2 and 4, Baichuan, Orion, Refact, Qwen 1 and DeepSeek MoE.

Most of their checkpoints come with code of their own, which is not run; their GGUF files need none of it.
"""

from __future__ import annotations

import math
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_experts import everywhere, read_experts, read_scale, with_experts

# Baichuan's files do not say which positions they use. As in llama.cpp, the number of layers does: that of
# 7B, whose heads rotate, or of 13B, which has linear biases.
_LAYERS_WITH_ROPE, _LAYERS_WITH_SLOPES = 32, 40


def read_plain(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of a model that computes what Llama does."""
    sizes = _read_sizes(reader)
    return ModelConfig(
        architecture=architecture, layers=read_layers(reader, sizes), **_biases(reader), **sizes
    )


def read_minicpm(reader: Reader, architecture: str) -> ModelConfig:
    """Read MiniCPM's configuration; the first files lack the factors, which are those of MiniCPM 1 and 2.

    Source: Hu et al., MiniCPM, arXiv 2404.06395, section 3.
    """
    sizes = read_sizes(reader)
    width, depth = sizes["hidden_size"], num_layers(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        embedding_factor=reader.number("embedding_multiplier", 12.0),
        residual_factor=reader.number("residual_multiplier", 1.4 / math.sqrt(depth)),
        logits_scale=1.0 / (reader.number("logits_scaling", 0.0) or max(width, 1) / 256),
        **_biases(reader),
        **sizes,
    )


def read_baichuan(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of 7B or 13B."""
    sizes, count = read_sizes(reader), num_layers(reader)
    check(
        count in (_LAYERS_WITH_ROPE, _LAYERS_WITH_SLOPES),
        f"Baichuan's GGUF files are read with {_LAYERS_WITH_ROPE} layers, which have rotary positions, or "
        f"{_LAYERS_WITH_SLOPES}, which have linear biases, not with {count}",
    )
    has_slopes = count == _LAYERS_WITH_SLOPES
    layers = _sloped(reader, sizes) if has_slopes else read_layers(reader, sizes)
    return ModelConfig(architecture=architecture, layers=layers, **sizes)


def read_refact(reader: Reader, architecture: str) -> ModelConfig:
    """Read Refact's configuration: linear biases, and one KV head."""
    sizes = _read_sizes(reader)
    return ModelConfig(architecture=architecture, layers=_sloped(reader, sizes), **_biases(reader), **sizes)


def read_orion(reader: Reader, architecture: str) -> ModelConfig:
    """Read Orion's configuration: Llama with LayerNorm."""
    sizes = read_sizes(reader, eps="layer_norm_eps", default_eps=1e-5)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        has_layer_norm=True,
        has_norm_bias=True,
        **sizes,
    )


def read_qwen(reader: Reader, architecture: str) -> ModelConfig:
    """Read Qwen 1's configuration, which counts the gate and the up product as one."""
    sizes = _read_sizes(reader)
    check(
        sizes["intermediate_size"] % 2 == 0,
        f"feed_forward_length must be even, got {sizes['intermediate_size']}",
    )
    sizes["intermediate_size"] //= 2
    return ModelConfig(
        architecture=architecture, layers=read_layers(reader, sizes), **_biases(reader), **sizes
    )


def read_deepseek(reader: Reader, architecture: str) -> ModelConfig:
    """Read the first DeepSeek MoE's configuration: weights of experts are their softmax, as it is.

    Source: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 3.
    """
    sizes = read_sizes(reader)
    size = reader.integer("moe_intermediate_size")
    experts = read_experts(
        reader, count="n_routed_experts", top_k="num_experts_per_tok", scale=read_scale(reader),
        shared_size=size * reader.integer("n_shared_experts"),
    )  # fmt: skip
    layers = read_layers(reader, sizes)
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, experts, everywhere),
        **_biases(reader),
        **sizes,
    )


def _read_sizes(reader: Reader) -> dict[str, Any]:
    """Read sizes; the norm's epsilon may have the name of a LayerNorm's, which checkpoints of these have."""
    epsilon = reader.get("layer_norm_eps")
    if reader.get("rms_norm_eps") is None and epsilon is not None:
        reader.replace("rms_norm_eps", epsilon)
    return read_sizes(reader)


def _biases(reader: Reader) -> dict[str, Any]:
    """Read which products have biases, from tensors: all these models' files may have them in llama.cpp."""
    return read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias")


def _sloped(reader: Reader, sizes: dict[str, Any]) -> tuple[LayerSpec, ...]:
    """Return layers with linear biases; keys of rotary positions, which files may have, say nothing."""
    reader.ignore("rope.dimension_count", "rope_theta")
    slopes = alibi_slopes(sizes["num_heads"])
    return (LayerSpec(None, None, sizes["head_dim"] ** -0.5, slopes=slopes),) * num_layers(reader)


FAMILIES = tuple(
    Family(name, gguf_name, read, Decoder, is_rotary_permuted=is_permuted, is_gguf_only=True)
    for name, gguf_name, read, is_permuted in (
        ("InternLM2ForCausalLM", "internlm2", read_plain, True),
        ("ExaoneForCausalLM", "exaone", read_plain, False),
        ("MiniCPMForCausalLM", "minicpm", read_minicpm, True),
        ("BaichuanForCausalLM", "baichuan", read_baichuan, True),
        ("OrionForCausalLM", "orion", read_orion, False),
        ("GPTRefactForCausalLM", "refact", read_refact, False),
        ("QWenLMHeadModel", "qwen", read_qwen, False),
        ("DeepseekForCausalLM", "deepseek", read_deepseek, True),
    )
)
