"""Qwen 2-VL, 2.5-VL, 3-VL and 3.5: towers for images of any size, whose patches are two frames deep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.gguf_vision.projector import (
    Projector,
    TextFile,
    TowerNames,
    TowerSizes,
    VisionModel,
    check_stored,
    check_width,
    read_sizes,
)
from tgi_asgi.models.reader import Reader
from tgi_asgi.ops.arrays import Floats

_TOWER = "model.visual."
_IMAGE, _VIDEO, _START, _END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
_MERGE = 2  # patches of a side that become one token, in all published models
_WINDOW = 112  # pixels of a side in Qwen 2.5-VL's windows; llama.cpp's files do not say it
_MAX_WINDOW = 1 << 14
# Pixels of an image after resizing, at least and at most: those of the published processors.
_PIXELS_OF_2 = (56 * 56, 28 * 28 * 16384)
_PIXELS_OF_3 = (256 * 256, 4096 * 4096)
_ARCHITECTURES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
}
_DEEP = ("qwen3_vl_text", "qwen3_vl_moe_text")  # models that take rows of several of the tower's layers
_LAYERS = {
    "norm1": "v.blk.{}.ln1",
    "norm2": "v.blk.{}.ln2",
    "attn.proj": "v.blk.{}.attn_out",
}
_JOINED = ("v.blk.{}.attn_q", "v.blk.{}.attn_k", "v.blk.{}.attn_v")
_MAX_SHORTEST, _MAX_PIXELS = 1 << 22, 1 << 28  # smaller images are enlarged to the first at most


def read_qwen2_vl(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a Qwen 2-VL."""
    sizes = read_sizes(reader, file)
    check(
        sizes.mlp_width % sizes.width == 0,
        f"an MLP of {sizes.mlp_width} is not a multiple of the width {sizes.width}",
    )
    mlp = {"mlp.fc1": "v.blk.{}.ffn_up", "mlp.fc2": "v.blk.{}.ffn_down"}
    vision = {
        **_vision_config(sizes),
        "embed_dim": sizes.width,
        "hidden_size": text.config["hidden_size"],
        "mlp_ratio": sizes.mlp_width // sizes.width,
    }
    names = _names_of_2(file, sizes, mlp)
    return _model(reader, file, text, sizes, vision, names, _PIXELS_OF_2)


