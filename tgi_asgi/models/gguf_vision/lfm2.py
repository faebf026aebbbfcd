"""LFM2-VL: a SigLIP 2 tower for images of any size, which are cut into tiles if they are large."""

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
    flat_patches,
    read_sizes,
)
from tgi_asgi.models.gguf_vision.siglip import SIGLIP_LAYERS
from tgi_asgi.models.reader import Reader

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_TILE = 512  # pixels of a side in all published models; llama.cpp's files do not say it
_LARGEST = 256  # tokens of a tile, likewise
_MAX_PATCHES, _MAX_WEIGHTS = 1 << 12, 1 << 22  # of a tile, and of the positions among which it interpolates
_TOKENS = {
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail_token": "<|img_thumbnail|>",
}


def read_lfm2_vl(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return an LFM2-VL; `image_size` is the side for which positions are stored."""
    sizes = read_sizes(reader, file)
    factor = reader.positive("projector.scale_factor", sizes.side)
    check(
        _TILE % (sizes.patch_size * factor) == 0,
        f"tiles of {_TILE} pixels cannot be cut into tokens of {sizes.patch_size * factor}",
    )
    num_patches = max(_LARGEST * factor**2, (_TILE // sizes.patch_size) ** 2)
    check(
        num_patches <= _MAX_PATCHES and num_patches * sizes.side**2 <= _MAX_WEIGHTS,
        f"a tile would have {num_patches} patches, with positions among {sizes.side} x {sizes.side}",
    )
    check_stored(file, "v.position_embd.weight", (sizes.side**2, sizes.width))
    check_width(file, "mm.2.weight", text)
    reader.ignore("projection_dim")
    names = TowerNames(file, sizes)
    names.add({f"{_TOWER}encoder.layers.{{}}.{own}": name for own, name in SIGLIP_LAYERS.items()})
    names.add({
        f"{_TOWER}embeddings.patch_embedding": "v.patch_embd",
        f"{_TOWER}embeddings.position_embedding": "v.position_embd",
        f"{_TOWER}post_layernorm": "v.post_ln",
        f"{_PROJECTOR}layer_norm": "mm.input_norm",
        f"{_PROJECTOR}linear_1": "mm.1",
        f"{_PROJECTOR}linear_2": "mm.2",
    })  # fmt: skip
    shape = (sizes.width, sizes.patch_size**2 * 3)
    names.add_one(
        f"{_TOWER}embeddings.patch_embedding.weight", "v.patch_embd.weight", make=flat_patches, shape=shape
    )
    config = {
        "model_type": "lfm2_vl",
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "text_config": dict(text.config),
        "vision_config": {
            **sizes.config(),
            "model_type": "siglip2_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": sizes.eps,
            "num_patches": sizes.side**2,
            "vision_use_head": False,
        },
        "downsample_factor": factor,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": file.tensor("mm.1.weight").shape[0],
        "projector_bias": "mm.1.bias" in file.tensors,
        "projector_use_layernorm": "mm.input_norm.weight" in file.tensors,
        "image_token_id": text.token_id(_TOKENS["image_token"]),
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    for each in _TOKENS.values():
        text.token_id(each)
    preprocessor = {
        "image_processor_type": "Lfm2VlImageProcessor",
        "tile_size": _TILE,
        "encoder_patch_size": sizes.patch_size,
        "downsample_factor": factor,
        "max_image_tokens": _LARGEST,
        "return_row_col_info": True,
        **sizes.normal,
    }
    return VisionModel(config, "model.language_model.", names.finish(), preprocessor, {}, dict(_TOKENS))


PROJECTORS = (Projector("lfm2", {"lfm2": "lfm2"}, read_lfm2_vl),)
