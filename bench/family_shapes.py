"""Make models of one to eight billion random weights in the shapes of published ones, for speed measurements.

    python -m bench.family_shapes gemma3 directory

Their shapes are those of published models; the tokenizer is the demonstration model's, padded with words that
occur in no text. `transformers` writes them, so llama.cpp's converter accepts them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench import export_tokenizer
from tgi_asgi.settings import DEMO_MODEL

SHAPES: dict[str, dict[str, Any]] = {
    # google/gemma-3-1b-it: one layer in six sees all positions, the others a window of 512
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    # google/gemma-4-E2B-it, with the vocabulary of a smaller model: the last 20 layers read others' keys
    "gemma4-e2b": {
        "model_type": "gemma4_text",
        "vocab_size": 49152,
        "vocab_size_per_layer_input": 49152,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    # microsoft/phi-1_5
    "phi": {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 2048,
    },
    # Qwen/Qwen3-4B
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    },
    # meta-llama/Llama-3.1-8B
    "llama-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
}


def make(directory: Path, name: str) -> None:
    """Write a checkpoint of this shape.

    Raises:
        KeyError: if there is no shape of this name.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[name])
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, **special)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    export_tokenizer.export(DEMO_MODEL, directory)
    _fill_vocabulary(directory / "tokenizer.json", SHAPES[name]["vocab_size"])


def _fill_vocabulary(path: Path, size: int) -> None:
    """Give every id a word: llama.cpp's converter cuts off Gemma 3's embedding rows after the last one."""
    tokenizer = json.loads(path.read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    taken = {*words.values(), *(each["id"] for each in tokenizer["added_tokens"])}
    words |= {f"<unused{number}>": number for number in range(size) if number not in taken}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    make(options.directory, options.name)


if __name__ == "__main__":
    main()
