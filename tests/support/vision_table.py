"""The particulars of each vision model family: a tiny configuration, a processor, its special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.vision_family import VOCAB_SIZE, Family
from tests.support.vision_newer import NEWER
from tests.support.vision_newest import NEWEST
from tests.support.vision_ocr import OCR

_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_QWEN2 = {**_LLAMA, "model_type": "qwen2"}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **_VIT}
_SIGLIP = {"model_type": "siglip_vision_model", **_VIT}
_QWEN_VIT = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
_QWEN2_VIT = {
    "depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_MISTRAL = {**_LLAMA, "model_type": "mistral", "sliding_window": None}
_PIXTRAL_VIT = {"model_type": "pixtral", **_VIT, "image_size": 56, "head_dim": 16}
_PIXTRAL_IMAGES: dict[str, Any] = {
    "image_processor": "PixtralImageProcessor",
    "preprocessor": {"size": {"longest_edge": 56}, "patch_size": {"height": 7, "width": 7}},
    "tokens": {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_QWEN3_5 = {
    **_LLAMA, "model_type": "qwen3_5_text", "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {
        **_MROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
_QWEN_SIZES = {
    "size": {"shortest_edge": 256, "longest_edge": 4096},
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
# Image settings common to Qwen and its variants.
_QWEN_IMAGES: dict[str, Any] = {
    "image_processor": "Qwen2VLImageProcessor",
    "preprocessor": _QWEN_SIZES,
    "tokens": _QWEN_TOKENS,
    "others": ("<|vision_start|>", "<|vision_end|>"),
    "before": "<|vision_start|>",
    "after": "<|vision_end|>",
}
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]

_SIDE = {"height": 28, "width": 28}
_LFM2_IMAGES = {
    "size": _SIDE, "tile_size": 28, "encoder_patch_size": 7, "downsample_factor": 2, "min_image_tokens": 2,
    "max_image_tokens": 6, "max_tiles": 4, "return_row_col_info": True,
}  # fmt: skip
_GRID = [[28, 56], [56, 28], [56, 56]]
_IDEFICS: dict[str, Any] = {
    "config": {
        "text_config": _LLAMA,
        "scale_factor": 2,
        "vision_config": {**_VIT, "image_size": 28, "patch_size": 7},
    },
    "preprocessor": {
        "size": {"longest_edge": 56},
        "max_image_size": {"longest_edge": 28},
        "do_image_splitting": True,
    },
    "processor": {"image_seq_len": 4},
    "tokens": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
    },
    "others": ("<end_of_utterance>", *_TILES),
}


_GEMMA4_TOKENS = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>",
}  # fmt: skip


def _gemma4(text: Mapping[str, Any]) -> Family:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = {
        **_LLAMA, "model_type": "gemma4_text", "sliding_window": 12, "vocab_size_per_layer_input": VOCAB_SIZE,
        "num_kv_shared_layers": 0, "global_head_dim": 16, "layer_types": kinds, "num_hidden_layers": 4,
        "tie_word_embeddings": True, **text,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64,
        "pooling_kernel_size": 2,
    }  # fmt: skip
    return Family(
        "Gemma4ForConditionalGeneration",
        {"text_config": text, "vision_config": vision, "audio_config": None},
        "Gemma4ImageProcessor",
        {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        {"image_seq_length": 70},
        _GEMMA4_TOKENS,
    )


_INTERNVL: Mapping[str, Any] = {
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
    "vision_config": {**_VIT, "image_size": [28, 28], "patch_size": [7, 7]},
}
_INTERNVL_TILES: Mapping[str, Any] = {
    "size": _SIDE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4,
}  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    "smolvlm": Family("SmolVLMForConditionalGeneration", image_processor="SmolVLMImageProcessor", **_IDEFICS),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration", image_processor="Idefics3ImageProcessor", **_IDEFICS
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": _CLIP, "image_seq_length": 16},
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 28}, "crop_size": _SIDE},
        {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        image_key="image_token_index",
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        {
            "text_config": _LLAMA,
            "vision_config": _CLIP,
            "image_seq_length": 16,
            "image_grid_pinpoints": _GRID,
        },
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 28}, "crop_size": _SIDE, "image_grid_pinpoints": _GRID},
        {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        image_key="image_token_index",
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        {
            "text_config": _QWEN2,
            "vision_config": {**_SIGLIP, "vision_use_head": False},
            "image_grid_pinpoints": _GRID,
        },
        "LlavaOnevisionImageProcessor",
        {"size": _SIDE, "image_grid_pinpoints": _GRID},
        {
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        {"image_token": "<image>", "video_token": "<video>"},
        image_key="image_token_index",
    ),
    "pixtral": Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": _MISTRAL,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_config": _PIXTRAL_VIT,
        },
        **_PIXTRAL_IMAGES,
        processor={"patch_size": 7, "processor_class": "PixtralProcessor"},
        image_key="image_token_index",
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": _MISTRAL,
            "spatial_merge_size": 2,
            "vision_config": _PIXTRAL_VIT,
        },
        **_PIXTRAL_IMAGES,
        processor={"patch_size": 7, "spatial_merge_size": 2},
        image_key="image_token_index",
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        {
            "text_config": _QWEN2,
            **_INTERNVL,
        },
        "GotOcr2ImageProcessor",
        _INTERNVL_TILES,
        {"image_seq_length": 4},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        placeholder="context_image_token",
    ),
    "aya_vision": Family(
        "AyaVisionForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "cohere2", "sliding_window": 12, "logit_scale": 0.5},
            "vision_config": {**_SIGLIP, "vision_use_head": False},
        },
        "GotOcr2ImageProcessor",
        {"size": _SIDE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        {"patch_size": 14, "img_size": 28, "downsample_factor": 1},
        others=(
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_PATCH|>",
            "<|IMG_LINE_BREAK|>",
            "TILE_GLOBAL",
            *(f"TILE_{i}" for i in range(1, 5)),
        ),
        image_key="image_token_index",
        image_token="<|IMG_PATCH|>",
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "qwen2_vl_text", "rope_parameters": _MROPE},
            "vision_config": _QWEN2_VIT,
        },
        **_QWEN_IMAGES,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VIT, "window_size": 16, "fullatt_block_indexes": [1]},
        },
        **_QWEN_IMAGES,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "model_type": "qwen3_vl_text",
                "rope_parameters": {**_MROPE, "mrope_interleaved": True},
            },
            "vision_config": {**_QWEN_VIT, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        },
        **_QWEN_IMAGES,
    ),
    "glm4v": Family(
        "Glm4vForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "model_type": "glm4v_text",
                "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            },
            "vision_config": {**_QWEN_VIT, "image_size": 32},
        },
        "Glm4vImageProcessor",
        _QWEN_SIZES,
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        others=("<|begin_of_image|>", "<|end_of_image|>"),
        before="<|begin_of_image|>",
        after="<|end_of_image|>",
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": _QWEN3_5,
            "vision_config": {**_QWEN_VIT, "num_position_embeddings": 64},
        },
        **_QWEN_IMAGES,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {
                **_QWEN3_5,
                "model_type": "qwen3_5_moe_text",
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
            },
            "vision_config": {**_QWEN_VIT, "num_position_embeddings": 64},
        },
        **_QWEN_IMAGES,
    ),
    "lfm2_vl": Family(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention", "conv"],
                "block_auto_adjust_ff_dim": False,
                "block_ff_dim": 96,
            },
            "vision_config": {
                "model_type": "siglip2_vision_model",
                **_VIT,
                "num_patches": 16,
                "vision_use_head": False,
            },
            "downsample_factor": 2,
            "projector_hidden_size": 48,
        },
        "Lfm2VlImageProcessor",
        _LFM2_IMAGES,
        tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        others=tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "model_type": "gemma3_text",
                "sliding_window": 12,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "tie_word_embeddings": True,
            },
            "vision_config": {**_SIGLIP, "vision_use_head": False},
            "mm_tokens_per_image": 16,
        },
        "Gemma3ImageProcessor",
        {"size": _SIDE},
        {"image_seq_length": 16},
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        placeholder="boi_token",
        image_token="<image_soft_token>",
    ),
    "gemma4": _gemma4({"hidden_size_per_layer_input": 32}),
    "gemma4_large": _gemma4({"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}),
    "gemma4_unified": Family(
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "model_type": "gemma4_unified_text",
                "sliding_window": 40,
                "global_head_dim": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 70,
                "output_proj_dims": 32,
            },
            "audio_config": None,
        },
        "Gemma4UnifiedImageProcessor",
        {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 30},
        tokens=_GEMMA4_TOKENS,
    ),
    "cohere2_vision": Family(
        "Cohere2VisionForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "cohere2", "sliding_window": 12, "logit_scale": 0.5},
            "vision_config": {**_SIGLIP, "vision_use_head": False},
            "alignment_intermediate_size": 48,
        },
        "Cohere2VisionImageProcessor",
        {"size": _SIDE, "max_patches": 4, "patch_size": 2},
        tokens={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
    ),
    "ovis2": Family(
        "Ovis2ForConditionalGeneration",
        {
            "text_config": _QWEN2,
            "hidden_size": 64,
            "vocab_size": VOCAB_SIZE,
            # The places of `others` among the special tokens: after <s>, </s>, <pad>, <unk> and <image>.
            "visual_indicator_token_ids": [5, 6, 7, 8, 9],
            "vision_config": {**_VIT, "vocab_size": 40, "num_visual_indicator_tokens": 5, "hidden_stride": 2},
        },
        "Ovis2ImageProcessor",
        {"size": _SIDE, "crop_to_patches": True, "max_patches": 4},
        {"image_seq_length": 4},
        others=("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "<IMG_ATOM>"),
        image_token="<IMG_ATOM>",
    ),
    "hunyuan_vl": Family(
        "HunYuanVLForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]}},
            "vision_config": {
                **{key: value for key, value in _VIT.items() if key != "image_size"},
                "patch_size": 4,
                "out_hidden_size": 64,
                "max_image_size": 64,
                "text_hidden_size": 64,
            },
        },
        "HunYuanVLImageProcessor",
        {**_QWEN_SIZES, "temporal_patch_size": 1},
        tokens={"image_token": "<img>", "image_start_token": "<imgs>", "image_end_token": "<imge>"},
        before="<imgs>",
        after="<imge>",
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "gemma", "tie_word_embeddings": True},
            "projection_dim": 64,
            "vision_config": {**_SIGLIP, "vision_use_head": False, "projection_dim": 64},
            "hidden_size": 64,
        },
        "SiglipImageProcessor",
        {"size": _SIDE, "image_seq_length": 16},
        image_key="image_token_index",
    ),
    "deepseek_vl": Family(
        "DeepseekVLForConditionalGeneration",
        {"text_config": _LLAMA, "vision_config": {**_SIGLIP, "vision_use_head": False}},
        "DeepseekVLImageProcessor",
        {"size": _SIDE, "min_size": 14},
        {"num_image_tokens": 16},
        {"image_token": "<image_placeholder>"},
    ),
    "qianfan_ocr": Family(
        "QianfanOCRForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "qwen3"},
            **_INTERNVL,
        },
        "GotOcr2ImageProcessor",
        _INTERNVL_TILES,
        {"image_seq_length": 4},
        {
            "image_token": "<image>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
        image_token="<IMG_CONTEXT>",
    ),
    **NEWER,
    **NEWEST,
    **OCR,
}
