"""Models without a class in `transformers`, each made from one of its models that computes the same.

A `LikeLlama` says which model that is, and how its tensors and keys become those of the published checkpoint,
which llama.cpp's converter then reads, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor

from tests.support.family_case import BASE, FamilyCase, Fault
from tests.support.family_files import Reference, checkpoint, convert, faulty_checkpoint, reference
from tests.support.family_maker import save_tokenizer
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.alibi import alibi_slopes

Tensors = dict[str, Tensor]
_FORMS = ("f32", "q8_0")
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "n_embd", "n_layer", "n_head", "n_positions", "d_model", "n_layers", "n_heads", "max_seq_len",
    "ffn_config", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LikeLlama:
    """One model.

    Attributes:
        same: The model of `transformers` that computes the same; its matrices are exact in the types that it
            lists.
        names: Its tensors' names in the published checkpoint, by patterns (`re.sub`), in order.
        config: The published config.json, besides sizes; None: the file has no such key.
        edit: Further changes to the tensors, before they are renamed.
        has_slopes: Whether positions are linear biases, in which case the other model's are taken out.
        has_unit_head: Whether the head's rows are scaled to the length 1.
        zeros: A pattern of tensors that must be zeros for the two to be the same.
        is_read: Whether the published checkpoint is read natively, not only its GGUF file.
    """

    name: str
    architecture: str
    same: FamilyCase
    config: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    edit: Callable[[Tensors, Mapping[str, Any]], Tensors] = lambda tensors, config: tensors
    has_slopes: bool = False
    has_unit_head: bool = False
    zeros: str = ""
    is_read: bool = True

    @property
    def published(self) -> dict[str, Any]:
        """The published config.json."""
        sizes = {key: value for key, value in self.same.config.items() if key in _SIZES}
        given = {"architectures": [self.architecture], **sizes, **self.config}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of files that are read."""
        return (("safetensors",) if self.is_read else ()) + self.same.gguf


def make(case: LikeLlama, folder: Path) -> Reference:
    """Write the checkpoint and its GGUF files to a folder; return what the other model gives."""
    source = checkpoint(case.same).path
    if case.zeros:
        source = faulty_checkpoint(case.same, Fault("zeros", tensors=case.zeros)).path
    tensors = case.edit(safetensors.torch.load_file(source / "model.safetensors"), case.same.config)
    published = folder / "published"
    published.mkdir(parents=True)
    renamed = {_rename(name, case.names): tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, published / "model.safetensors", {"format": "pt"})
    (published / "config.json").write_text(json.dumps(case.published), encoding="utf-8")
    save_tokenizer(published)
    if case.same.gguf:
        convert(published, case.same.gguf, folder)
    return _reference(case, source)


def _rename(name: str, names: Mapping[str, str]) -> str:
    for pattern, new in names.items():
        name = re.sub(pattern, new, name)
    return name


def _reference(case: LikeLlama, source: Path) -> Reference:
    ids = reference(case.same).all_ids
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if case.has_unit_head:
        model.lm_head.weight.data = torch.nn.functional.normalize(model.lm_head.weight.data)
    mask = None
    if case.has_slopes:
        model.model.rotary_emb.inv_freq.zero_()  # heads then turn by no angle
        distance = torch.arange(len(ids))[None, :] - torch.arange(len(ids))[:, None]  # [query, key]
        slopes = torch.tensor(alibi_slopes(case.same.config["num_attention_heads"]))
        biases = slopes[:, None, None] * distance
        mask = biases.masked_fill(distance > 0, torch.finfo(torch.float32).min)[None]
    with torch.inference_mode():
        found = model(torch.tensor([ids]), attention_mask=mask).logits[0].double().log_softmax(-1)
    logprobs: np.ndarray = found.float().numpy()
    return Reference(ids, [int(logprobs[-1].argmax())], logprobs)


def files_of(case: LikeLlama, form: str, folder: Path) -> ModelFiles:
    """Return files that `make` has written."""
    if form == "safetensors":
        return ModelFiles(case.name, None, "directory", folder / "published")
    return ModelFiles(case.name, None, "gguf", folder / f"{form}.gguf")


