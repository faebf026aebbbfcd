"""InternVL 2.5 to 3.5: InternViT, whose patches are joined in squares; images are cut into tiles."""

from __future__ import annotations

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.gguf_vision.projector import (
    Projector,
    TextFile,
    TowerNames,
    VisionModel,
    check_enlarged,
    check_stored,
    check_width,
    read_sizes,
)
from tgi_asgi.models.reader import Reader

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_MAX_TILES = 64
_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
_LAYERS = {
    "layernorm_before": "v.blk.{}.ln1",
    "layernorm_after": "v.blk.{}.ln2",
    "attention.q_proj": "v.blk.{}.attn_q",
    "attention.k_proj": "v.blk.{}.attn_k",
    "attention.v_proj": "v.blk.{}.attn_v",
    "attention.q_norm": "v.blk.{}.attn_q_norm",
    "attention.k_norm": "v.blk.{}.attn_k_norm",
    "attention.projection_layer": "v.blk.{}.attn_out",
    "mlp.fc1": "v.blk.{}.ffn_up",
    "mlp.fc2": "v.blk.{}.ffn_down",
}


def read_internvl(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return an InternVL; InternViT-6B has other norms than the small one, which its tensors show."""
    check(not reader.flag("use_silu", False), "its tower's MLPs use SiLU, which InternViT's do not")
    sizes = read_sizes(reader, file)
    scale = reader.positive("projector.scale_factor", sizes.side)
    check(sizes.side % scale == 0, f"{sizes.side} patches cannot be joined by {scale}")
    fewest, most = reader.integer("preproc_min_tiles", 1), reader.integer("preproc_max_tiles", 12)
    check(0 < fewest <= most <= _MAX_TILES, f"an image cannot have {fewest} to {most} tiles")
    check_enlarged(most * sizes.image_size**2, "preproc_max_tiles and image_size")
    check_stored(file, "v.position_embd.weight", (sizes.side**2 + 1, sizes.width))
    check_stored(file, "v.class_embd", (sizes.width,))
    check_width(file, "mm.model.mlp.3.weight", text)
    reader.ignore("projection_dim")
    names = TowerNames(file, sizes)
    layers = f"{_TOWER}encoder.layer.{{}}."
    names.add({f"{layers}{own}": name for own, name in _LAYERS.items()})
    for index in range(sizes.num_layers):
        for number in (1, 2):
            own = f"{layers.format(index)}lambda_{number}"
            names.add_one(own, f"v.blk.{index}.ls{number}.weight")
    names.add_one(f"{_TOWER}embeddings.cls_token", "v.class_embd")
    names.add_one(f"{_TOWER}embeddings.position_embeddings", "v.position_embd.weight")
    names.add({
        f"{_TOWER}embeddings.patch_embeddings.projection": "v.patch_embd",
        f"{_PROJECTOR}layer_norm": "mm.model.mlp.0",
        f"{_PROJECTOR}linear_1": "mm.model.mlp.1",
        f"{_PROJECTOR}linear_2": "mm.model.mlp.3",
    })  # fmt: skip
    tensors = file.tensors
    num_tokens = (sizes.side // scale) ** 2
    config = {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "text_config": dict(text.config),
        "vision_config": {
            **sizes.config(),
            "model_type": "internvl_vision",
            "hidden_act": "gelu",
            "layer_norm_eps": sizes.eps,
            "attention_bias": "v.blk.0.attn_q.bias" in tensors,
            "use_qk_norm": "v.blk.0.attn_q_norm.weight" in tensors,
            "norm_type": "layer_norm" if "v.blk.0.ln1.bias" in tensors else "rms_norm",
        },
        "downsample_ratio": 1 / scale,
        "image_seq_length": num_tokens,
        "image_token_id": text.token_id(_TOKENS["context_image_token"]),
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    for each in _TOKENS.values():
        text.token_id(each)
    side = {"height": sizes.image_size, "width": sizes.image_size}
    preprocessor = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": side,
        "crop_to_patches": True,
        "min_patches": fewest,
        "max_patches": most,
        **sizes.normal,
    }
    return VisionModel(
        config, "model.language_model.", names.finish(), preprocessor, {"image_seq_length": num_tokens},
        dict(_TOKENS), needless_tokens={"video_token": "<video>"},
    )  # fmt: skip


PROJECTORS = (Projector("internvl", {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}, read_internvl),)
