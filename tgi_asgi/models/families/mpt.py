"""MosaicML's MPT: ALiBi, no biases, and queries, keys and values that may be clamped."""

from __future__ import annotations

from tgi_asgi.errors import check
from tgi_asgi.models.alibi import alibi_slopes
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family
from tgi_asgi.models.fused import FusedWeights
from tgi_asgi.models.layer_spec import LayerSpec
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import LLAMA_NAMES, num_layers, read_sizes

# Required values of `attn_config` and the configuration itself, for keys that they contain.
_ATTENTION = {
    "attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "qk_gn": False, "alibi": True,
    "kv_n_heads": None, "attn_uses_sequence_id": False, "rope": False, "sliding_window_size": -1,
}  # fmt: skip
_MODEL = {"expansion_ratio": 4, "no_bias": True, "logit_scale": None}


def read_mpt(reader: Reader, architecture: str) -> ModelConfig:
    """Read MPT's configuration, which nests the attention's; other variants are refused."""
    reader.drop(*LLAMA_NAMES)
    reader.rename(
        hidden_size=("d_model",),
        num_hidden_layers=("n_layers",),
        num_attention_heads=("n_heads",),
        max_position_embeddings=("max_seq_len",),
        layer_norm_eps=("layer_norm_epsilon",),
    )
    reader.defaults(
        vocab_size=50368, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
        max_position_embeddings=2048,
    )  # fmt: skip
    reader.defaults(intermediate_size=4 * reader.integer("hidden_size"), tie_word_embeddings=True)
    reader.ignore("norm_type", "learned_pos_emb")  # positions are not learned with ALiBi
    sizes = read_sizes(reader, activation="gelu", eps="layer_norm_eps", default_eps=1e-5)
    attention = reader if reader.is_gguf else _attention_of(reader)
    attention.defaults(alibi_bias_max=8.0)
    scale = attention.number("softmax_scale", sizes["head_dim"] ** -0.5)
    largest = attention.number("alibi_bias_max")
    check(0 < largest <= 64, f"alibi_bias_max must be in (0, 64], got {largest}")
    clip = attention.number("clip_qkv", 0.0) or None
    if attention is not reader:
        attention.finish()
    layer = LayerSpec(None, None, scale, slopes=alibi_slopes(sizes["num_heads"], largest))
    return ModelConfig(
        architecture=architecture,
        layers=(layer,) * num_layers(reader),
        has_gate=False,
        has_layer_norm=True,
        clip=clip,
        **sizes,
    )


def _attention_of(reader: Reader) -> Reader:
    """Return the attention's configuration after checking that everything unsupported is off."""
    given = reader.get("attn_config")
    check(given is None or isinstance(given, dict), "attn_config must be an object")
    attention = Reader.of_json(given or {})
    attention.ignore("rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config")
    reader.require(**_MODEL)
    attention.require(**_ATTENTION)
    return attention


class Mpt(Decoder):
    """The decoder with the names of MPT."""

    weights_class = FusedWeights
    checkpoint = CheckpointLayout(
        names={
            "model.embed_tokens": "transformer.wte",
            "model.layers": "transformer.blocks",
            "model.norm": "transformer.norm_f",
            "input_layernorm": "norm_1",
            "post_attention_layernorm": "norm_2",
            "self_attn.qkv_proj": "attn.Wqkv",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "ffn.up_proj",
            "mlp.down_proj": "ffn.down_proj",
        },
    )


# The second is the name in MosaicML's own code.
FAMILIES = (
    Family("MptForCausalLM", "mpt", read_mpt, Mpt),
    Family("MPTForCausalLM", "mpt", read_mpt, Mpt),
)
