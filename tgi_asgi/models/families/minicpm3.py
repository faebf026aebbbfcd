"""MiniCPM 3: latent attention without experts, and factors on embedding, residual and logits.

Source: Hu et al., MiniCPM, arXiv 2404.06395, section 3.
"""

from __future__ import annotations

import math

from tgi_asgi.errors import check
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases
from tgi_asgi.models.reading_latent import latent_layers, read_latent, read_latent_rope, read_latent_sizes


def read_minicpm3(reader: Reader, architecture: str) -> ModelConfig:
    """Read MiniCPM 3's configuration; llama.cpp's files imply the factors of the published model."""
    reader.defaults(
        kv_lora_rank=256, q_lora_rank=768, qk_nope_head_dim=64, qk_rope_head_dim=32, rms_norm_eps=1e-5,
        tie_word_embeddings=True, scale_emb=12, scale_depth=1.4, dim_model_base=256,
    )  # fmt: skip
    if reader.is_gguf:
        for key, value in (("scale_emb", 12), ("scale_depth", 1.4), ("dim_model_base", 256)):
            reader.replace(key, value)
    reader.require(mlp_bias=False)
    latent = read_latent(reader)
    sizes = read_latent_sizes(reader, latent, default_eps=1e-5)
    depth, width = math.sqrt(num_layers(reader)), sizes["hidden_size"]
    check(width > 0, f"hidden_size must be positive, got {width}")
    return ModelConfig(
        architecture=architecture,
        layers=latent_layers(reader, latent, *read_latent_rope(reader, latent)),
        embedding_factor=reader.number("scale_emb"),
        residual_factor=reader.number("scale_depth", depth) / depth,
        logits_scale=reader.number("dim_model_base", width) / width,
        **read_biases(reader, output="attention_bias"),
        **sizes,
    )


FAMILIES = (Family("MiniCPM3ForCausalLM", "minicpm3", read_minicpm3, Decoder),)
