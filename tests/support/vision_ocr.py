"""The particulars of vision model families that read pages: their text models are small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.vision_family import VOCAB_SIZE, Family

_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_TOWER: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
_SIZES: Mapping[str, Any] = {
    "size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": 4, "merge_size": 2,
}  # fmt: skip

OCR: Mapping[str, Family] = {
    "glm_ocr": Family(
        "GlmOcrForConditionalGeneration",
        {
            "text_config": {
                **_TEXT, "model_type": "glm_ocr_text",
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "image_size": 32,
                "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            },
        },
        "Glm46VImageProcessor",
        {**_SIZES, "temporal_patch_size": 2},
        {"processor_class": "Glm46VProcessor"},
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        others=("<|begin_of_image|>", "<|end_of_image|>"),
        before="<|begin_of_image|>",
        after="<|end_of_image|>",
    ),
    # Its decoder multiplies all rows, those of images, too.
    "granite_vision": Family(
        "LlavaNextForConditionalGeneration",
        {
            "text_config": {
                **_TEXT, "model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.3,
                "attention_multiplier": 0.2, "logits_scaling": 4.0,
            },
            "vision_config": {
                **_TOWER, "model_type": "clip_vision_model", "projection_dim": 32,
                "image_size": 28, "patch_size": 7,
            },
            "image_seq_length": 16,
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        "LlavaNextImageProcessor",
        {
            "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        image_key="image_token_index",
    ),
    "lighton_ocr": Family(
        "LightOnOcrForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "qwen3"},
            "vision_config": {
                **_TOWER, "model_type": "pixtral", "patch_size": 7, "image_size": 56, "head_dim": 16,
            },
        },
        "PixtralImageProcessor",
        {"size": {"longest_edge": 56}, "patch_size": {"height": 7, "width": 7}},
        {"patch_size": 7, "spatial_merge_size": 2},
        {
            "image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
    ),
    "paddleocr_vl": Family(
        "PaddleOCRVLForConditionalGeneration",
        {
            "text_config": {
                **_TEXT, "model_type": "paddleocr_vl_text",
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": {**_TOWER, "image_size": 32, "patch_size": 4},
        },
        "PaddleOCRVLImageProcessor",
        {**_SIZES, "temporal_patch_size": 1},
        tokens={"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|video_pad|>"},
        others=("<|IMAGE_START|>", "<|IMAGE_END|>"),
        before="<|IMAGE_START|>",
        after="<|IMAGE_END|>",
    ),
}  # fmt: skip
