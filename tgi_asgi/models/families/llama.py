"""Llama, and all models that share its code (SmolLM, Yi, dense DeepSeek models, XVERSE, Aquila 2)."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes, read_window
from tgi_asgi.models.reading_experts import everywhere, read_mixtral_experts, with_experts

# By model type, what a file's missing keys mean where `transformers` has a configuration of its own for
# Llama's class.
_DEFAULTS: dict[str, dict[str, float]] = {
    "internlm3": {
        "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
    },
    "iquestcoder": {
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    },
}  # fmt: skip


def read_llama(reader: Reader, architecture: str) -> ModelConfig:
    """Read Llama's configuration: biases as the file says, and no window even if config.json has one."""
    # A GGUF file of this architecture may be Mistral's, which has a window.
    windows = read_window(reader) if reader.is_gguf else None
    reader.defaults(**_DEFAULTS.get(str(reader.get("model_type")), {}))
    reader.ignore("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    sizes = read_sizes(reader)
    layers = read_layers(reader, sizes, windows=windows)
    if reader.is_gguf and reader.integer("num_experts", 0):  # Mixtral's, which llama.cpp also calls llama
        layers = with_experts(reader, layers, read_mixtral_experts(reader), everywhere)
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


# The others have classes of their own, which compute the same.
FAMILIES = (
    Family("LlamaForCausalLM", "llama", read_llama, Decoder, is_rotary_permuted=True),
    Family("XverseForCausalLM", None, read_llama, Decoder),
    Family("AquilaForCausalLM", None, read_llama, Decoder),
)
