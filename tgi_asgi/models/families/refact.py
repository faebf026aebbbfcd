"""Refact: linear biases, one KV head, and its own names.

Its checkpoints are not read: their code computes LayerNorms, but llama.cpp, whose files are read, RMSNorms.
"""

from __future__ import annotations

from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import num_layers, read_biases, read_sizes, rms_eps_key


def read_refact(reader: Reader, architecture: str) -> ModelConfig:
    """Read Refact's configuration; keys of rotary positions, which files may have, say nothing."""
    sizes = read_sizes(reader, eps=rms_eps_key(reader))
    reader.ignore("rope.dimension_count", "rope_theta")
    layer = LayerSpec(None, None, sizes["head_dim"] ** -0.5, slopes=alibi_slopes(sizes["num_heads"]))
    return ModelConfig(
        architecture=architecture,
        layers=(layer,) * num_layers(reader),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


FAMILIES = (Family("GPTRefactForCausalLM", "refact", read_refact, Decoder, is_gguf_only=True),)
