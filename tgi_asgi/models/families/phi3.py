"""Microsoft's Phi 3, 3.5 and 4: fused q, k and v, fused gate and up; part of a head rotates."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_layers, read_sizes, read_window


def read_phi3(reader: Reader, architecture: str) -> ModelConfig:
    """Read the configuration of Phi 3 and 4."""
    reader.defaults(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    sizes = read_sizes(reader)
    layers = read_layers(reader, sizes, windows=read_window(reader), has_partial_rotary=True)
    return ModelConfig(architecture=architecture, layers=layers, **sizes)


class Phi3(Decoder):
    """The decoder with fused weights."""

    weights_class = FusedWeights


FAMILIES = (Family("Phi3ForCausalLM", "phi3", read_phi3, Phi3, gguf_names={"mlp.gate_up_proj": "ffn_up"}),)
