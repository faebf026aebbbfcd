"""Tencent's dense Hunyuan: Llama with query and key norms after the rotation."""

from __future__ import annotations

from functools import partial
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_hunyuan(reader: Reader, architecture: str) -> ModelConfig:
    """Read Hunyuan's configuration; files have some keys that only Tencent's own code reads."""
    reader.defaults(rms_norm_eps=1e-5)
    reader.require(use_qk_norm=True, use_cla=False)
    check_computed(reader.get("norm_type") in (None, "rms", "hf_rms"), "only RMSNorm is supported")
    reader.ignore("cla_share_factor")
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, edit_rope=partial(_stretch_base, sizes["head_dim"])),
        has_qk_norm=True,
        has_late_qk_norm=True,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


def _stretch_base(head_dim: int, values: dict[str, Any]) -> None:
    """Set the base: "dynamic" with an alpha stretches it once, for any context."""
    kind = values.get("rope_type") or values.get("type")
    if kind == "dynamic" and values.get("alpha"):
        rope = Reader.of_json(values)
        alpha = rope.number("alpha")
        check(0 < alpha <= 1e6, f"alpha must be positive and at most 1e6, got {alpha}")
        check(head_dim > 2, f"dynamic scaling needs more than 2 rotary dims, got {head_dim}")
        base = rope.number("rope_theta", 10000.0) * alpha ** (head_dim / (head_dim - 2))
        values.clear()
        values["rope_theta"] = base
    values.pop("alpha", None)


NAMES = {"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}


class Hunyuan(Decoder):
    """The decoder with Hunyuan's norm names."""

    checkpoint = CheckpointLayout(names=NAMES)


FAMILIES = (Family("HunYuanDenseV1ForCausalLM", "hunyuan-dense", read_hunyuan, Hunyuan),)
