"""Gemma 3: a SigLIP tower, whose patches are averaged in squares, normed and multiplied by a matrix."""

from __future__ import annotations

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.gguf_vision.projector import (
    Projector,
    TextFile,
    TowerNames,
    VisionModel,
    check_stored,
    check_width,
    read_sizes,
)
from tgi_asgi.models.gguf_vision.siglip import SIGLIP_LAYERS
from tgi_asgi.models.gguf_vision.text_reading import less_one
from tgi_asgi.models.reader import Reader

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_MATRIX, _NORM = "mm.input_projection.weight", "mm.soft_emb_norm.weight"
_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}


def read_gemma3(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a Gemma 3."""
    sizes = read_sizes(reader, file)
    scale = reader.integer("projector.scale_factor", 4)  # files have it only if it differs
    check(0 < scale <= sizes.side, f"projector.scale_factor must be in 1..{sizes.side}, got {scale}")
    check(sizes.side % scale == 0, f"{sizes.side} patches cannot be averaged by {scale}")
    check_stored(file, "v.position_embd.weight", (sizes.side**2, sizes.width))
    check_width(file, _MATRIX, text, axis=-1)
    check_stored(file, _MATRIX, (sizes.width, text.config["hidden_size"]))
    check_stored(file, _NORM, (sizes.width,))
    reader.ignore("projection_dim")
    names = TowerNames(file, sizes)
    names.add({f"{_TOWER}encoder.layers.{{}}.{own}": name for own, name in SIGLIP_LAYERS.items()})
    names.add({
        f"{_TOWER}embeddings.patch_embedding": "v.patch_embd",
        f"{_TOWER}embeddings.position_embedding": "v.position_embd",
        f"{_TOWER}post_layernorm": "v.post_ln",
    })  # fmt: skip
    names.add_one(f"{_PROJECTOR}mm_input_projection_weight", _MATRIX)
    names.add_one(f"{_PROJECTOR}mm_soft_emb_norm.weight", _NORM, make=less_one, shape=(sizes.width,))
    num_tokens = (sizes.side // scale) ** 2
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": dict(text.config),
        "vision_config": {
            **sizes.config(),
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": sizes.eps,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": num_tokens,
        "image_token_id": text.token_id(_TOKENS["image_token"]),
        "boi_token_index": text.token_id(_TOKENS["boi_token"]),
        "eoi_token_index": text.token_id(_TOKENS["eoi_token"]),
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    preprocessor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": sizes.image_size, "width": sizes.image_size},
        **sizes.normal,
    }
    return VisionModel(
        config, "model.language_model.", names.finish(), preprocessor, {"image_seq_length": num_tokens},
        dict(_TOKENS),
    )  # fmt: skip


PROJECTORS = (Projector("gemma3", {"gemma3": "gemma3_text"}, read_gemma3),)
