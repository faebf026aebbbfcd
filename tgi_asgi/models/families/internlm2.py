"""InternLM 1, 2 and 2.5: Llama with other names, and from 2 on each KV head next to its query heads.

Source: Cai et al., InternLM2, arXiv 2403.17297, section 2.2.
"""

from __future__ import annotations

from tgi_asgi.errors import check
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.config_bounds import check_computed
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights, rows_by_group
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_biases, read_layers, read_sizes


def read_internlm(reader: Reader, architecture: str) -> ModelConfig:
    """Read InternLM 1's configuration; its scaling of positions begins beyond the context, as in 2."""
    rotary = reader.get("rotary")
    check(rotary is None or isinstance(rotary, dict), "`rotary` must be an object")
    own = Reader.of_json(rotary or {})
    kind = own.get("type")
    check_computed(kind in (None, "origin", "dynamic"), f"`rotary` of type {kind!r} is not supported")
    reader.defaults(rope_theta=own.number("base", 10000.0))
    return read_internlm2(reader, architecture)


def read_internlm2(reader: Reader, architecture: str) -> ModelConfig:
    """Read InternLM 2's configuration; `bias` is about attention, and true if the file does not say."""
    reader.defaults(attention_bias=reader.flag("bias", True))
    sizes = read_sizes(reader)
    return ModelConfig(
        architecture=architecture,
        layers=read_layers(reader, sizes),
        **read_biases(reader, qkv="attention_bias", output="attention_bias", mlp="mlp_bias"),
        **sizes,
    )


class InternLm2(Decoder):
    """The decoder with InternLM's names."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "model.tok_embeddings",
            "lm_head": "output",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.qkv_proj": "attention.wqkv",
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
        },
        row_order=rows_by_group,
    )


FAMILIES = (
    Family("InternLMForCausalLM", None, read_internlm, Decoder),
    Family("InternLM2ForCausalLM", "internlm2", read_internlm2, InternLm2, is_rotary_permuted=True),
)
