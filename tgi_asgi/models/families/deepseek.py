"""DeepSeek V2 and V3, and GLM 4.7 Flash: latent attention, and grouped experts after a few dense layers.

Sources: DeepSeek-AI, DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437.
"""

from __future__ import annotations

from collections.abc import Callable

from tgi_asgi.errors import check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.latent_spec import LatentSpec
from tgi_asgi.models.layer_spec import ExpertsSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import check_layer_types, leave_out_drafting, num_layers, read_biases
from tgi_asgi.models.reading_experts import (
    SIGMOID,
    SOFTMAX,
    after_first_dense,
    has_corrections,
    read_corrected,
    read_experts,
    read_scale,
    with_experts,
)
from tgi_asgi.models.reading_latent import (
    latent_layers,
    read_latent,
    read_latent_rope,
    read_latent_sizes,
)


def read_deepseek_v2(reader: Reader, architecture: str) -> ModelConfig:
    """Read V2's configuration, and GGUF files of all three, which share one name."""
    if reader.is_gguf:
        return _read_gguf(reader, architecture)
    reader.defaults(
        kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=64, n_shared_experts=2, moe_intermediate_size=1407, first_k_dense_replace=0,
        topk_method="greedy",
    )  # fmt: skip
    reader.require(mlp_bias=False)
    is_renormalised = reader.flag("norm_topk_prob", False)
    check_computed(not is_renormalised, "norm_topk_prob is true, which the code of transformers ignores")
    method, scoring = reader.get("topk_method"), reader.get("scoring_func")
    check(
        method in ("greedy", "group_limited_greedy") and scoring in (None, "softmax"),
        f"routing by {method} of {scoring} is not supported",
    )
    _check_every_layer(reader)
    experts = _read_softmax(reader, has_groups=method == "group_limited_greedy")
    reader.ignore("n_group", "topk_group")
    return _make(
        reader, architecture, read_latent(reader, is_interleaved=True), experts, after_first_dense(reader)
    )


def read_deepseek_v3(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of V3 and R1, whose files have one further layer that only drafts."""
    reader.defaults(
        kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5,
    )  # fmt: skip
    _check_corrected(reader)
    _check_every_layer(reader)
    latent = read_latent(reader, is_interleaved=reader.flag("rope_interleave", True))
    return _make(reader, architecture, latent, read_corrected(reader), after_first_dense(reader))


def read_glm4_moe_lite(reader: Reader, architecture: str) -> ModelConfig:
    """Read GLM 4.7 Flash's configuration, in which a list names the dense layers."""
    reader.defaults(
        kv_lora_rank=512, q_lora_rank=768, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=1536,
        routed_scaling_factor=1.8, rms_norm_eps=1e-5, first_k_dense_replace=1,
    )  # fmt: skip
    _check_corrected(reader)
    latent = read_latent(reader, is_interleaved=reader.flag("rope_interleave", True))
    kinds, where = reader.get("mlp_layer_types"), after_first_dense(reader)
    if kinds is not None:
        found = check_layer_types(kinds, num_layers(reader), ("dense", "sparse"), key="mlp_layer_types")
        where = [kind == "sparse" for kind in found].__getitem__
    return _make(reader, architecture, latent, read_corrected(reader), where)


def _read_gguf(reader: Reader, architecture: str) -> ModelConfig:
    """Read a GGUF file of any of the three; the routing identifies the model.

    Its layer count includes the layer that drafts. Files written before llama.cpp recorded the scoring
    function are V2's.
    """
    leave_out_drafting(reader)
    reader.require(**{"rope.scaling.attn_factor": 1.0})  # llama.cpp also multiplies scores by its square
    latent = read_latent(reader, is_interleaved=True)
    kind = reader.integer("expert_gating_func", SIGMOID if has_corrections(reader) else SOFTMAX)
    check(kind in (SOFTMAX, SIGMOID), f"expert_gating_func {kind} is not supported, only 1 and 2 are")
    if kind == SOFTMAX:
        is_renormalised = reader.flag("norm_topk_prob", False)
        check(not is_renormalised, "expert_weights_norm is not supported for softmax routing")
        experts = _read_softmax(reader, has_groups=True)
    else:
        experts = read_corrected(reader)
    return _make(reader, architecture, latent, experts, after_first_dense(reader))


def _read_softmax(reader: Reader, *, has_groups: bool) -> ExpertsSpec:
    """Read experts as in V2: a group's score is that of its best expert, and weights are only scaled."""
    size, groups = reader.integer("moe_intermediate_size"), reader.integer("n_group", 1)
    return read_experts(
        reader, count="n_routed_experts", top_k="num_experts_per_tok",
        num_groups=groups if has_groups else 1,
        top_groups=reader.integer("topk_group", groups) if has_groups else 1,
        scale=read_scale(reader),
        shared_size=size * reader.integer("n_shared_experts", 0),
    )  # fmt: skip


def _check_corrected(reader: Reader) -> None:
    method, scoring = reader.get("topk_method"), reader.get("scoring_func")
    check(
        method in (None, "noaux_tc") and scoring in (None, "sigmoid"),
        f"routing by {method} of {scoring} is not supported",
    )


def _check_every_layer(reader: Reader) -> None:
    step = reader.integer("moe_layer_freq", 1)
    check(step == 1, f"moe_layer_freq {step} is not supported, only 1 is")


def _make(
    reader: Reader,
    architecture: str,
    latent: LatentSpec,
    experts: ExpertsSpec,
    where: Callable[[int], bool],
) -> ModelConfig:
    sizes = read_latent_sizes(reader, latent)
    layers = latent_layers(reader, latent, *read_latent_rope(reader, latent))
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, experts, where),
        **read_biases(reader, output="attention_bias"),
        **sizes,
    )


_DRAFTING = ("model.layers.{num_layers}.*", "blk.{num_layers}.*", "*.rotary_emb.inv_freq")
FAMILIES = tuple(
    Family(name, "deepseek2", read, Decoder, unused=_DRAFTING)
    for name, read in (
        ("DeepseekV2ForCausalLM", read_deepseek_v2),
        ("DeepseekV3ForCausalLM", read_deepseek_v3),
        ("Glm4MoeLiteForCausalLM", read_glm4_moe_lite),
    )
)
