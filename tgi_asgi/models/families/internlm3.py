"""InternLM 3: Llama with other keys for biases; its GGUF files are Llama's."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import make_rope, num_layers, read_biases, read_layers, read_sizes, rope_values


def read_internlm3(reader: Reader, architecture: str) -> ModelConfig:
    """Read InternLM 3's configuration: `qkv_bias` and `bias` are others' `attention_bias` and `mlp_bias`."""
    reader.defaults(head_dim=128, rms_norm_eps=1e-5, num_key_value_heads=2)
    reader.defaults(attention_bias=reader.flag("qkv_bias", False), mlp_bias=reader.flag("bias", False))
    sizes = read_sizes(reader)
    rope = rope_values(reader)
    if "dynamic" in (rope.get("rope_type"), rope.get("type")):
        # It stretches only positions beyond `max_position_embeddings`, which are not served.
        rope = {"rope_theta": rope.get("rope_theta")}
    layers = read_layers(
        reader, sizes, ropes=[make_rope(reader, rope, sizes["head_dim"])] * num_layers(reader)
    )
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


FAMILIES = (Family("InternLM3ForCausalLM", None, read_internlm3, Decoder),)
