"""The particulars of each architecture of `AutoModelForCausalLM`, the data that `architectures` builds from.

To add one, name it in `TYPES`, and add an entry to `CONFIG` if the rules of `architectures` do not suffice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES: tuple[str, ...] = tuple(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert
    bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom blt camembert
    codegen cohere cohere2 cohere2_moe cohere_compass_text cpmant ctrl cwm data2vec-text dbrx deepseek_v2
    deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note dots3_note_text dory electra emu3
    ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint
    fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text
    gemma4_unified gemma4_unified_assistant gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite
    glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_loop_text inkling2_text inkling_text
    internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3
    llama llama4 llama4_text longcat_flash mamba mamba2 marian mbart megatron-bert mellum mimo_v2_flash
    minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama
    modernbert-decoder moshi moss_transcribe_diarize mpt musicgen musicgen_melody mvp nanochat nemotron
    nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3
    phi4_multimodal phimoe plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma reformer rembert roberta
    roberta-prelayernorm roc_bert roformer rwkv sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm
    starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod youtu zamba
    zamba2 zaya
""".split()  # noqa: SIM905 -- a paragraph, not a page
)

_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.35,  # the usual scale would be 0.25
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
}
_SLIDING_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
_QWEN2_WINDOW = {
    "use_sliding_window": True,
    "sliding_window": 12,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
_GATED_DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}
_GEMMA4 = {
    "layer_types": _SLIDING_FULL,
    "global_head_dim": 32,  # of the layers with full attention
    "use_bidirectional_attention": None,
}
_BLT_PART = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}

# Overrides the values that `architectures` uses for every type. `time_step_min`: transformers clamps time
# steps from below when it scans but not when it steps, a difference of up to 6e-3 of the largest logit; this
# value is too small to clamp anything.
CONFIG: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "blt": {
        "vocab_size": 320,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": _BLT_PART,
        "encoder_config": {**_BLT_PART, "hidden_size_global": 64, "cross_attn_k": 2},
        "decoder_config": {**_BLT_PART, "hidden_size_global": 64, "cross_attn_k": 2},
        "global_config": _BLT_PART,
    },
    "cohere_compass_text": {
        "layer_types": _SLIDING_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "full_attention": None,  # no positions
        },
    },
    "codegen": {"rotary_dim": 8},
    "cpmant": {"dim_head": 16, "prompt_length": 4, "position_bias_max_distance": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "compressed_sparse_attention",
        ],
        "num_hidden_layers": 4,
        "mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
        "index_topk": 4,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "initializer_range": 1.0,  # parameters are divided by it, and squared
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "head_dim": 16,
        "shared_experts_intermediate_size": 48,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9], "key_multiplier": 0.5},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 16,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
    },
    "gemma4_unified_text": _GEMMA4,
    "git": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 32,
        }
    },
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["local"], 1]], "num_layers": 3},
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": {**_GRANITE, "shared_intermediate_size": 48},
    "granitemoehybrid": {
        **_GRANITE,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "granitemoeshared": {**_GRANITE, "shared_intermediate_size": 48},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {
        "rel_extent": 16,
        "unpadded_vocab_size": 310,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "inkling2_text": {"rel_extent": 16, "unpadded_vocab_size": 310, "n_layers_per_attn_res_block": 2},
    "inkling_text": {"rel_extent": 16, "unpadded_vocab_size": 310},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 16, "num_attention_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0, 1, 0],
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16, "layer_types": _SLIDING_FULL},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rotary_dim": 8,
        "index_n_heads": 4,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "n_groups": 2,
        "time_step_min": 1e-30,
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "crop_size": 32,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "add_cross_attention": False,
    },
    "qwen2": _QWEN2_WINDOW,
    "qwen2_moe": {**_QWEN2_WINDOW, "mlp_only_layers": [1]},
    "qwen3": {**_QWEN2_WINDOW, "head_dim": 32},
    "qwen3_5_moe_text": {**_GATED_DELTA, **_MROPE},
    "qwen3_5_text": {**_GATED_DELTA, **_MROPE},
    "qwen3_next": {**_GATED_DELTA, "mlp_only_layers": [1]},
    "qwen4_exp_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16,
        "num_buckets": 4,
        "hash_seed": 1,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 320,
        "shape_embed_dim": 16,
        "shape_vocab_size": 320,
    },
    "rwkv": {"attention_hidden_size": 64, "rescale_every": 2},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni", "d_inner": 96, "d_head": 16},
    "xlstm": {"num_blocks": 2, "num_hidden_layers": 2, "qk_dim_factor": 1.0},  # its cache needs these
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "num_key_value_heads": 4,
        "adapter_rank": 8,
        "num_mem_blocks": 2,
        "time_step_min": 1e-30,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "router_hidden_size": 16,
        "sliding_window": 12,
    },
}

# Reasons why a type has no checkpoint.
NOT_BUILT: Mapping[str, str] = {
    "dots3_note": "composite: its text model is dots3_note_text",
    "emu3": "composite: images are tokens here, its text model is llama's",
    "fuyu": "composite: its text model is persimmon",
    "gemma3": "composite: its text model is gemma3_text",
    "gemma3n": "composite: its text model is gemma3n_text; needs timm",
    "gemma4": "composite: its text model is gemma4_text",
    "gemma4_assistant": "a drafter: reads another model's hidden states and cache",
    "gemma4_unified": "composite: its text model is gemma4_unified_text",
    "gemma4_unified_assistant": "a drafter: reads another model's hidden states and cache",
    "got_ocr2": "composite: its text model is qwen2",
    "llama4": "composite: its text model is llama4_text",
    "mllama": "composite: its text model skips cross-attention if there are no images",
    "moss_transcribe_diarize": "composite: its text model is qwen3",
    "musicgen": "no text: sound codebooks, several of whose ids make one position",
    "musicgen_melody": "no text: sound codebooks, several of whose ids make one position",
    "qwen3_5": "composite: its text model is qwen3_5_text",
    "qwen3_5_moe": "composite: its text model is qwen3_5_moe_text",
    "qwen4_exp": "composite: its text model is qwen4_exp_text",
}

# Types whose logits depend on later tokens: no server can compute these token by token.
NO_REFERENCE: Mapping[str, str] = {
    "cpmant": "a prompt's tokens see each other both ways",
    "prophetnet": "the logits change with the length of what follows, whatever it is",
}

# Types whose own transformers cache, fed a prompt and then token by token, differs from `reference`.
WRONG_CACHE: Mapping[str, str] = {
    "bamba": "positions begin anew at each call, unless given",
    "blt": "its cache cannot be made from its configuration",
    "cpmant": NO_REFERENCE["cpmant"],
    "moshi": "the cache slides, the mask does not",
    "openai-gpt": "has none",
    "prophetnet": "refuses its own positions",
    "recurrent_gemma": "the state is in the modules, no cache comes back",
    "xlm": "has none",
}

# Types whose transformers cache agrees token by token, but not when the prompt comes in several chunks.
WRONG_CHUNKS: Mapping[str, str] = {
    **dict.fromkeys(("falcon_mamba", "jamba", "mamba", "zamba"), "the scan begins without the state"),
    "reformer": "goes on with one token only",
}
