"""Google's EmbeddingGemma: Gemma 3's layers, attending in both directions.

Sources: llama.cpp's converter and model code (`conversion/gemma.py`, `src/models/gemma-embedding.cpp`).
"""

from __future__ import annotations

from typing import Any

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config_bounds import MAX_CONTEXT, MAX_HEADS
from tgi_asgi.models.family import GGUF_NAMES, SANDWICH_NAMES
from tgi_asgi.models.gguf_module import MAX_SIZE, GgufModule, layer_types, read_common, vocab_size_of
from tgi_asgi.models.reader import Reader
from tgi_asgi.ops.arrays import Floats


def read_gemma_embedding(reader: Reader, file: GgufFile) -> dict[str, Any]:
    """Return the configuration; the dense layers after pooling are read by `models/pooling.py`."""
    reader.require(**{"attention.causal": False})
    reader.ignore("pooling_type", *(f"dense_{at}_feat_{way}" for at in (2, 3) for way in ("in", "out")))
    config = read_common(reader)
    head_dim = reader.positive("head_dim", MAX_SIZE)
    reader.require(**{"attention.value_length": head_dim})
    theta, local_theta = reader.number("rope_theta", 1e6), reader.number("rope.freq_base_swa", 1e4)
    return config | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3TextModel"],
        "vocab_size": vocab_size_of(file),
        "intermediate_size": reader.positive("intermediate_size", MAX_SIZE),
        "num_key_value_heads": reader.positive("num_key_value_heads", MAX_HEADS),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": reader.positive("sliding_window", MAX_CONTEXT),
        "use_bidirectional_attention": True,
        "layer_types": layer_types(reader, config["num_hidden_layers"], 6),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
            "full_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def _without_one(stored: Floats) -> Floats:
    """Return a norm's weight, to which llama.cpp's converter adds what the code of `transformers` adds."""
    return stored - 1


_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    **{
        name: GGUF_NAMES[name]
        for name in (
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
            "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    },
    **SANDWICH_NAMES,
}  # fmt: skip
_NORMS = [stored for name, stored in _NAMES.items() if "norm" in name]
MODULES = (
    GgufModule(
        "gemma-embedding",
        read_gemma_embedding,
        _NAMES,
        layers="layers.",
        restored={f"{name}.weight": _without_one for name in _NORMS},
        unused=("dense_2.weight", "dense_3.weight", "output.weight"),
    ),
)