def _pack_internlm2(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Join queries, keys and values: each KV head follows its query heads."""
    groups = config["num_key_value_heads"]

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat([each.view(groups, -1, *each.shape[1:]) for each in parts], dim=1)

    return _join(tensors, "attention.wqkv", join)


def _pack(name: str) -> Callable[[Tensors, Mapping[str, Any]], Tensors]:
    """Return a function that joins queries, keys and values as they are."""
    return lambda tensors, _: _join(tensors, name, torch.cat)


def _join(tensors: Tensors, name: str, join: Callable[[list[Tensor]], Tensor]) -> Tensors:
    result = dict(tensors)
    for query in [each for each in tensors if ".q_proj." in each]:
        parts = [result.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        stem, kind = query.split("self_attn.q_proj.")
        result[f"{stem}{name}.{kind}"] = join(parts).reshape(-1, *parts[0].shape[1:])
    return result


def _pack_refact(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Join keys with values, and gates with ups."""
    result = dict(tensors)
    for key in [each for each in tensors if ".k_proj." in each]:
        value = result.pop(key.replace(".k_proj.", ".v_proj."))
        result[key.replace("self_attn.k_proj", "attn.kv")] = torch.cat([result.pop(key), value])
    for gate in [each for each in tensors if ".gate_proj." in each]:
        up = result.pop(gate.replace(".gate_proj.", ".up_proj."))
        result[gate.replace("gate_proj", "gate_up_proj")] = torch.cat([result.pop(gate), up])
    return result


def _share_deepseek(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Halve the shared experts' results, which the other model's gates of zeros halve, and drop the gates."""
    return {
        name: tensor / 2 if "shared_expert.down_proj" in name else tensor
        for name, tensor in tensors.items()
        if "shared_expert_gate" not in name and not name.endswith("_proj.bias")
    }


def _split_granite(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Take the experts apart, which are one tensor of gates and ups and one of downs."""
    result = {}
    for name, tensor in tensors.items():
        stem, _, part = name.partition("block_sparse_moe.")
        if part.startswith("router."):
            result[f"{stem}mlp.gate.weight"] = tensor
        elif part.startswith("input_linear"):
            for index, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                result[f"{stem}mlp.experts.{index}.w1.weight"] = gate
                result[f"{stem}mlp.experts.{index}.w3.weight"] = up
        elif part:
            result |= {f"{stem}mlp.experts.{index}.w2.weight": each for index, each in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def _same(
    name: str, architecture: str, changes: Mapping[str, Any], forms: tuple[str, ...] = _FORMS
) -> FamilyCase:
    return FamilyCase(f"like-{name}", architecture, {**BASE, **changes}, (), gguf=forms)


_ALL_KEYS_AND_VALUES = {"num_key_value_heads": 4}
_ROTARY = {"rope_theta": 10000.0, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
_GPT_NAMES = {r"^model\.embed_tokens": "transformer.wte", r"^model\.norm": "transformer.ln_f",
              r"^model\.layers": "transformer.h", "input_layernorm": "ln_1",
              "post_attention_layernorm": "ln_2"}  # fmt: skip
_SLOPED = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 40, "num_attention_heads": 2,
           "num_key_value_heads": 2}  # fmt: skip
_WITHOUT_BASE = {key: BASE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
_STARCODER = FamilyCase(
    "like-starcoder", "GPTBigCodeForCausalLM",
    {**_WITHOUT_BASE, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256,
     "tie_word_embeddings": True},
    (), gguf=_FORMS,
)  # fmt: skip
_CLAMPED = {"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 10000.0}
_DBRX = FamilyCase(
    "like-dbrx", "DbrxForCausalLM",
    {
        **_WITHOUT_BASE, "d_model": 128, "n_layers": 3, "n_heads": 4, "max_seq_len": 256,
        "tie_word_embeddings": False, "attn_config": _CLAMPED,
        "ffn_config": {
            "hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2,
        },
        "rope_parameters": BASE["rope_parameters"],
    },
    (), gguf=("f32",),
)  # fmt: skip

_INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings", "lm_head": "output", r"self_attn\.o_proj": "attention.wo",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    r"mlp\.gate_proj": "feed_forward.w1", r"mlp\.down_proj": "feed_forward.w2",
    r"mlp\.up_proj": "feed_forward.w3",
}  # fmt: skip
_MINICPM = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.9 / math.sqrt(3), "logits_scaling": 4.0,
    "attention_multiplier": 32**-0.5,
}  # fmt: skip
_MINICPM_KEYS = {
    **_ROTARY, "model_type": "minicpm", "num_key_value_heads": 2, "hidden_act": "silu", "scale_emb": 3,
    "scale_depth": 0.9, "dim_model_base": 32,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.05 * index for index in range(16)],
    "long_factor": [1.0 + 0.5 * index for index in range(16)],
}  # fmt: skip
_BAICHUAN_KEYS = {
    "model_type": "baichuan", "hidden_act": "silu", "rms_norm_eps": 1e-5, "model_max_length": 256,
    "gradient_checkpointing": False, "z_loss_weight": 0,
}  # fmt: skip
_DEEPSEEK = {
    "mlp_only_layers": [0], "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128, "norm_topk_prob": False, "qkv_bias": False,
}  # fmt: skip
_DEEPSEEK_KEYS = {
    **_ROTARY, "model_type": "deepseek", "num_key_value_heads": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 64, "moe_layer_freq": 1, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001,
    "seq_aux": True, "hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1,
}  # fmt: skip

LIKE_LLAMA = (
    LikeLlama(
        "internlm2", "InternLM2ForCausalLM", _same("internlm2", "LlamaForCausalLM", {}),
        {**_ROTARY, "model_type": "internlm2", "num_key_value_heads": 2, "bias": False, "hidden_act": "silu",
         "pretraining_tp": 1},
        _INTERNLM2_NAMES, _pack_internlm2,
    ),
    LikeLlama(
        "internlm2-biases", "InternLM2ForCausalLM",
        _same("internlm2-biases", "LlamaForCausalLM", {"attention_bias": True}, ()),
        {**_ROTARY, "model_type": "internlm2", "num_key_value_heads": 2,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        _INTERNLM2_NAMES, _pack_internlm2,
    ),
    LikeLlama(
        "internlm", "InternLMForCausalLM",
        _same("internlm", "LlamaForCausalLM", {**_ALL_KEYS_AND_VALUES, "attention_bias": True}, ()),
        {**_ROTARY, "rope_theta": None, "model_type": "internlm", "bias": True,
         "rotary": {"base": 10000, "type": "dynamic"}},
    ),
    LikeLlama(
        "exaone", "ExaoneForCausalLM",
        _same("exaone", "LlamaForCausalLM", {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        }),
        {
            "max_position_embeddings": 256, "rope_theta": 10000.0, "layer_norm_epsilon": 1e-5,
            "model_type": "exaone", "num_key_value_heads": 2, "activation_function": "silu",
            "tie_word_embeddings": True, "num_layers": 3, "head_dim": 32, "num_hidden_layers": None,
            "attention_dropout": 0.0, "embed_dropout": 0.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {
            **_GPT_NAMES, r"self_attn\.o_proj": "attn.attention.out_proj", r"self_attn\.": "attn.attention.",
            "gate_proj": "c_fc_0", "up_proj": "c_fc_1", "down_proj": "c_proj",
        },
    ),
    LikeLlama(
        "minicpm", "MiniCPMForCausalLM", _same("minicpm", "GraniteForCausalLM", _MINICPM), _MINICPM_KEYS
    ),
    LikeLlama(
        "minicpm4", "MiniCPMForCausalLM",
        _same("minicpm4", "GraniteForCausalLM", {
            **_MINICPM, "tie_word_embeddings": True,
            "rope_parameters": {**_LONG, "rope_theta": 10000.0},
        }, ()),
        {**_MINICPM_KEYS, "rope_scaling": _LONG, "mup_denominator": 32,
         "sparse_config": {"kernel_size": 32, "dense_len": 8192}},
    ),
    LikeLlama(
        "minicpm-experts", "MiniCPMForCausalLM",
        _same("minicpm-experts", "GraniteMoeForCausalLM", {
            **_MINICPM, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
        }, ()),
        {**_MINICPM_KEYS, "num_experts": 8, "num_experts_per_tok": 2}, edit=_split_granite,
    ),
    LikeLlama(
        "baichuan-7b", "BaiChuanForCausalLM",
        _same("baichuan-7b", "LlamaForCausalLM", {**_SLOPED, "num_hidden_layers": 32}),
        {**_BAICHUAN_KEYS, "max_position_embeddings": 256}, edit=_pack("self_attn.W_pack"),
    ),
    LikeLlama(
        "baichuan-13b", "BaichuanForCausalLM", _same("baichuan-13b", "LlamaForCausalLM", _SLOPED),
        _BAICHUAN_KEYS, edit=_pack("self_attn.W_pack"), has_slopes=True,
    ),
    LikeLlama(
        "baichuan2-7b", "BaichuanForCausalLM",
        _same("baichuan2-7b", "LlamaForCausalLM", {
            **_SLOPED, "num_hidden_layers": 32, "vocab_size": 125_696,
        }, ()),
        {**_BAICHUAN_KEYS, "max_position_embeddings": 256}, edit=_pack("self_attn.W_pack"),
        has_unit_head=True,
    ),
    LikeLlama(
        "orion", "OrionForCausalLM",
        _same("orion", "StableLmForCausalLM", {
            **_ALL_KEYS_AND_VALUES, "layer_norm_eps": 1e-5,
            "rope_parameters": {**BASE["rope_parameters"], "partial_rotary_factor": 1.0},
        }),
        {**_ROTARY, "model_type": "orion", "max_sequence_length": 256, "num_key_value_heads": 4,
         "hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1},
    ),
    LikeLlama(
        "refact", "GPTRefactForCausalLM",
        _same("refact", "LlamaForCausalLM", {"num_key_value_heads": 1, "intermediate_size": 512}),
        {
            "n_positions": 256, "n_embd": 128, "n_head": 4, "n_layer": 3, "layer_norm_epsilon": 1e-5,
            "rms_norm_eps": 1e-5,
        },
        {
            **_GPT_NAMES, r"self_attn\.q_proj": "attn.q", r"self_attn\.o_proj": "attn.c_proj",
            r"mlp\.down_proj": "mlp.c_proj",
        },
        _pack_refact, has_slopes=True, is_read=False,
    ),
    LikeLlama(
        "qwen", "QWenLMHeadModel", _same("qwen", "Qwen2ForCausalLM", _ALL_KEYS_AND_VALUES),
        {
            "model_type": "qwen", "intermediate_size": 384, "max_position_embeddings": 512, "seq_length": 256,
            "kv_channels": 32, "layer_norm_epsilon": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 1.0,
            "scale_attn_weights": True, "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True,
            "use_flash_attn": "auto", "use_cache_quantization": False, "softmax_in_fp32": False,
            "onnx_safe": None, "bf16": True,
        },
        {
            **_GPT_NAMES, r"self_attn\.o_proj": "attn.c_proj", "up_proj": "w1", "gate_proj": "w2",
            "down_proj": "c_proj",
        },
        _pack("attn.c_attn"),
    ),
    LikeLlama(
        "deepseek", "DeepseekForCausalLM", _same("deepseek", "Qwen2MoeForCausalLM", _DEEPSEEK),
        _DEEPSEEK_KEYS, {r"\.shared_expert\.": ".shared_experts."},
        _share_deepseek, zeros="*.shared_expert_gate.weight",
    ),
    LikeLlama(
        "deepseek-renormalised", "DeepseekForCausalLM",
        _same("deepseek-renormalised", "Qwen2MoeForCausalLM", {**_DEEPSEEK, "norm_topk_prob": True}, ()),
        {**_DEEPSEEK_KEYS, "norm_topk_prob": True}, {r"\.shared_expert\.": ".shared_experts."},
        _share_deepseek, zeros="*.shared_expert_gate.weight",
    ),
    LikeLlama(
        "chatglm", "ChatGLMModel",
        _same("chatglm", "GlmForCausalLM", {
            "head_dim": 32, "attention_bias": True, "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5,
            },
        }),
        {
            "model_type": "chatglm", "num_layers": 3, "padded_vocab_size": 320, "ffn_hidden_size": 192,
            "kv_channels": 32, "seq_length": 256, "layernorm_epsilon": 1e-5, "rope_ratio": 50,
            "num_hidden_layers": None, "intermediate_size": None,
            "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True,
            "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True, "original_rope": True,
            "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
            "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "fp32_residual_connection": False,
            "interleaved_qkv": False, "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0,
            "attention_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": None,
        },
        {
            r"^model\.embed_tokens": "transformer.embedding.word_embeddings",
            r"^model\.norm": "transformer.encoder.final_layernorm",
            r"^model\.layers": "transformer.encoder.layers", "^lm_head": "transformer.output_layer",
            r"self_attn\.o_proj": "self_attention.dense", r"mlp\.gate_up_proj": "mlp.dense_h_to_4h",
            r"mlp\.down_proj": "mlp.dense_4h_to_h",
        },
        _pack("self_attention.query_key_value"),
    ),
    *(
        LikeLlama(
            name, architecture, _same(name, "LlamaForCausalLM", _ALL_KEYS_AND_VALUES, ()),
            {**_ROTARY, "model_type": name, "hidden_act": "silu"},
        )
        for name, architecture in (("xverse", "XverseForCausalLM"), ("aquila", "AquilaForCausalLM"))
    ),
    LikeLlama(
        "starcoder", "GPTBigCodeForCausalLM", _STARCODER, {"layer_norm_epsilon": 1e-5}, is_read=False
    ),
    LikeLlama(
        "jais2", "Jais2ForCausalLM",
        _same("jais2", "Jais2ForCausalLM", {**_ALL_KEYS_AND_VALUES, "layer_norm_eps": 1e-5}),
        {"max_position_embeddings": 256, "rope_theta": 10000.0, "layer_norm_eps": 1e-5}, is_read=False,
    ),
    LikeLlama("dbrx", "DbrxForCausalLM", _DBRX, {"attn_config": _CLAMPED}, is_read=False),
)  # fmt: skip
