"""Stability's StableLM: Llama with LayerNorm, in which a quarter of each head rotates.

StableLM 2 12B has parallel attention and MLP after one norm, and norms per head.
"""

from __future__ import annotations

import numpy as np

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_stablelm(reader: Reader, architecture: str) -> ModelConfig:
    """Read StableLM's configuration; a GGUF file's tensors show the variant."""
    reader.rename(partial_rotary_factor=("rope_pct",), layer_norm_eps=("norm_eps",))
    reader.defaults(partial_rotary_factor=0.25)
    sizes = read_sizes(reader, eps="layer_norm_eps", default_eps=1e-5)
    is_parallel, has_qk_norm = reader.flag("use_parallel_residual", False), reader.flag("qk_layernorm", False)
    if reader.is_gguf:
        is_parallel = "blk.0.ffn_norm.weight" not in reader.tensors
        has_qk_norm = "blk.0.attn_q_norm.weight" in reader.tensors
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes, has_partial_rotary=True),
        has_qk_norm=has_qk_norm,
        has_layer_norm=True,
        has_norm_bias=True,
        is_parallel=is_parallel,
        has_mlp_norm=not is_parallel,
        **read_biases(reader, qkv="use_qkv_bias"),
        **sizes,
    )


class StableLmWeights(LayerWeights):
    """A layer with a LayerNorm per head, without biases."""

    def norms(self) -> ops.HeadNorms | None:
        """Return the norms of queries and keys, if there are any."""
        config = self.config
        if not config.has_qk_norm:
            return None
        query, key = self._head_norm("q", config.num_heads), self._head_norm("k", config.num_kv_heads)
        return ops.HeadNorms(query, key)

    def _head_norm(self, name: str, num_heads: int) -> ops.NormWeight:
        """Return the norms of all heads as one: a tensor per head, or a single one in a GGUF file."""
        size, whole = self.config.head_dim, f"self_attn.{name}_norm.weight"
        if f"{self.prefix}{whole}" in self.weights:
            weight = ops.vector(self.get(whole, num_heads, size))
        else:
            names = [f"self_attn.{name}_layernorm.norms.{head}.weight" for head in range(num_heads)]
            weight = np.concatenate([ops.vector(self.get(each, size)) for each in names])
        return ops.NormWeight.layer(weight.size, self.config.norm_eps, weight=weight)


class StableLm(Decoder):
    """The decoder with StableLM's norms."""

    weights_class = StableLmWeights


# The second is the name in Stability's own code.
FAMILIES = (
    Family("StableLmForCausalLM", "stablelm", read_stablelm, StableLm),
    Family("StableLMEpochForCausalLM", "stablelm", read_stablelm, StableLm),
)
