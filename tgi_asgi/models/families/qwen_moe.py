"""Qwen 2 and 3 with experts; Qwen 2's layers also have a shared expert, scaled by a gate per token."""

from __future__ import annotations

from tgi_asgi.models.checkpoint import CheckpointLayout, shared_expert_names
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.families.qwen import IMAGE_KEYS
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import (
    num_layers,
    read_biases,
    read_layers,
    read_sizes,
    read_window,
    read_windows,
)
from tgi_asgi.models.reading_experts import read_experts, read_sparse_steps, with_experts


def read_qwen2_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of Qwen 1.5 and 2; even layers below `max_window_layers` have the window."""
    reader.defaults(
        num_key_value_heads=16, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        num_experts=60, num_experts_per_tok=4, sliding_window=4096, qkv_bias=True,
    )  # fmt: skip
    sizes = read_sizes(reader)
    if reader.is_gguf:
        _complete(reader, sizes["intermediate_size"])
    last = reader.integer("max_window_layers", 28)
    where = [index % 2 == 0 and index < last for index in range(num_layers(reader))]
    layers = read_layers(reader, sizes, windows=read_windows(reader, where))
    experts = read_experts(
        reader, count="num_experts", top_k="num_experts_per_tok",
        is_renormalised=reader.flag("norm_topk_prob", False),
        shared_size=reader.integer("shared_expert_intermediate_size"), has_shared_gate=True,
    )  # fmt: skip
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, experts, read_sparse_steps(reader)),
        **read_biases(reader, qkv="qkv_bias"),
        **sizes,
    )


def _complete(reader: Reader, size: int) -> None:
    """Set the sizes of experts that the first GGUF files of Qwen 1.5 lack, as llama.cpp does.

    Args:
        size: The file's `feed_forward_length`: that of the shared expert, or of all that a token uses.
    """
    top_k = reader.integer("num_experts_per_tok")
    for key, found in (
        ("moe_intermediate_size", size // max(top_k, 1)),
        ("shared_expert_intermediate_size", size),
    ):
        if reader.get(key) is None:
            reader.replace(key, found)


def read_qwen3_moe(reader: Reader, architecture: str) -> ModelConfig:
    """Read Qwen 3's configuration; llama.cpp renormalises weights, whatever the original checkpoint said."""
    reader.ignore(*IMAGE_KEYS)
    reader.rename(num_experts=("num_local_experts",))
    reader.defaults(
        num_key_value_heads=4, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        sliding_window=4096,
    )  # fmt: skip
    sizes = read_sizes(reader)
    has_window = reader.flag("use_sliding_window", False)
    windows = read_window(reader) if has_window else [None] * num_layers(reader)
    reader.ignore("sliding_window", "max_window_layers", "layer_types")
    experts = read_experts(
        reader, count="num_experts", top_k="num_experts_per_tok",
        is_renormalised=reader.flag("norm_topk_prob", reader.is_gguf),
    )  # fmt: skip
    layers = read_layers(reader, sizes, windows=windows)
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, layers, experts, read_sparse_steps(reader)),
        has_qk_norm=True,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


class Qwen2Moe(Decoder):
    """The decoder with Qwen's name of the shared expert, which is in the singular."""

    checkpoint = CheckpointLayout(names=shared_expert_names("mlp.shared_expert"))


FAMILIES = (
    Family("Qwen2MoeForCausalLM", "qwen2moe", read_qwen2_moe, Qwen2Moe),
    Family("Qwen3MoeForCausalLM", "qwen3moe", read_qwen3_moe, Decoder, other_gguf_names=("qwen3vlmoe",)),
)
