"""Tencent's Hunyuan with experts (A13B): the dense model with experts and one MLP shared by all tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tgi_asgi.models.checkpoint import CheckpointLayout, shared_expert_names
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.families.hunyuan import NAMES, read_hunyuan
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts

# Each is one number, or a list with the same number for every layer.
_LISTED = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")


def read_hunyuan_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read Hunyuan's configuration; experts and the shared expert have `intermediate_size`."""
    reader.rename(moe_topk=("num_experts_per_tok",), num_experts=("num_local_experts",))
    reader.defaults(num_experts=1, moe_topk=1)
    for key in () if reader.is_gguf else _LISTED:
        reader.replace(key, _only(key, reader.get(key)))
    config = read_hunyuan(reader, architecture)
    size = config.intermediate_size
    inner = reader.integer("moe_intermediate_size", size)
    check_computed(inner == size, f"moe_intermediate_size must be intermediate_size, {size}, got {inner}")
    reader.require(num_shared_expert=1, norm_topk_prob=True)
    reader.ignore("shared_expert_intermediate_size")
    experts = read_experts(
        reader, count="num_experts", top_k="moe_topk", size="intermediate_size", is_renormalised=True,
        shared_size=size,
    )  # fmt: skip
    return replace(config, layers=with_experts(reader, config.layers, experts, everywhere))


def _only(key: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    is_one = len(value) > 0 and all(each == value[0] for each in value)
    check_computed(is_one, f"`{key}` must be the same in all layers, got {str(value)[:100]}")
    return value[0]


class HunyuanMoe(Decoder):
    """The decoder with Hunyuan's names of norms, router and shared expert."""

    checkpoint = CheckpointLayout(
        names={**NAMES, "mlp.gate": "mlp.gate.wg", **shared_expert_names("mlp.shared_mlp")}
    )


FAMILIES = (Family("HunYuanMoEV1ForCausalLM", "hunyuan-moe", read_hunyuan_moe, HunyuanMoe),)
