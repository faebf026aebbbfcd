"""Pixtral, and Mistral Small 3.1 and later, which join four patches: positions of their tower are rotary.

Source of the constants: the classes of `transformers`, which have them, too.
"""

from __future__ import annotations

import math
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.gguf_vision.projector import (
    Projector,
    TextFile,
    TowerNames,
    VisionModel,
    check_width,
    read_sizes,
)
from tgi_asgi.models.reader import Reader

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_EPS = 1e-5
_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_PAIRED = {"attention.q_proj": "v.blk.{}.attn_q", "attention.k_proj": "v.blk.{}.attn_k"}
_LAYERS = {
    "attention_norm": "v.blk.{}.ln1",
    "ffn_norm": "v.blk.{}.ln2",
    "attention.v_proj": "v.blk.{}.attn_v",
    "attention.o_proj": "v.blk.{}.attn_out",
    "feed_forward.gate_proj": "v.blk.{}.ffn_gate",
    "feed_forward.up_proj": "v.blk.{}.ffn_up",
    "feed_forward.down_proj": "v.blk.{}.ffn_down",
}


def read_pixtral(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a Pixtral, which is a LLaVA for `transformers`, or a Mistral 3."""
    uses_silu = reader.flag("use_silu", False)
    sizes = read_sizes(reader, file)
    check(
        math.isclose(sizes.eps, _EPS, rel_tol=1e-3),
        f"attention.layer_norm_epsilon must be {_EPS}, got {sizes.eps}",
    )
    check(sizes.head_dim % 4 == 0, f"heads of {sizes.head_dim} have no two rotary axes")
    joins = "mm.patch_merger.weight" in file.tensors
    merge = reader.integer("spatial_merge_size", 1)
    check(0 < merge <= sizes.side, f"spatial_merge_size must be in 1..{sizes.side}, got {merge}")
    check(joins == (merge > 1), f"spatial_merge_size is {merge}, which the tensors contradict")
    check_width(file, "mm.2.weight", text)
    reader.ignore("projection_dim")
    names = TowerNames(file, sizes)
    layers = f"{_TOWER}transformer.layers.{{}}."
    names.add({f"{layers}{own}": name for own, name in _LAYERS.items()})
    names.add({f"{layers}{own}": name for own, name in _PAIRED.items()}, pair_dim=sizes.head_dim)
    names.add({
        f"{_TOWER}patch_conv": "v.patch_embd",
        f"{_TOWER}ln_pre": "v.pre_ln",
        f"{_PROJECTOR}linear_1": "mm.1",
        f"{_PROJECTOR}linear_2": "mm.2",
        f"{_PROJECTOR}norm": "mm.input_norm",
        f"{_PROJECTOR}patch_merger.merging_layer": "mm.patch_merger",
    })  # fmt: skip
    names.unused.add("v.token_embd.img_break")  # the text model's embedding of the token
    vision = {
        **sizes.config(),
        "model_type": "pixtral",
        "head_dim": sizes.head_dim,
        "hidden_act": "silu" if uses_silu else "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": reader.number("rope.freq_base", 10000.0)},
    }
    config = {
        **_kind(joins, merge),
        "text_config": dict(text.config),
        "vision_config": vision,
        "vision_feature_layer": -1,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": "mm.1.bias" in file.tensors,
        "image_token_index": text.token_id(_TOKENS["image_token"]),
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    for each in _TOKENS.values():
        text.token_id(each)
    preprocessor = {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": sizes.image_size},
        "patch_size": {"height": sizes.patch_size, "width": sizes.patch_size},
        **sizes.normal,
    }
    processor = {
        "processor_class": "PixtralProcessor", "patch_size": sizes.patch_size, "spatial_merge_size": merge,
    }  # fmt: skip
    return VisionModel(
        config, "model.language_model.", names.finish(), preprocessor, processor, dict(_TOKENS)
    )


def _kind(joins: bool, merge: int) -> dict[str, Any]:
    if joins:
        name, more = "mistral3", {"spatial_merge_size": merge}
        return {"model_type": name, "architectures": ["Mistral3ForConditionalGeneration"], **more}
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_feature_select_strategy": "full",
    }


PROJECTORS = (Projector("pixtral", {"llama": "llama", "mistral3": "mistral"}, read_pixtral),)
