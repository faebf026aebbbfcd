"""Allen AI's OLMoE: Llama with experts, and query and key norms that span all heads."""

from __future__ import annotations

from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.families.olmo2 import Olmo2Weights
from tgi_asgi.models.family import Family
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes
from tgi_asgi.models.reading_experts import everywhere, read_experts, with_experts


def read_olmoe(reader: Reader, architecture: str) -> ModelConfig:
    """Read OLMoE's configuration."""
    reader.defaults(rms_norm_eps=1e-5, num_experts=64, num_experts_per_tok=8)
    reader.require(clip_qkv=None)
    sizes = read_sizes(reader)
    experts = read_experts(
        reader, count="num_experts", top_k="num_experts_per_tok", size="intermediate_size",
        is_renormalised=reader.flag("norm_topk_prob", False),
    )  # fmt: skip
    return ModelConfig(
        architecture=architecture,
        layers=with_experts(reader, read_layers(reader, sizes), experts, everywhere),
        has_qk_norm=True,
        **read_biases(reader, qkv="attention_bias", output="attention_bias"),
        **sizes,
    )


class Olmoe(Decoder):
    """The decoder with OLMoE's norms."""

    weights_class = Olmo2Weights


FAMILIES = (Family("OlmoeForCausalLM", "olmoe", read_olmoe, Olmoe),)
