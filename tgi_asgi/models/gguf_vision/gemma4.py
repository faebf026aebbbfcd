"""Gemma 4: a tower for images of any proportions, whose patches are averaged in squares. Not for sound."""

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
    flat_patches,
    read_sizes,
)
from tgi_asgi.models.reader import Reader

_TOWER = "model.vision_tower."
_TABLE, _PATCHES, _MATRIX = "v.position_embd.weight", "v.patch_embd.weight", "mm.input_projection.weight"
_POOLED = 3  # patches of a side that become one token, unless the file says otherwise
_MAX_TOKENS = 280  # of an image, by the published processor
_TOKENS = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_NEEDLESS = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
_NORMS = {
    "input_layernorm": "v.blk.{}.ln1",
    "post_attention_layernorm": "v.blk.{}.attn_post_norm",
    "pre_feedforward_layernorm": "v.blk.{}.ln2",
    "post_feedforward_layernorm": "v.blk.{}.ffn_post_norm",
    "self_attn.q_norm": "v.blk.{}.attn_q_norm",
    "self_attn.k_norm": "v.blk.{}.attn_k_norm",
}
_PRODUCTS = {
    "self_attn.q_proj": "v.blk.{}.attn_q",
    "self_attn.k_proj": "v.blk.{}.attn_k",
    "self_attn.v_proj": "v.blk.{}.attn_v",
    "self_attn.o_proj": "v.blk.{}.attn_out",
    "mlp.gate_proj": "v.blk.{}.ffn_gate",
    "mlp.up_proj": "v.blk.{}.ffn_up",
    "mlp.down_proj": "v.blk.{}.ffn_down",
}
_CLIPS = ("input_min", "input_max", "output_min", "output_max")


def read_gemma4(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a Gemma 4."""
    sizes = read_sizes(reader, file)
    pooled = reader.integer("projector.scale_factor", _POOLED)
    check(0 < pooled <= 16, f"projector.scale_factor must be in 1..16, got {pooled}")
    check_enlarged(_MAX_TOKENS * (pooled * sizes.patch_size) ** 2, "projector.scale_factor and patch_size")
    table = file.tensor(_TABLE).shape
    check(len(table) == 3, f"tensor {_TABLE!r} must be two tables, got the shape {list(table)}")
    check_stored(file, _TABLE, (2, table[1], sizes.width))
    longest = _MAX_TOKENS * pooled  # of a strip
    check(table[1] >= longest, f"an image may have {longest} patches in a row, but {table[1]} have positions")
    check_width(file, _MATRIX, text)
    check(not sizes.is_swapped and sizes.head_dim % 4 == 0, "its heads and MLPs are not those of Gemma 4")
    reader.ignore("projection_dim", "has_audio_encoder")
    names = TowerNames(file, sizes)
    layers = f"{_TOWER}encoder.layers.{{}}."
    names.add({f"{layers}{own}": name for own, name in _NORMS.items()})
    names.add({f"{layers}{own}.linear": name for own, name in _PRODUCTS.items()})
    for own, name in _PRODUCTS.items():
        for index in range(sizes.num_layers):
            for clip in _CLIPS:
                stored = f"{name.format(index)}.{clip}"
                if stored in file.tensors:
                    names.add_one(f"{layers.format(index)}{own}.{clip}", stored)
    channels = 3 * sizes.patch_size**2
    embedder = f"{_TOWER}patch_embedder."
    names.add_one(f"{embedder}input_proj.weight", _PATCHES, make=flat_patches, shape=(sizes.width, channels))
    names.add_one(f"{embedder}position_embedding_table", _TABLE)
    names.add_one("model.embed_vision.embedding_projection.weight", _MATRIX)
    is_scaled = "v.std_scale" in file.tensors
    if is_scaled:
        for name in ("std_bias", "std_scale"):
            check_stored(file, f"v.{name}", (sizes.width,))
            names.add_one(f"{_TOWER}{name}", f"v.{name}")
    names.unused.update(name for name in file.names if name.startswith(("a.", "mm.a.")))
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp_width,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_heads,
        "head_dim": sizes.head_dim,
        "patch_size": sizes.patch_size,
        "position_embedding_size": table[1],
        "pooling_kernel_size": pooled,
        "rms_norm_eps": sizes.eps,
        "standardize": is_scaled,
        "use_clipped_linears": any(name.endswith(_CLIPS) for name in file.names if name.startswith("v.")),
    }
    # As in llama.cpp: in the models for devices, which have embeddings of layers, images see nothing ahead.
    sees_ahead = not text.config.get("hidden_size_per_layer_input")
    others = {"video_token_id": "<|video|>", "audio_token_id": "<|audio|>"}
    ids = {key: text.find_token(each) for key, each in others.items()}
    config = {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": {
            **text.config,
            "use_bidirectional_attention": "vision" if sees_ahead else None,
            "pad_token_id": _padding(text),
        },
        "vision_config": vision,
        "audio_config": None,
        "image_token_id": text.token_id(_TOKENS["image_token"]),
        "boi_token_id": text.token_id(_TOKENS["boi_token"]),
        "eoi_token_id": text.token_id(_TOKENS["eoi_token"]),
        **{key: token_id for key, token_id in ids.items() if token_id is not None},
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    preprocessor = {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": sizes.patch_size,
        "pooling_kernel_size": pooled,
        "max_soft_tokens": _MAX_TOKENS,
        **sizes.normal,
    }
    return VisionModel(
        config, "model.language_model.", names.finish(), preprocessor, {}, dict(_TOKENS),
        needless_tokens=dict(_NEEDLESS),
    )  # fmt: skip


def _padding(text: TextFile) -> int:
    """Return the token whose embeddings of layers an image's tokens have."""
    found = text.file.metadata.get("tokenizer.ggml.padding_token_id", 0)
    return found if type(found) is int and 0 <= found < text.config["vocab_size"] else 0


PROJECTORS = (Projector("gemma4v", {"gemma4": "gemma4_text"}, read_gemma4),)
