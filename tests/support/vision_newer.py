"""The particulars of vision model families that `vision_table` has no room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tests.support.vision_family import VOCAB_SIZE, Family

_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_GRID = [[28, 56], [56, 28], [56, 56]]

_MINICPM_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip


def _minicpm(stem: str, rope: Mapping[str, Any], ids: Mapping[str, int]) -> Family:
    text = {
        **_TEXT, "model_type": "qwen3_5_text", "num_hidden_layers": 3, "head_dim": 16,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **rope,
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 7,
    }  # fmt: skip
    return Family(
        f"{stem}ForConditionalGeneration",
        {"text_config": text, "vision_config": vision, "insert_layer_id": 1, **ids},
        "MiniCPMV4_6ImageProcessor",
        {"scale_resolution": 56, "max_slice_nums": 4, "patch_size": 7},
        tokens=_MINICPM_TOKENS,
    )


_LLAMA4_TOKENS = {
    "image_token": "<|image|>", "boi_token": "<|image_start|>", "eoi_token": "<|image_end|>",
    "patch_token": "<|patch|>", "x_token": "<|tile_x_separator|>", "y_token": "<|tile_y_separator|>",
}  # fmt: skip

_IDEFICS2 = Family(
    "Idefics2ForConditionalGeneration",
    {
        "text_config": {
            **_TEXT,
            "model_type": "mistral",
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": None,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 7,
        },
        "perceiver_config": {
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
    },
    "Idefics2ImageProcessor",
    {"size": {"shortest_edge": 21, "longest_edge": 56}, "do_image_splitting": False},
    {"image_seq_len": 4},
    {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
    ("<end_of_utterance>",),
)

NEWER: Mapping[str, Family] = {
    "idefics2": _IDEFICS2,
    "idefics2_split": dataclasses.replace(
        _IDEFICS2, preprocessor={**_IDEFICS2.preprocessor, "do_image_splitting": True}
    ),
    "llama4": Family(
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "model_type": "llama4_text",
                "num_hidden_layers": 4,
                "head_dim": 16,
                "intermediate_size_mlp": 80,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "interleave_moe_layer_step": 2,
                "no_rope_layers": [1, 0, 1, 0],
                "attention_chunk_size": 40,
                "floor_scale": 24,
                "attn_scale": 0.4,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 128,  # that of the MLP after pixels are shuffled: 32 / 0.5**2
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
                "vision_output_dim": 40,
                "projector_input_dim": 40,
                "projector_output_dim": 40,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "Llama4ImageProcessorFast",
        {"size": {"height": 28, "width": 28}, "max_patches": 4, "resample": 2},
        {"patch_size": 7},
        _LLAMA4_TOKENS,
        image_key="image_token_index",
        image_token="<|patch|>",
    ),
    "mllama": Family(
        "MllamaForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "model_type": "mllama_text_model",
                "vocab_size": 405,  # logits; of the eight more embeddings, the first is the image's token
                "num_hidden_layers": 5,
                "cross_attention_layers": [1, 3],
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_global_layers": 2,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
                "intermediate_layers_indices": [0, 2],
                "vision_output_dim": 96,
            },
        },
        "MllamaImageProcessor",
        {"size": {"height": 28, "width": 28}, "max_image_tiles": 4},
        tokens={"image_token": "<|image|>", "python_token": "<|python_tag|>"},
        image_key="image_token_index",
        has_image_last=True,
    ),
    "granite4_vision": Family(
        "Granite4VisionForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "num_hidden_layers": 5,
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.2,
                "residual_multiplier": 0.5,
                "logits_scaling": 0.5,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
                "vision_use_head": False,
            },
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[-3, 0], [-2, 2]],
            "spatial_target_layers": [1, 3, 4, 2],
            "image_grid_pinpoints": _GRID,
            "vision_feature_select_strategy": "full",
        },
        "LlavaNextImageProcessor",
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": _GRID,
        },
        {"patch_size": 7, "vision_feature_select_strategy": "full", "downsample_rate": "2/4"},
        image_key="image_token_index",
    ),
    "minicpmv4_6": _minicpm("MiniCPMV4_6", {}, {}),
    # Positions with three axes, from the tokens around an image and its tiles.
    "minicpmv4_7": _minicpm(
        "MiniCPMV4_7",
        {"mrope_section": [1, 1, 2], "mrope_interleaved": True},
        {"image_start_id": 6, "image_end_id": 7, "slice_start_id": 8, "slice_end_id": 9, "newline_id": 210},
    ),
}
