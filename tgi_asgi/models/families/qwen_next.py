"""Qwen3-Next and Qwen3.5, with and without experts: most layers have a gated delta net instead of attention.

Norms add 1 to their weights, and heads' results are multiplied by the sigmoid of gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout, shared_expert_names
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import (
    check_layer_types,
    leave_out_drafting,
    num_layers,
    read_layers,
    read_sizes,
    text_of,
)
from tgi_asgi.models.reading_experts import everywhere, read_experts, read_sparse_steps, with_experts
from tgi_asgi.models.recurrent_specs import GatedDeltaSpec

ReadConfig = Callable[[Reader, str], ModelConfig]
_KINDS = ("linear_attention", "full_attention")
_DELTA_SIZES = {  # with defaults for keys that a config.json lacks
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def read_qwen3_next(reader: Reader, architecture: str) -> ModelConfig:
    """Read Qwen3-Next's configuration."""
    reader.defaults(
        num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
        shared_expert_intermediate_size=512, num_key_value_heads=2,
    )  # fmt: skip
    config = _read(reader, architecture)
    where = everywhere if reader.is_gguf else read_sparse_steps(reader)
    is_renormalised = reader.flag("norm_topk_prob", True)
    return _with_experts(reader, config, where=where, is_renormalised=is_renormalised)


def read_qwen3_5(reader: Reader, architecture: str) -> ModelConfig:
    """Read Qwen3.5's configuration."""
    with text_of(reader) as text:
        text.defaults(num_key_value_heads=4)
        return _tiled(text, _read(text, architecture))


def read_qwen3_5_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of Qwen3.5 with experts; all layers have them, so no MLP size is used."""
    with text_of(reader) as text:
        text.defaults(
            num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512,
            shared_expert_intermediate_size=512, num_key_value_heads=2,
        )  # fmt: skip
        text.replace("intermediate_size", text.integer("shared_expert_intermediate_size"))
        config = _tiled(text, _read(text, architecture))
        return _with_experts(text, config, where=everywhere, is_renormalised=True)


def _with_experts(
    reader: Reader, config: ModelConfig, *, where: Callable[[int], bool], is_renormalised: bool
) -> ModelConfig:
    experts = read_experts(
        reader, count="num_experts", top_k="num_experts_per_tok", is_renormalised=is_renormalised,
        shared_size=reader.integer("shared_expert_intermediate_size"), has_shared_gate=True,
    )  # fmt: skip
    return replace(config, layers=with_experts(reader, config.layers, experts, where))


def _read(reader: Reader, architecture: str) -> ModelConfig:
    reader.defaults(head_dim=256, partial_rotary_factor=0.25)
    if reader.is_gguf:
        leave_out_drafting(reader)
        reader.ignore("rope.dimension_sections")
    reader.require(attention_bias=False, attn_output_gate=True)
    kinds = _read_kinds(reader)
    sizes = read_sizes(reader)
    check_computed(sizes["activation"] == "silu", f"hidden_act must be silu, got {sizes['activation']}")
    delta = _read_delta(reader)
    layers = read_layers(reader, sizes, has_partial_rotary=True, edit_rope=_leave_out_images)
    return ModelConfig(
        architecture=architecture,
        layers=tuple(
            replace(layer, rope=None, recurrent=delta) if kind == _KINDS[0] else layer
            for kind, layer in zip(kinds, layers, strict=True)
        ),
        has_qk_norm=True,
        has_output_gate=True,
        norm_offset=0.0 if reader.is_gguf else 1.0,  # llama.cpp's converter has added it
        **sizes,
    )


def _leave_out_images(values: dict[str, Any]) -> None:
    """Leave out how images are positioned: positions of text are equal in all three sections."""
    for key in ("mrope_section", "mrope_interleaved"):
        values.pop(key, None)


def _read_kinds(reader: Reader) -> list[str]:
    """Return each layer's kind, from a GGUF file's tensors, a list, or the interval of attention layers."""
    count = num_layers(reader)
    if reader.is_gguf:
        reader.ignore("attention.recurrent_layers", "full_attention_interval")
        return [_KINDS[f"blk.{index}.ssm_conv1d.weight" not in reader.tensors] for index in range(count)]
    kinds, period = reader.get("layer_types"), reader.integer("full_attention_interval", 4)
    check(period >= 1, f"full_attention_interval must be positive, got {period}")
    if kinds is None:
        return [_KINDS[(index + 1) % period == 0] for index in range(count)]
    return check_layer_types(kinds, count, _KINDS)


def _read_delta(reader: Reader) -> GatedDeltaSpec:
    if reader.is_gguf:
        heads, width = reader.integer("ssm.time_step_rank"), reader.integer("ssm.inner_size")
        check(heads > 0 and width > 0, f"the heads of states must be positive: {heads} of {width} channels")
        others = ("ssm.group_count", "ssm.state_size", "ssm.conv_kernel")
        sizes = [heads, width // heads, *(reader.integer(key) for key in others)]
    else:
        sizes = [reader.integer(key, given) for key, given in _DELTA_SIZES.items()]
    heads, head_dim, key_heads, key_dim, taps = sizes
    return GatedDeltaSpec(heads, head_dim, key_heads, key_dim, taps)


def _tiled(reader: Reader, config: ModelConfig) -> ModelConfig:
    """Set the head order of llama.cpp's Qwen3.5 files, which interleave the heads of different keys."""
    if not reader.is_gguf:
        return config
    return replace(config, layers=tuple(map(_with_tiles, config.layers)))


def _with_tiles(layer: LayerSpec) -> LayerSpec:
    delta = layer.recurrent
    if not isinstance(delta, GatedDeltaSpec) or delta.num_heads == delta.num_key_heads:
        return layer
    return replace(layer, recurrent=replace(delta, is_tiled=True))


class QwenNext(Decoder):
    """The decoder with Qwen's name of the shared expert; vision models nest weights one name deeper."""

    checkpoint = CheckpointLayout(names=shared_expert_names("mlp.shared_expert"), part="language_model")


_DELTA = {
    f"linear_attn.{name}": stored
    for name, stored in {
        "in_proj_qkvz": "ssm_in",  # in the first files
        "in_proj_qkv": "attn_qkv",
        "in_proj_z": "attn_gate",
        "in_proj_ba": "ssm_ba",
        "in_proj_b": "ssm_beta",
        "in_proj_a": "ssm_alpha",
        "conv1d": "ssm_conv1d",
        "dt": "ssm_dt",
        "A": "ssm_a",
        "norm": "ssm_norm",
        "out_proj": "ssm_out",
    }.items()
}
_GGUF_NAMES = {
    **_DELTA,
    "post_attention_layernorm": "post_attention_norm",
}
# Weights used only for drafting or for images.
_UNUSED = ("mtp.*", "model.mtp.*", "model.visual.*", "blk.{num_layers}.*")


def _family(architecture: str, gguf_name: str, read_config: ReadConfig) -> Family:
    return Family(
        architecture,
        gguf_name,
        read_config,
        QwenNext,
        gguf_names=_GGUF_NAMES,
        unused=_UNUSED,
    )


FAMILIES = (
    _family("Qwen3NextForCausalLM", "qwen3next", read_qwen3_next),
    _family("Qwen3_5ForCausalLM", "qwen35", read_qwen3_5),
    _family("Qwen3_5ForConditionalGeneration", "qwen35", read_qwen3_5),
    _family("Qwen3_5MoeForCausalLM", "qwen35moe", read_qwen3_5_moe),
    _family("Qwen3_5MoeForConditionalGeneration", "qwen35moe", read_qwen3_5_moe),
)
