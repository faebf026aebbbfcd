"""Names of the layers of SigLIP's tower, and of CLIP's, which are the same."""

from __future__ import annotations

from collections.abc import Mapping

# llama.cpp's names, by those of `transformers`.
SIGLIP_LAYERS: Mapping[str, str] = {
    "layer_norm1": "v.blk.{}.ln1",
    "layer_norm2": "v.blk.{}.ln2",
    "self_attn.q_proj": "v.blk.{}.attn_q",
    "self_attn.k_proj": "v.blk.{}.attn_k",
    "self_attn.v_proj": "v.blk.{}.attn_v",
    "self_attn.out_proj": "v.blk.{}.attn_out",
    "mlp.fc1": "v.blk.{}.ffn_up",
    "mlp.fc2": "v.blk.{}.ffn_down",
}
