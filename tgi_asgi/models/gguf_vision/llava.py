"""LLaVA 1.5 and 1.6: CLIP's tower up to the layer that is read, and two matrices.

LLaVA 1.6 cuts images into tiles, in one of several grids, and ends each row of patches with a learned one.

llama.cpp's first converter wrote these files (`tools/mtmd/legacy-models`); it leaves out what nothing reads.
"""

from __future__ import annotations

import numpy as np

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.gguf_vision.projector import (
    MAX_SIDE,
    Projector,
    TextFile,
    TowerNames,
    TowerSizes,
    VisionModel,
    check_stored,
    check_width,
    read_sizes,
)
from tgi_asgi.models.gguf_vision.siglip import SIGLIP_LAYERS
from tgi_asgi.models.reader import Reader
from tgi_asgi.ops.arrays import Floats

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_IMAGE = "<image>"
_NEWLINE = "model.image_newline"
_NO_TEXT = (2, 3)  # types of unknown and of control tokens
_MAX_GRIDS = 64


def read_llava(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a LLaVA; its tower's last layer is the one that is read, the last but one of CLIP's.

    A LLaVA 1.6 is a LLaVA-NeXT for `transformers`.
    """
    uses_gelu = reader.flag("use_gelu", False)
    sizes = read_sizes(reader, file)
    check_stored(file, "v.position_embd.weight", (sizes.side**2 + 1, sizes.width))
    check_stored(file, "v.class_embd", (sizes.width,))
    check_width(file, "mm.2.weight", text)
    reader.ignore("projection_dim")
    reader.require(feature_layer=[sizes.num_layers], mm_projector_type="mlp2x_gelu")
    grids = _read_grids(reader, file, sizes, text)
    names = TowerNames(file, sizes)
    names.add({f"{_TOWER}encoder.layers.{{}}.{own}": name for own, name in SIGLIP_LAYERS.items()})
    names.add({
        f"{_TOWER}embeddings.patch_embedding": "v.patch_embd",
        f"{_TOWER}embeddings.position_embedding": "v.position_embd",
        f"{_TOWER}pre_layrnorm": "v.pre_ln",
        f"{_PROJECTOR}linear_1": "mm.0",
        f"{_PROJECTOR}linear_2": "mm.2",
    })  # fmt: skip
    names.add_one(f"{_TOWER}embeddings.class_embedding", "v.class_embd")
    names.unused.update(("v.post_ln.weight", "v.post_ln.bias"))

    def ones() -> Floats:
        return np.ones(sizes.width, np.float32)

    for kind in ("weight", "bias"):  # of a norm that the class has, and images do not pass
        names.add_one(f"{_TOWER}post_layernorm.{kind}", make=ones, shape=(sizes.width,))
    token = _placeholder(text)
    config = {
        "model_type": "llava_next" if grids else "llava",
        "architectures": [f"{'LlavaNext' if grids else 'Llava'}ForConditionalGeneration"],
        "text_config": dict(text.config),
        "vision_config": {
            **sizes.config(),
            "model_type": "clip_vision_model",
            "hidden_act": "gelu" if uses_gelu else "quick_gelu",
            "layer_norm_eps": sizes.eps,
            "projection_dim": sizes.width,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": "mm.0.bias" in file.tensors,
        "image_seq_length": sizes.side**2,
        "image_token_index": text.token_id(token),
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    side = {"height": sizes.image_size, "width": sizes.image_size}
    if grids:
        names.add_one(_NEWLINE, _NEWLINE)
        config["image_grid_pinpoints"] = grids
    preprocessor = {
        "image_processor_type": "LlavaNextImageProcessor" if grids else "CLIPImageProcessor",
        **({"image_grid_pinpoints": grids} if grids else {}),
        "size": {"shortest_edge": sizes.image_size},
        "crop_size": side,
        **sizes.normal,
    }
    processor = {
        "patch_size": sizes.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return VisionModel(
        config, "model.language_model.", names.finish(), preprocessor, processor, {"image_token": token}
    )


def _read_grids(reader: Reader, file: GgufFile, sizes: TowerSizes, text: TextFile) -> list[list[int]]:
    """Return the heights and widths to which images may be resized, in whole tiles; empty for LLaVA 1.5."""
    if _NEWLINE not in file.tensors:
        reader.require(mm_patch_merge_type="flat")
        return []
    check_stored(file, _NEWLINE, (text.config["hidden_size"],))
    reader.require(mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres")
    reader.ignore("image_crop_resolution", "image_split_resolution")  # nothing reads them
    given = reader.get("image_grid_pinpoints")
    values = given if isinstance(given, list) else []
    check(
        0 < len(values) <= 2 * _MAX_GRIDS and len(values) % 2 == 0
        and all(type(each) is int and 0 < each <= MAX_SIDE for each in values)
        and all(each % sizes.image_size == 0 for each in values),
        f"image_grid_pinpoints must be pairs of multiples of {sizes.image_size} up to {MAX_SIDE}, "
        f"got {str(given)[:100]}",
    )  # fmt: skip
    return [values[index : index + 2] for index in range(0, len(values), 2)]


def _placeholder(text: TextFile) -> str:
    """Return the token that an image's rows replace.

    Vocabularies of the first files have none for images. Their token for unknown characters then stands in
    for it: no text has it, as they have a token for every byte. Nothing else in such a file tells
    it from a plain Llama, so the projector must be known to be this model's.
    """
    if text.find_token(_IMAGE) is not None:
        return _IMAGE
    check(
        text.is_certain,
        f"the text model's vocabulary has no token {_IMAGE!r}, and the files' names do not show that they "
        "belong together: if they do, name the file with --mmproj",
    )
    metadata = text.file.metadata
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}", ()) for key in ("tokens", "token_type"))
    is_known = type(unknown) is int and 0 <= unknown < min(len(tokens), len(types))
    if not is_known or types[unknown] not in _NO_TEXT:  # "!" may be named as well
        raise ModelLoadError("the text model's vocabulary has no token that can stand for images")
    return str(tokens[unknown])


PROJECTORS = (Projector("mlp", {"llama": "llama"}, read_llava),)
