"""Text models with recurrent layers, beside projectors: LFM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_LAYERS
from tgi_asgi.models.gguf_module import MAX_SIZE
from tgi_asgi.models.gguf_vision.text_reading import NAMES, Text, read_plain, read_rope
from tgi_asgi.models.reader import Reader
from tgi_asgi.models.reading import read_kv_heads


def _read_lfm2(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of an LFM2, most layers of which have a short convolution."""
    num_layers = reader.positive("num_hidden_layers", MAX_LAYERS)
    attends = [f"blk.{index}.shortconv.conv.weight" not in reader.tensors for index in range(num_layers)]
    read_kv_heads(reader, attends)
    config = read_plain(reader, file)
    return {
        **config,
        "block_auto_adjust_ff_dim": False,  # the file has the size that results
        "norm_eps": config["rms_norm_eps"],
        "layer_types": ["full_attention" if each else "conv" for each in attends],
        "conv_L_cache": reader.positive("conv_L_cache", MAX_SIZE),
        "conv_bias": any(name.endswith(".shortconv.conv.bias") for name in reader.tensors),
        "rope_parameters": read_rope(reader),
    }


_LFM2_NAMES = {
    **{own: NAMES[own] for own in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    "self_attn.out_proj": NAMES["self_attn.o_proj"],
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "operator_norm": NAMES["input_layernorm"],
    "ffn_norm": NAMES["post_attention_layernorm"],
    "feed_forward.w1": NAMES["mlp.gate_proj"],
    "feed_forward.w2": NAMES["mlp.down_proj"],
    "feed_forward.w3": NAMES["mlp.up_proj"],
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
}
RECURRENT_TEXTS: Mapping[str, Text] = {
    "lfm2": Text(
        _read_lfm2, _LFM2_NAMES, outer={"embed_tokens": "token_embd", "embedding_norm": "token_embd_norm"}
    ),
}
