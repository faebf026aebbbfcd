"""Microsoft's Phi 3, 3.5 and 4: q, k and v are one tensor, as are gate and up; part of a head turns."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layers import LayerWeights, Sources
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_layers, read_sizes, read_window


def read_phi3(reader: Reader, architecture: str) -> ModelConfig:
    """Read Phi 3's and 4's."""
    reader.defaults(rms_norm_eps=1e-5)
    sizes = read_sizes(reader)
    layers = read_layers(reader, sizes, windows=read_window(reader))
    return ModelConfig(architecture=architecture, layers=layers, **sizes)


class FusedWeights(LayerWeights):
    """A layer whose products of one input are one tensor each."""

    def qkv_sources(self) -> Sources:
        """Cut the tensor of q, k and v by rows."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return self.cut("self_attn.qkv_proj", [count * config.head_dim for count in heads])

    def gate_up_sources(self) -> Sources:
        """Cut the tensor of gate and up by rows; GGUF has it under the name of up."""
        name = "mlp.gate_up_proj"
        return self.cut(name, [self.config.intermediate_size] * 2)


class Phi3(Decoder):
    """The decoder with fused weights."""

    weights_class = FusedWeights


FAMILIES = (Family("Phi3ForCausalLM", "phi3", read_phi3, Phi3, gguf_names={"mlp.gate_up_proj": "ffn_up"}),)
