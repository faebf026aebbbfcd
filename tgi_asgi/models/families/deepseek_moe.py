"""The first DeepSeek MoE: Llama with experts after a few dense layers.

Source: Dai et al., DeepSeekMoE, arXiv 2401.06066, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

from tgi_asgi.errors import check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_experts import (
    SOFTMAX,
    after_first_dense,
    everywhere,
    read_experts,
    read_scale,
    with_experts,
)


def read_deepseek_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration; experts' weights are their part of all's, unless `norm_topk_prob` is true."""
    sizes = read_sizes(reader)
    size = reader.integer("moe_intermediate_size")
    reader.require(scoring_func="softmax", expert_gating_func=SOFTMAX)
    experts = read_experts(
        reader, count="n_routed_experts", top_k="num_experts_per_tok", scale=read_scale(reader),
        shared_size=size * reader.integer("n_shared_experts"),
        is_renormalised=reader.flag("norm_topk_prob", False), eps=1e-20,
    )  # fmt: skip
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, read_layers(reader, sizes), experts, _where(reader)),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


def _where(reader: Reader) -> Callable[[int], bool]:
    """Return which layers have experts: each `moe_layer_freq`-th after the first dense ones."""
    if reader.is_gguf:
        return everywhere
    step, is_after = reader.integer("moe_layer_freq", 1), after_first_dense(reader)
    check(step >= 1, f"moe_layer_freq must be positive, got {step}")
    return lambda index: is_after(index) and index % step == 0


FAMILIES = (Family("DeepseekForCausalLM", "deepseek", read_deepseek_moe, Decoder, is_rotary_permuted=True),)
