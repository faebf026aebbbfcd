"""Write a GGUF model as a checkpoint that transformers and vLLM read: the same weights, dequantised exactly.

    python -m bench.export_checkpoint model.gguf directory

Weights are float32, which holds every value of a quantised file; llama.cpp's order of rotary rows is undone.
Also writes config.json, the tokenizer and the chat template. Supports only models that are Llama without
biases, rotary scaling and the like.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import GGUF_NAMES, Family
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.models.loading.gguf import GgufWeights, gguf_name
from tgi_asgi.models.loading.recognise import read_gguf
from tgi_asgi.ops.sources import decode
from tgi_asgi.text import gguf_vocab

_LAYER_WEIGHTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def weight_names(config: ModelConfig) -> list[str]:
    """List the names of the weights of a Llama model in transformers."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config.has_tied_embeddings:
        names.append("lm_head.weight")
    for index in range(config.num_layers):
        names += [f"model.layers.{index}.{name}.weight" for name in _LAYER_WEIGHTS]
    return names


def read_weight(file: GgufFile, name: str, family: Family, config: ModelConfig) -> npt.NDArray[np.float32]:
    """Dequantise one tensor; its rows are in transformers' order."""
    stored = gguf_name(name, {**GGUF_NAMES, **family.gguf_names})
    assert stored is not None
    source = GgufWeights(file, config, family).get(name, file.tensor(stored).shape)
    return decode(source)


def describe(config: ModelConfig) -> dict[str, object]:
    """Return config.json's content."""
    rope = config.layers[0].rope
    assert rope is not None
    return {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.has_tied_embeddings,
        "dtype": "float32",
    }


def is_plain(config: ModelConfig) -> bool:
    """Return whether a model is fully described by `describe`."""
    first = config.layers[0].rope
    if first is None:
        return False
    layer = LayerSpec(RopeSpec(config.head_dim, first.theta), None, config.head_dim**-0.5)
    factors = (config.embedding_factor, config.residual_factor, config.logits_scale)
    has_more = config.has_qkv_bias or config.has_output_bias or config.has_mlp_bias or config.has_qk_norm
    return set(config.layers) == {layer} and set(factors) == {1.0} and not has_more


def export(path: Path, directory: Path) -> None:
    """Write the checkpoint.

    Raises:
        SystemExit: if the model has parts that this script does not write.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = GgufFile.open(path)
    try:
        family, config = read_gguf(file.metadata, frozenset(file.tensors))
        if not is_plain(config) or "rope_freqs.weight" in file.tensors:
            raise SystemExit(f"{path}: only plain models of the Llama kind are written")
        weights = {name: read_weight(file, name, family, config) for name in weight_names(config)}
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        vocab = gguf_vocab.build(file.metadata)
        template = file.metadata.get("tokenizer.chat_template")
    finally:
        file.close()
    ends = sorted(vocab.eos_ids)
    write_json(directory / "config.json", {**describe(config), "eos_token_id": ends})
    write_json(directory / "generation_config.json", {"eos_token_id": ends})
    tokenizer = {**vocab.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(directory / "tokenizer_config.json", {**tokenizer, "chat_template": template})
    vocab.backend.save(str(directory / "tokenizer.json"))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    export(options.gguf, options.directory)


if __name__ == "__main__":
    main()
