"""The particulars of the vision model families that came with transformers 5.24, and of Ernie 4.5-VL.

Their decoders are those of `architecture_table`, with the vocabulary of `vision_family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support import architectures
from tests.support.vision_family import VOCAB_SIZE, Family

_MROPE: Mapping[str, Any] = {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
}  # fmt: skip
_TOWER: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
_QWEN_TOWER: Mapping[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
}  # fmt: skip
_SIZES: Mapping[str, Any] = {
    "size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": 4, "merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
_QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_GLM_TOKENS = {"image_token": "<|image|>", "video_token": "<|video|>"}
_GLM_AROUND: dict[str, Any] = {
    "others": ("<|begin_of_image|>", "<|end_of_image|>"), "before": "<|begin_of_image|>",
    "after": "<|end_of_image|>",
}  # fmt: skip
_PIXTRAL: dict[str, Any] = {
    "image_processor": "PixtralImageProcessor",
    "preprocessor": {"size": {"longest_edge": 56}, "patch_size": {"height": 7, "width": 7}},
    "processor": {"patch_size": 7, "spatial_merge_size": 2},
    "tokens": {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    "image_key": "image_token_index",
}
_PIXTRAL_TOWER = {
    **_TOWER, "model_type": "pixtral", "patch_size": 7, "image_size": 56, "head_dim": 16,
}  # fmt: skip

_OMNI_TOKENS = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
_OMNI_IDS = {
    "vision_start_token_id": 7, "vision_end_token_id": 8, "audio_start_token_id": 9,
    "audio_end_token_id": 10,
}  # fmt: skip
_OMNI_SOUND: Mapping[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "num_mel_bins": 16, "output_dim": 64,
}  # fmt: skip


def _text(like: str, **other: Any) -> dict[str, Any]:
    """Return the text configuration of a type, with other values.

    With the oldest transformers, which lacks some of these types, other families alone are tested.
    """
    if like not in CONFIG_MAPPING:
        return other
    pools = {name: other[name] for name in ("index_kpool",) if name in other}
    made = architectures.config(like, **pools).to_dict()
    for name in ("transformers_version", "_name_or_path", "architectures", "id2label", "label2id", "dtype"):
        made.pop(name, None)
    sizes = {"vocab_size": VOCAB_SIZE, "pad_token_id": 2, "max_position_embeddings": 2048}
    return {**made, **sizes, **other}


NEWEST: Mapping[str, Family] = {
    "cohere_compass": Family(
        "CohereCompassForConditionalGeneration",
        {
            "text_config": _text("cohere_compass_text"),
            "vision_config": {
                **_QWEN_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
            },
        },
        "CohereCompassImageProcessor",
        _SIZES,
        tokens={
            "image_token": "<|IMAGE_PAD|>", "video_token": "<|VIDEO_PAD|>",
            "vision_start_token": "<|VISION_START|>", "vision_end_token": "<|VISION_END|>",
        },
        before="<|VISION_START|>",
        after="<|VISION_END|>",
    ),
    # Its files name the processor: `transformers` has none for its type.
    "cosmos3_omni": Family(
        "Cosmos3OmniForConditionalGeneration",
        {
            "text_config": _text(
                "qwen3", model_type="qwen3_vl_text", rope_parameters={**_MROPE, "mrope_interleaved": True}
            ),
            "vision_config": {
                **_QWEN_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
            },
        },
        "Qwen2VLImageProcessor",
        _SIZES,
        {"processor_class": "Qwen3VLProcessor"},
        _QWEN_TOKENS,
    ),
    "glmga": Family(
        "Glm46VForConditionalGeneration",
        {
            "model_type": "glmga",
            "text_config": _text(
                "glm4", model_type="glm4v_text",
                rope_parameters={**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            ),
            "vision_config": {**_QWEN_TOWER, "image_size": 32},
        },
        "GlmgaImageProcessor",
        {"size": {"shortest_edge": 256, "longest_edge": 16384}, "patch_size": 4},
        tokens=_GLM_TOKENS,
        **_GLM_AROUND,
    ),
    "mistral4": Family(  # Mistral Small 4
        "Mistral3ForConditionalGeneration",
        {"text_config": _text("mistral4"), "spatial_merge_size": 2, "vision_config": _PIXTRAL_TOWER},
        **_PIXTRAL,
    ),
    "deepseek_vl_hybrid": Family(
        "DeepseekVLHybridForConditionalGeneration",
        {
            "text_config": _text("llama"),
            "vision_config": {
                **_TOWER, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7,
            },
            "high_res_vision_config": {
                "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64,
                "patch_size": 4, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1],
                "mlp_dim": 48,
            },
        },
        "DeepseekVLHybridImageProcessor",
        {
            "size": {"height": 28, "width": 28}, "high_res_size": {"height": 64, "width": 64},
            "min_size": 7,
        },
        {"num_image_tokens": 16},
        {"image_token": "<image_placeholder>"},
    ),
    # Decoders that keep more of a sequence than keys and values, so that sequences run one at a time.
    "dots3_note": Family(
        "Dots3NoteForConditionalGeneration",
        {
            "text_config": _text("dots3_note_text"),
            "vision_config": {
                **_TOWER, "patch_size": 4, "moe_intermediate_size": 24, "num_local_experts": 4,
                "mlp_layer_types": ["dense", "dense", "sparse"], "adapter_in_dim": 32,
                "adapter_out_dim": 64,
            },
            "audio_config": {
                "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32, "d_model": 16, "adapter_out_dim": 64,
            },
        },
        "Qwen2VLImageProcessor",
        {**_SIZES, "temporal_patch_size": 1},
        tokens={
            "image_token": "<|imgpad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_comp_pad|>",
        },
    ),
    "hy_v4_vl": Family(
        "HYV4VLForConditionalGeneration",
        {
            "text_config": _text(
                "hy_v4", model_type="hy_v4_vl_text", rope_parameters={**_MROPE, "mrope_section": [1, 1, 2]}
            ),
            "vision_config": {
                **_TOWER, "num_key_value_heads": 2, "patch_size": 4, "out_hidden_size": 64,
                "max_image_size": 64,
            },
        },
        "HYV4VLImageProcessor",
        {**_SIZES, "temporal_patch_size": 1},
        tokens={
            "image_token": "<img>", "video_token": "<vid>", "image_start_token": "<imgs>",
            "image_end_token": "<imge>",
        },
        before="<imgs>",
        after="<imge>",
    ),
    "glm5_next": Family(
        "Glm5NextForConditionalGeneration",
        {
            "text_config": _text("glm5_next_text", index_kpool=4),
            "vision_config": {**_QWEN_TOWER, "image_size": 32, "projection_intermediate_size": 48},
        },
        "Glm5NextImageProcessor",
        _SIZES,
        tokens=_GLM_TOKENS,
        **_GLM_AROUND,
    ),
    "qwen4_exp": Family(
        "Qwen4ExpForConditionalGeneration",
        {
            "text_config": _text(
                "qwen4_exp_text",
                rope_parameters={
                    **_MROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True,
                    "partial_rotary_factor": 0.5,
                },
            ),
            "vision_config": {**_QWEN_TOWER, "num_position_embeddings": 64},
        },
        "Qwen2VLImageProcessor",
        _SIZES,
        tokens=_QWEN_TOKENS,
    ),
    "mistral_large4": Family(
        "MistralLarge4ForConditionalGeneration",
        {
            "text_config": _text("mistral_large4_text"),
            "spatial_merge_size": 2,
            "vision_config": _PIXTRAL_TOWER,
        },
        **_PIXTRAL,
    ),
    # Positions of images that are found by the token before them.
    "qwen2_5_omni": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {
            "text_config": _text("qwen2", model_type="qwen2_5_omni_text", rope_parameters=_MROPE),
            "vision_config": {**_QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
            "audio_config": _OMNI_SOUND,
            **_OMNI_IDS,
        },
        "Qwen2VLImageProcessor",
        _SIZES,
        {"processor_class": "Qwen2_5OmniProcessor"},
        _OMNI_TOKENS,
        before="<|vision_bos|>",
        after="<|vision_eos|>",
    ),
    "qwen3_omni": Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": _text(
                "qwen3_moe", model_type="qwen3_omni_moe_text",
                rope_parameters={**_MROPE, "mrope_interleaved": True},
            ),
            "vision_config": {
                **_QWEN_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
            },
            "audio_config": {**_OMNI_SOUND, "downsample_hidden_size": 16},
            **_OMNI_IDS,
        },
        "Qwen2VLImageProcessor",
        _SIZES,
        {"processor_class": "Qwen3OmniMoeProcessor"},
        _OMNI_TOKENS,
        before="<|vision_bos|>",
        after="<|vision_eos|>",
    ),
    # Image tokens, and those around an image, have experts of their own.
    "ernie4_5_vl": Family(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": _text(
                "ernie4_5_moe", model_type="ernie4_5_vl_moe_text", moe_intermediate_size=[48, 32],
                moe_num_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"],
                rope_parameters={**_MROPE, "mrope_section": [3, 3, 2]}, tie_word_embeddings=False,
            ),
            "vision_config": {**_QWEN_TOWER, "temporal_merge_size": 2},
            "tie_word_embeddings": False,
        },
        "Ernie4_5_VLMoeImageProcessor",
        {**_SIZES, "temporal_patch_size": 1},
        tokens={
            "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
        },
        before="<|IMAGE_START|>",
        after="<|IMAGE_END|>",
    ),
}  # fmt: skip
