"""Encoders that give vectors: BERT and RoBERTa, Nomic's, Jina's, ModernBERT and EuroBERT.

Sources: llama.cpp's converter and model code (`conversion/bert.py`, `src/models/bert.cpp`,
`src/models/modern-bert.cpp`, `src/models/eurobert.cpp`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tgi_asgi.errors import check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS
from tgi_asgi.models.gguf_module import MAX_SIZE, GgufModule, layer_types, vocab_size_of
from tgi_asgi.models.reader import Reader
from tgi_asgi.ops.arrays import Floats

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _read_sizes(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return what all of these configurations have."""
    reader.require(**{"attention.causal": False, "rope.scaling.type": "none"})
    # Pooling is read with the other files (`models/pooling.py`).
    reader.ignore("vocab_size", "pooling_type", "classifier.pooling_type")
    hidden_size = reader.positive("hidden_size", MAX_SIZE)
    num_heads = reader.positive("num_attention_heads", MAX_HEADS)
    check(hidden_size % num_heads == 0, f"embedding_length must be a multiple of {num_heads}")
    head_dim = hidden_size // num_heads
    reader.require(**{
        "head_dim": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim,
    })  # fmt: skip
    return {
        "vocab_size": vocab_size_of(file),
        "hidden_size": hidden_size,
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "num_hidden_layers": reader.positive("num_hidden_layers", MAX_LAYERS),
        "num_attention_heads": num_heads,
        "max_position_embeddings": reader.positive("max_position_embeddings", MAX_CONTEXT),
        "pad_token_id": 0,  # its embedding is computed as the file has it; texts are not padded
    }


def _read_bert(reader: Reader, file: GgufFile) -> dict[str, Any]:
    types = file.tensors.get("token_types.weight")
    check(
        types is not None and len(types.shape) == 2,
        "the file has no matrix `token_types.weight`: DistilBERT's GGUF files are not supported",
    )
    assert types is not None
    return _read_sizes(reader, file) | {
        "type_vocab_size": types.shape[0],
        "layer_norm_eps": reader.number("layer_norm_eps"),
    }


def read_bert(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of a BERT or a RoBERTa, or of a RoBERTa that ranks pairs.

    All run as XLM-RoBERTa, which computes the same. The converter drops its unused first positions, and
    `_with_first_row` adds one again.
    """
    config = _read_bert(reader, file) | {
        "model_type": "xlm-roberta",
        "architectures": ["XLMRobertaModel"],
    }
    config["max_position_embeddings"] += 1
    reader.ignore("classifier.output_labels")
    if "cls.output.weight" in file.tensors:
        check("cls.weight" in file.tensors, "BERT's classifiers need a pooler, which GGUF files do not have")
        config |= {
            "architectures": ["XLMRobertaForSequenceClassification"],
            "num_labels": file.tensor("cls.output.weight").shape[0],
        }
    return config


def _with_first_row(stored: Floats) -> Floats:
    return np.concatenate([np.zeros_like(stored[:1]), stored])


def _one_more(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] + 1, *shape[1:])


def read_nomic(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of Nomic's embedding models without experts."""
    return _read_bert(reader, file) | {
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "rope_parameters": {"rope_type": "default", "rope_theta": reader.number("rope_theta", 1e3)},
    }


def read_jina3(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration of Jina's third embedding model, without the adapters of its tasks."""
    return _read_bert(reader, file) | {
        "model_type": "jina_embeddings_v3",
        "architectures": ["JinaEmbeddingsV3Model"],
        "rope_parameters": {"rope_type": "default", "rope_theta": reader.number("rope_theta", 2e4)},
    }


def read_modern_bert(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return ModernBERT's configuration; every third layer, or as the file says, has no window."""
    config = _read_sizes(reader, file)
    reader.ignore("rms_norm_eps")  # the same
    theta = reader.number("rope_theta", 1.6e5)
    local_theta = reader.number("rope.freq_base_swa", 1e4)
    return config | {
        "model_type": "modernbert",
        "architectures": ["ModernBertModel"],
        "norm_eps": reader.number("layer_norm_eps"),
        "local_attention": reader.positive("sliding_window", MAX_CONTEXT),
        "layer_types": layer_types(reader, config["num_hidden_layers"], 3, wide_at=0),
        "hidden_activation": _activation(reader),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _activation(reader: Reader) -> str:
    given = reader.get("hidden_activation")
    given = "gelu" if given is None else given
    check(given in ("gelu", "silu"), f"hidden_activation must be gelu or silu, got {str(given)[:100]}")
    return str(given)


def read_eurobert(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return EuroBERT's configuration: Llama's layers without a causal mask."""
    config = _read_sizes(reader, file)
    return config | {
        "model_type": "eurobert",
        "architectures": ["EuroBertModel"],
        "num_key_value_heads": reader.positive("num_key_value_heads", MAX_HEADS),
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "rope_parameters": {"rope_type": "default", "rope_theta": reader.number("rope_theta", 1e4)},
    }


_EMBEDDINGS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_BERT_NAMES = {
    **_EMBEDDINGS,
    "embeddings.position_embeddings": "position_embd",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "classifier.dense": "cls",
    "classifier.out_proj": "cls.output",
}
_TURNED_NAMES = {
    **_EMBEDDINGS,
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "attn_output_norm",
    "post_mlp_layernorm": "layer_output_norm",
}
_NOMIC_NAMES = {
    **_TURNED_NAMES,
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_JINA_NAMES = {**_TURNED_NAMES, "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
_MODERN_NAMES = {
    "embeddings.tok_embeddings": "token_embd",
    "embeddings.norm": "token_embd_norm",
    "final_norm": "output_norm",
    "attn_norm": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.Wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
}
_EURO_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BERT_QKV = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
MODULES = (
    GgufModule(
        "bert",
        read_bert,
        _BERT_NAMES,
        layers="encoder.layer.",
        parts={"attn_qkv": _BERT_QKV},
        restored={"position_embd.weight": _with_first_row},
        shapes={"position_embd.weight": _one_more},
    ),
    GgufModule("nomic-bert", read_nomic, _NOMIC_NAMES, layers="layers.", parts={"attn_qkv": _QKV}),
    GgufModule("jina-bert-v3", read_jina3, _JINA_NAMES, layers="layers.", parts={"attn_qkv": _QKV}),
    GgufModule("modern-bert", read_modern_bert, _MODERN_NAMES, layers="layers."),
    GgufModule("eurobert", read_eurobert, _EURO_NAMES, layers="layers."),
)
