"""Tiny random models, written as checkpoints and as GGUF files, with `transformers` as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers

from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.family import Model as OurModel
from tgi_asgi.models.family import record
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.inputs import StepInputs
from tgi_asgi.runner.plan import StepRow

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

Model = transformers.PreTrainedModel


def make_model(kind: str = "Llama", /, **changes: Any) -> Model:
    """Make a random model, including its biases and norms, whose logits are far from flat."""
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model: Model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if "norm" in name else 0.15)
    return model


def save(model: Model, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> ModelFiles:
    """Write a checkpoint directory; this also rounds the model's own weights to `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(path, state_dict=state, **options)
    return ModelFiles("tiny", None, "directory", path)


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one token for each of 160 bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: SHAPE["vocab_size"]]
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))


def reference_logits(model: Model, ids: list[int]) -> torch.Tensor:
    """Return transformers' logits [n_tokens, vocab] in float32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def load_model(
    files: ModelFiles, arithmetic: ops.Arithmetic | None = None, *, max_positions: int = 512
) -> OurModel:
    """Load a model for the CPU, with exact arithmetic by default, and close its files."""
    with OpenModel(files) as opened:
        model = opened.load(ops.Packing(is_exact=True) if arithmetic is None else arithmetic, max_positions)
    assert not isinstance(model, GenericModel | EncoderModel)
    return model


def our_logits(
    files: ModelFiles,
    ids: list[int],
    *,
    is_exact: bool = True,
    chunk: int = 512,
    kv_dtype: ops.KvDtype | None = None,
) -> torch.Tensor:
    """Return this project's logits [n_tokens, vocab], computed in chunks over scattered blocks."""
    model = load_model(files, ops.Packing(is_exact))
    config = model.config
    pool = ops.KvPool(
        config.caches,
        num_blocks=64,
        block_size=16,
        dtype=kv_dtype or ("float32" if is_exact else "bfloat16"),
    )
    limits = ops.StepLimits(max_tokens=512, max_sequences=1, max_rows=512, max_context=512)
    program = ops.CpuProgram(record(model, pool.layers), limits)
    inputs = StepInputs(
        vocab_size=config.vocab_size,
        num_blocks=64,
        block_size=16,
        max_context=512,
        max_rows=1,
        max_tokens=512,
    )
    blocks = [(7 * index + 3) % 64 for index in range(32)]
    parts = []
    for start in range(0, len(ids), chunk):
        row = StepRow(0, ids[start : start + chunk], start, [blocks], samples=False)
        batch = inputs.fill([row], np.zeros(1, np.int32))
        parts.append(program.run(batch, range(row.num_tokens)).copy())
    return torch.from_numpy(np.concatenate(parts))


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(
    model: Model,
    path: Path,
    kind: str,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> ModelFiles:
    """Write a GGUF file as llama.cpp's converter does, with matrices in the format `kind`.

    The model's own weights are set to what the file's blocks decode to.
    """
    config, name = model.config, "llama" if model.config.model_type == "llama" else model.config.model_type
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if name == "qwen3":  # its heads need not divide the hidden size
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in (metadata or {}).items():
        writer.add_key_value(f"{name}.{key}", value, _gguf_type(value))
    for key, parameter in model.named_parameters():
        quantisation = gguf.GGMLQuantizationType[kind if parameter.dim() == 2 else "F32"]
        rows = parameter.detach().numpy()
        is_permuted = name == "llama" and (".q_proj." in key or ".k_proj." in key)
        head_dim = config.head_dim if getattr(config, "head_dim", None) else 16
        if is_permuted:
            rows = _split_rotary_halves(rows, head_dim)
        blocks = gguf.quants.quantize(np.ascontiguousarray(rows), quantisation)
        writer.add_tensor(_gguf_name(key), blocks, raw_dtype=quantisation)
        decoded = gguf.quants.dequantize(blocks, quantisation).reshape(rows.shape)
        if is_permuted:
            decoded = _join_rotary_halves(decoded, head_dim)
        parameter.data.copy_(torch.from_numpy(decoded.copy()))
    for key, array in (tensors or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles("tiny", None, "gguf", path)


def _gguf_type(value: Any) -> gguf.GGUFValueType:
    return {
        str: gguf.GGUFValueType.STRING,
        float: gguf.GGUFValueType.FLOAT32,
        int: gguf.GGUFValueType.UINT32,
    }[type(value)]


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, rest = stem.split(".", 3)
        return f"blk.{index}.{_GGUF_NAMES[rest]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def _split_rotary_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows as `permute` of llama.cpp's convert_hf_to_gguf.py does."""
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _join_rotary_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
