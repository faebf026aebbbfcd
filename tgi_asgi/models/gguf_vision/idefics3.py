"""SmolVLM and Idefics 3: a SigLIP tower whose patches are joined in squares.

llama.cpp has one kind for both; SmolVLM's classes compute the same as those of Idefics 3.
"""

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
from tgi_asgi.models.gguf_vision.siglip import SIGLIP_LAYERS
from tgi_asgi.models.reader import Reader

_TOWER = "model.vision_model."
_FENCE = "<fake_token_around_image>"
_MAX_TILES = 8  # of a side: every image is enlarged to as many


def read_idefics3(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a SmolVLM."""
    sizes = read_sizes(reader, file)
    scale = reader.positive("projector.scale_factor", sizes.side)
    check(sizes.side % scale == 0, f"{sizes.side} patches cannot be joined by {scale}")
    check_stored(file, "v.position_embd.weight", (sizes.side**2, sizes.width))
    check_width(file, "mm.model.fc.weight", text)
    reader.ignore("projection_dim")
    # Files of 2025 do not say it; it was four times the tower's size for every published model.
    longest = reader.integer("preproc_image_size", 4 * sizes.image_size)
    check(
        sizes.image_size <= longest <= _MAX_TILES * sizes.image_size,
        f"preproc_image_size must be {sizes.image_size} to {_MAX_TILES} times that, got {longest}",
    )
    check_enlarged(longest**2, "preproc_image_size")
    names = TowerNames(file, sizes)
    names.add({f"{_TOWER}encoder.layers.{{}}.{own}": name for own, name in SIGLIP_LAYERS.items()})
    names.add({
        f"{_TOWER}embeddings.patch_embedding": "v.patch_embd",
        f"{_TOWER}embeddings.position_embedding": "v.position_embd",
        f"{_TOWER}post_layernorm": "v.post_ln",
        "model.connector.modality_projection.proj": "mm.model.fc",
    })  # fmt: skip
    config = {
        "model_type": "smolvlm",
        "architectures": ["SmolVLMForConditionalGeneration"],
        "text_config": dict(text.config),
        "vision_config": {
            **sizes.config(),
            "model_type": "smolvlm_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": sizes.eps,
        },
        "scale_factor": scale,
        "image_token_id": text.token_id("<image>"),
        "pad_token_id": 0,
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    text.token_id(_FENCE)
    preprocessor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": longest},
        "max_image_size": {"longest_edge": sizes.image_size},
        "do_image_splitting": True,
        **sizes.normal,
    }
    return VisionModel(
        config, "model.text_model.", names.finish(), preprocessor,
        {"image_seq_len": (sizes.side // scale) ** 2},
        {"image_token": "<image>", "fake_image_token": _FENCE},
    )  # fmt: skip


PROJECTORS = (Projector("idefics3", {"llama": "llama"}, read_idefics3),)
