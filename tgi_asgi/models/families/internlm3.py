"""InternLM 3: Llama with other keys for biases; its GGUF files are Llama's."""

from __future__ import annotations

from typing import Any

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_internlm3(reader: Reader, architecture: str) -> ModelConfig:
    """Read InternLM 3's configuration: `qkv_bias` and `bias` are others' `attention_bias` and `mlp_bias`."""
    reader.defaults(head_dim=128, rms_norm_eps=1e-5, num_key_value_heads=2)
    reader.defaults(attention_bias=reader.flag("qkv_bias", False), mlp_bias=reader.flag("bias", False))
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, edit_rope=_leave_out_dynamic),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


def _leave_out_dynamic(values: dict[str, Any]) -> None:
    """Leave out a scaling of positions beyond `max_position_embeddings`, which are not served."""
    if "dynamic" in (values.get("rope_type"), values.get("type")):
        values |= {"rope_type": "default", "type": None, "factor": None}


FAMILIES = (Family("InternLM3ForCausalLM", None, read_internlm3, Decoder),)
