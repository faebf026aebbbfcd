"""Cohere's Command R and R7B: parallel attention and MLP, LayerNorms without biases, scaled logits.

Source: Cohere, Command A, arXiv 2504.00698, section 2, for the layers without positions.
"""

from __future__ import annotations

from typing import Any

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes, read_sliding


def read_cohere(reader: Reader, architecture: str) -> ModelConfig:
    """Read Command R's configuration."""
    reader.defaults(rope_theta=5e5)
    common = _read_common(reader)
    # The training length; `max_position_embeddings` is what fitted a GPU when the first file was written.
    context = reader.integer("model_max_length", common["context_length"])
    has_norms = "blk.0.attn_q_norm.weight" in reader.tensors or reader.flag("use_qk_norm", False)
    layers = read_layers(reader, common)
    common["context_length"] = context
    return ModelConfig(architecture=architecture, layers=layers, has_qk_norm=has_norms, **common)


def read_cohere2(reader: Reader, architecture: str) -> ModelConfig:
    """Read Command R7B's configuration: layers have both a window and positions, or neither."""
    reader.defaults(sliding_window=4096)
    reader.ignore("use_gated_activation")  # all have a gate
    common = _read_common(reader)
    slides = read_sliding(reader, 4)
    window = reader.integer("sliding_window", 4096)
    windows = [window if each else None for each in slides]
    layers = read_layers(reader, common, windows=windows, has_rope=slides)
    return ModelConfig(architecture=architecture, layers=layers, **common)


def _read_common(reader: Reader) -> dict[str, Any]:
    reader.defaults(tie_word_embeddings=True, logit_scale=0.0625)
    sizes = read_sizes(reader, eps="layer_norm_eps", default_eps=1e-5)
    return {
        **sizes,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        "has_layer_norm": True,
        "has_interleaved_rope": True,
        "is_parallel": True,
        "has_mlp_norm": False,
        "logits_scale": reader.number("logit_scale"),
    }


class CohereWeights(LayerWeights):
    """A layer whose query and key norms have weights per head."""

    def norms(self) -> ops.HeadNorms | None:
        """Return the norms of queries and keys, if there are any."""
        config = self.config
        if not config.has_qk_norm:
            return None
        query, key = (
            self.norm(f"self_attn.{name}_norm", count, config.head_dim)
            for name, count in (("q", config.num_heads), ("k", config.num_kv_heads))
        )
        return ops.HeadNorms(query, key)


class Cohere(Decoder):
    """The decoder with Cohere's query and key norms."""

    weights_class = CohereWeights


FAMILIES = (
    Family("CohereForCausalLM", "command-r", read_cohere, Cohere),
    Family("Cohere2ForCausalLM", "cohere2", read_cohere2, Cohere),
)
