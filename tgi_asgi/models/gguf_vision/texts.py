"""Text models of GGUF files that accept images: configurations and tensors by the names of `transformers`.

Without a projector beside them, native families read the same files, or modules of `models/gguf_modules`,
which are used here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_CONTEXT
from tgi_asgi.models.family import SANDWICH_NAMES
from tgi_asgi.models.gguf_module import MAX_SIZE, GgufModule, find_module, layer_types
from tgi_asgi.models.gguf_vision.recurrent_texts import RECURRENT_TEXTS
from tgi_asgi.models.gguf_vision.text_reading import (
    NAMES,
    WITH_NORMS,
    Text,
    less_one,
    read_plain,
    read_rope,
    read_sections,
)
from tgi_asgi.models.reader import Reader

_LAYERS_OF_27B = 62  # llama.cpp recognises Gemma 3 27B, whose attention has another scale, by these
_GEMMA_PERIOD = 6  # of the layers without a window


def read_text(file: GgufFile, kind: str) -> dict[str, Any]:
    """Return a `text_config` of this type.

    Raises:
        ModelLoadError: if the file asks for something that the code of `transformers` would not compute.
    """
    reader = Reader.of_gguf(file.metadata, frozenset(file.tensors))
    module = find_module(_architecture(file))
    read = TEXTS[_architecture(file)].read if module is None else module.read_config
    config = read(reader, file)
    reader.finish()
    return {"model_type": kind, **config}


def is_known(name: str) -> bool:
    """Return whether text models of this `general.architecture` can be read."""
    return name in TEXTS or find_module(name) is not None


def text_module(file: GgufFile, config: Mapping[str, Any], prefix: str) -> GgufModule:
    """Return the names of a text model's tensors, which begin with a prefix, except the head's.

    Args:
        config: What `read_text` has returned.
    """
    module = find_module(_architecture(file))
    if module is not None:
        names = {
            f"{prefix}{own.removeprefix('model.')}" if own.startswith("model.") else own: stored
            for own, stored in module.names.items()
        }
        return replace(module, names=names, layers=f"{prefix}layers.")
    text = TEXTS[_architecture(file)]
    rows, columns = text.orders(config)
    outer = {f"{prefix}{own}": stored for own, stored in text.outer.items()}
    return GgufModule(
        _architecture(file),
        lambda reader, file: {},
        {"lm_head": "output", **outer, **text.names},
        layers=f"{prefix}layers.",
        restored=text.restored,
        joined=text.joined,
        paired=("attn_q", "attn_k") if text.is_paired else (),
        row_orders=rows,
        column_orders=columns,
    )


def _architecture(file: GgufFile) -> str:
    return str(file.metadata.get("general.architecture"))


def _read_llama(reader: Reader, file: GgufFile) -> dict[str, Any]:
    check(not reader.integer("sliding_window", 0), "its attention has a window, unlike that of Llama")
    return {
        **read_plain(reader, file),
        "attention_bias": "blk.0.attn_q.bias" in reader.tensors,
        "rope_parameters": read_rope(reader),
    }


def _read_mistral3(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of Mistral Small 3, or of Ministral 3, whose queries grow."""
    check(not reader.integer("sliding_window", 0), "its attention has a window")
    config, rope = read_plain(reader, file), read_rope(reader)
    beta = reader.number("attention.temperature_scale", 0.0)
    if not beta:
        return {**config, "sliding_window": None, "rope_parameters": rope}
    check(rope["rope_type"] == "yarn", "attention.temperature_scale needs a rope scaling of type yarn")
    return {
        **config,
        "model_type": "ministral3",
        "sliding_window": None,
        "rope_parameters": {**rope, "llama_4_scaling_beta": beta},
    }


def _read_qwen(reader: Reader, file: GgufFile) -> dict[str, Any]:
    check(not reader.integer("sliding_window", 0), "its attention has a window")
    return {**read_plain(reader, file), "rope_parameters": read_rope(reader)}


def _read_axes(reader: Reader, file: GgufFile, *, has_experts: bool = False) -> dict[str, Any]:
    """Return the configuration of a Qwen-VL, whose positions have three axes."""
    check(not reader.integer("sliding_window", 0), "its attention has a window")
    config = {
        **read_plain(reader, file, has_experts=has_experts),
        "rope_parameters": read_rope(reader),
    }
    config["rope_parameters"]["mrope_section"] = read_sections(reader, config["head_dim"] // 2)
    return config


def _read_qwen3vl(reader: Reader, file: GgufFile, *, has_experts: bool = False) -> dict[str, Any]:
    config = _read_axes(reader, file, has_experts=has_experts)
    config["rope_parameters"]["mrope_interleaved"] = True
    reader.ignore("n_deepstack_layers")  # the projector's file says which
    return {**config, "attention_bias": "blk.0.attn_q.bias" in reader.tensors}


def _read_qwen3vlmoe(reader: Reader, file: GgufFile) -> dict[str, Any]:
    num_experts = reader.positive("num_experts", MAX_SIZE)
    reader.require(expert_group_count=0, expert_shared_count=0, expert_weights_norm=True)
    return {
        **_read_qwen3vl(reader, file, has_experts=True),
        "num_experts": num_experts,
        "num_experts_per_tok": reader.positive("num_experts_per_tok", num_experts),
        "moe_intermediate_size": reader.positive("moe_intermediate_size", MAX_SIZE),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _read_gemma3(reader: Reader, file: GgufFile) -> dict[str, Any]:
    config = read_plain(reader, file)
    num_layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    is_largest = num_layers == _LAYERS_OF_27B
    heads_dim = config["hidden_size"] // config["num_attention_heads"]
    theta = reader.number("rope_theta", 1e6)
    reader.replace("rope_theta", theta)
    local_theta = reader.number("rope.freq_base_swa", 1e4)
    return {
        **config,
        "query_pre_attn_scalar": heads_dim if is_largest else head_dim,
        "sliding_window": reader.positive("sliding_window", MAX_CONTEXT),
        "layer_types": layer_types(reader, num_layers, _GEMMA_PERIOD),
        "rope_parameters": {
            "full_attention": read_rope(reader),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
        "final_logit_softcapping": reader.number("final_logit_softcapping", 0.0) or None,
        "attn_logit_softcapping": None,
    }


_GEMMA_NORMS = (
    "output_norm", "attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm",
    "post_ffw_norm",
)  # fmt: skip
TEXTS: Mapping[str, Text] = {
    **RECURRENT_TEXTS,
    "llama": Text(_read_llama, NAMES, is_paired=True),
    "mistral3": Text(_read_mistral3, NAMES, is_paired=True),
    "qwen2": Text(_read_qwen, NAMES),
    "qwen3": Text(_read_qwen, WITH_NORMS),
    "qwen2vl": Text(_read_axes, NAMES),
    "qwen3vl": Text(_read_qwen3vl, WITH_NORMS),
    "qwen3vlmoe": Text(
        _read_qwen3vlmoe,
        {
            **{own: stored for own, stored in WITH_NORMS.items() if not own.startswith("mlp.")},
            "mlp.gate": "ffn_gate_inp",
            "mlp.experts.down_proj": "ffn_down_exps.weight",
        },
        joined={"mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
    ),
    "gemma3": Text(
        _read_gemma3,
        {**WITH_NORMS, **SANDWICH_NAMES},
        restored={f"{name}.weight": less_one for name in _GEMMA_NORMS},
    ),
}
