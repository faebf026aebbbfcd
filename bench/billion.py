"""Make a model of 1.07 billion weights for speed measurements: random bfloat16 weights, a real tokenizer.

    python -m bench.billion directory

The shape is that of the small Llamas: 16 layers, hidden 2,048, 32 query and 8 KV heads of 64, MLP of 8,192.
Speed does not depend on the values of the weights. The tokenizer and the chat template are those of the
demonstration model, so prompts and answers have the same lengths.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench import export_tokenizer
from bench.export_checkpoint import write_json
from tgi_asgi.settings import DEMO_MODEL

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight, by its name in transformers."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return found


def make(directory: Path, config: dict[str, Any] | None = None) -> None:
    """Write the checkpoint.

    Args:
        config: Content of config.json; None: the one above.
    """
    config = config or CONFIG
    export_tokenizer.export(DEMO_MODEL, directory)
    write_json(directory / "config.json", config)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes(
        {key: value for key, value in config.items() if isinstance(value, int)}
    ).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:  # in its final type: 1 B of float32 would be 4 GB
            values = torch.empty(shape, dtype=torch.bfloat16)
            weights[name] = values.normal_(0, shape[1] ** -0.5, generator=generator)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    make(parser.parse_args().directory)


if __name__ == "__main__":
    main()