def read_qwen2_5_vl(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a Qwen 2.5-VL: most of the tower's layers attend in windows."""
    sizes = read_sizes(reader, file)
    period = reader.positive("n_wa_pattern", sizes.num_layers)
    window = reader.integer("window_size", _WINDOW)
    least = sizes.patch_size * _MERGE
    check(least <= window <= _MAX_WINDOW, f"window_size must be in {least}..{_MAX_WINDOW}, got {window}")
    mlp = {
        "mlp.gate_proj": "v.blk.{}.ffn_gate",
        "mlp.up_proj": "v.blk.{}.ffn_up",
        "mlp.down_proj": "v.blk.{}.ffn_down",
    }
    vision = {
        **_vision_config(sizes),
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp_width,
        "out_hidden_size": text.config["hidden_size"],
        "window_size": window,
        "fullatt_block_indexes": list(range(period - 1, sizes.num_layers, period)),
    }
    names = _names_of_2(file, sizes, mlp)
    return _model(reader, file, text, sizes, vision, names, _PIXELS_OF_2)


def read_qwen3_vl(reader: Reader, file: GgufFile, text: TextFile) -> VisionModel:
    """Return a Qwen 3-VL: rows of some of the tower's layers are added after the decoder's first ones.

    A Qwen 3.5 is the same without those.
    """
    sizes = read_sizes(reader, file)
    reader.require(spatial_merge_size=_MERGE)
    given = reader.get("is_deepstack_layers")
    flags = given if isinstance(given, list) else []
    check(
        len(flags) == sizes.num_layers and all(type(each) is bool for each in flags),
        f"is_deepstack_layers must say something of {sizes.num_layers} layers, got {str(given)[:100]}",
    )
    deep = [layer for layer, is_deep in enumerate(flags) if is_deep]
    check(
        not deep or text.config["model_type"] in _DEEP,
        f"is_deepstack_layers names {len(deep)} layers, but this text model takes rows of the last only",
    )
    check(
        len(deep) <= text.config["num_hidden_layers"],
        f"rows of {len(deep)} layers cannot be added to {text.config['num_hidden_layers']}",
    )
    check_stored(file, "v.position_embd.weight", (sizes.side**2, sizes.width))
    vision = {
        **_vision_config(sizes),
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp_width,
        "out_hidden_size": text.config["hidden_size"],
        "num_position_embeddings": sizes.side**2,
        **({"deepstack_visual_indexes": deep} if text.config["model_type"] in _DEEP else {}),
        "hidden_act": "gelu_pytorch_tanh",
    }
    names = TowerNames(file, sizes)
    layers = {
        **_LAYERS,
        "attn.qkv": "v.blk.{}.attn_qkv",
        "mlp.linear_fc1": "v.blk.{}.ffn_up",
        "mlp.linear_fc2": "v.blk.{}.ffn_down",
    }
    names.add({f"{_TOWER}blocks.{{}}.{own}": name for own, name in layers.items()})
    names.add({
        f"{_TOWER}pos_embed": "v.position_embd",
        f"{_TOWER}merger.norm": "v.post_ln",
        f"{_TOWER}merger.linear_fc1": "mm.0",
        f"{_TOWER}merger.linear_fc2": "mm.2",
    })  # fmt: skip
    for index, layer in enumerate(deep):
        merger = f"{_TOWER}deepstack_merger_list.{index}."
        parts = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
        names.add({f"{merger}{own}": f"v.deepstack.{layer}.{stored}" for own, stored in parts.items()})
    return _model(reader, file, text, sizes, vision, names, _PIXELS_OF_3)


def _vision_config(sizes: TowerSizes) -> dict[str, Any]:
    return {
        "depth": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "patch_size": sizes.patch_size,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": 2,
    }


def _names_of_2(file: GgufFile, sizes: TowerSizes, mlp: Mapping[str, str]) -> TowerNames:
    """Return the names of Qwen 2's and 2.5's towers, whose attention the converter takes apart."""
    names = TowerNames(file, sizes)
    names.add({f"{_TOWER}blocks.{{}}.{own}": name for own, name in {**_LAYERS, **mlp}.items()})
    names.add_joined(f"{_TOWER}blocks.{{}}.attn.qkv", *_JOINED)
    names.add({
        f"{_TOWER}merger.ln_q": "v.post_ln",
        f"{_TOWER}merger.mlp.0": "mm.0",
        f"{_TOWER}merger.mlp.2": "mm.2",
    })  # fmt: skip
    return names


def _model(
    reader: Reader, file: GgufFile, text: TextFile, sizes: TowerSizes, vision: dict[str, Any],
    names: TowerNames, pixels: tuple[int, int],
) -> VisionModel:  # fmt: skip
    """Return what is the same for all of them."""
    frames = ("v.patch_embd.weight", "v.patch_embd.weight.1")
    size, channels = sizes.patch_size, 3
    for frame in frames:
        check_stored(file, frame, (sizes.width, channels, size, size))
    names.add({f"{_TOWER}patch_embed.proj": "v.patch_embd"})
    shape = (sizes.width, channels, len(frames), size, size)
    names.add_one(f"{_TOWER}patch_embed.proj.weight", *frames, make=_stacked, shape=shape)
    check_width(file, "mm.2.weight", text)
    reader.ignore("projection_dim")
    shortest, longest = (
        reader.integer(key, default)
        for key, default in zip(("image_min_pixels", "image_max_pixels"), pixels, strict=True)
    )
    check(
        0 < shortest <= longest <= _MAX_PIXELS and shortest <= _MAX_SHORTEST,
        f"image_min_pixels and image_max_pixels cannot be {shortest} and {longest}",
    )
    others = {"video_token_id": _VIDEO, "vision_start_token_id": _START, "vision_end_token_id": _END}
    ids = {key: text.find_token(each) for key, each in others.items()}
    kind = text.config["model_type"].removesuffix("_text")
    architecture = _ARCHITECTURES[kind]
    config = {
        "model_type": kind,
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "text_config": dict(text.config),
        "vision_config": vision,
        "image_token_id": text.token_id(_IMAGE),
        **{key: token_id for key, token_id in ids.items() if token_id is not None},
        "tie_word_embeddings": text.config["tie_word_embeddings"],
    }
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": shortest, "longest_edge": longest},
        "patch_size": size,
        "merge_size": _MERGE,
        "temporal_patch_size": len(frames),
        **sizes.normal,
    }
    tokens = {"image_token": _IMAGE} | ({"video_token": _VIDEO} if ids["video_token_id"] is not None else {})
    return VisionModel(
        config, "model.language_model.", names.finish(), preprocessor, {}, tokens,
        chat_text=f"{_START}{_IMAGE}{_END}",
    )  # fmt: skip


def _stacked(*frames: Floats) -> Floats:
    """Return the weights [n, 3, 2, p, p] of a convolution over two frames, of those for each."""
    found: Floats = np.stack([each.reshape(each.shape[0], 3, *each.shape[-2:]) for each in frames], axis=2)
    return found


PROJECTORS = (
    Projector("qwen2vl_merger", {"qwen2vl": "qwen2_vl_text"}, read_qwen2_vl),
    Projector("qwen2.5vl_merger", {"qwen2vl": "qwen2_5_vl_text"}, read_qwen2_5_vl),
    Projector(
        "qwen3vl_merger",
        {
            "qwen3vl": "qwen3_vl_text",
            "qwen3vlmoe": "qwen3_vl_moe_text",
            "qwen35": "qwen3_5_text",
            "qwen35moe": "qwen3_5_moe_text",
        },
        read_qwen3_vl,
    ),
)
