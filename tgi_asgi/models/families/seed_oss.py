"""ByteDance's Seed-OSS: Llama with biases of q, k and v."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_seed_oss(reader: Reader, architecture: str) -> ModelConfig:
    """Read Seed-OSS's configuration, which has separate bias keys for attention's inputs and output."""
    reader.defaults(num_key_value_heads=8, head_dim=128, attention_bias=True)
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        **read_biases(reader, qkv="attention_bias", output="attention_out_bias", mlp="mlp_bias"),
        **sizes,
    )


FAMILIES = (
    Family(
        "SeedOssForCausalLM", "seed_oss", read_seed_oss, Decoder,
        gguf_names={"post_attention_layernorm": "post_attention_norm"},
    ),
)  # fmt: skip
