"""The serving stage of bench/gpu.py: random checkpoints in the shapes of small models, over sockets.

It needs the server's dependencies, which a machine with only torch lacks: `python -m bench.gpu --wheels`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_kernels import Report
from bench.loads import WORDS, ClosedLoop, Prompts, Target, run
from bench.servers import Server
from tgi_asgi.models.loading.recognise import read_config

LOADS = ((64, 192), (1, 8))  # clients and their requests
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 64
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000,
    "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
LLAMA_1B: dict[str, Any] = SMOLLM2 | {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
MODELS = {"SmolLM2-135M": SMOLLM2, "Llama-3.2-1B": LLAMA_1B}


def served(report: Report) -> None:
    """Serve random checkpoints of these shapes to many clients at once, and to one."""
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), config)
            for row in serve(Path(folder), LOADS):
                report("runs", {"what": "served", "model": name} | row)


def serve(directory: Path, loads: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Start the server on a checkpoint, run each load (clients, requests), and return their figures."""
    most = max(clients for clients, _ in loads)
    arguments = ["--model-id", str(directory), "--max-batch-size", str(max(most, 2))]
    rows = []
    with Server.ours(arguments) as server:
        prompts = Prompts(PROMPT_TOKENS)
        asyncio.run(run(ClosedLoop(1, 2), prompts, server.url, max_tokens=4))
        for clients, requests in loads:
            load = ClosedLoop(clients, requests)
            measured = asyncio.run(run(load, prompts, server.url, max_tokens=OUTPUT_TOKENS))
            assert not measured.errors, measured.errors[0]
            row = {"clients": clients, "start_s": round(server.start_s, 1)} | measured.summary(Target())
            rows.append(row | {"first_ms": row["ttft_ms"]["p50"], "gap_ms": row["itl_ms"]["p50"]})
    return rows


def write_checkpoint(directory: Path, config: dict[str, Any]) -> None:
    """Write random weights in bfloat16, a tokenizer in which each word is a token, and a chat template."""
    from safetensors.torch import save_file

    from bench.export_checkpoint import weight_names

    _, shape = read_config(config)
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "q_proj": (queries, shape.hidden_size), "k_proj": (keys, shape.hidden_size),
        "v_proj": (keys, shape.hidden_size), "o_proj": (shape.hidden_size, queries),
        "gate_proj": (shape.intermediate_size, shape.hidden_size),
        "up_proj": (shape.intermediate_size, shape.hidden_size),
        "down_proj": (shape.hidden_size, shape.intermediate_size),
        "embed_tokens": (shape.vocab_size, shape.hidden_size),
        "lm_head": (shape.vocab_size, shape.hidden_size),
    }  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"  # random numbers take a CPU many seconds
    tensors = {}
    for name in weight_names(shape):
        size = sizes.get(name.split(".")[-2])
        tensors[name] = (
            torch.ones(shape.hidden_size)
            if size is None
            else (torch.randn(size, device=device) * size[1] ** -0.5).cpu()
        ).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ ' ' + message.content }}{% endfor %}"
    )
    _write_tokenizer(directory / "tokenizer.json", shape.vocab_size)


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a tokenizer of bytes, the words of `bench.loads` with a leading space, and filler names."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        spaced = f"\u0120{word}"
        for stop in range(1, len(spaced)):
            merges[spaced[:stop], spaced[stop]] = None
            tokens[spaced[: stop + 1]] = None
    for index in itertools.count():
        if len(tokens) >= vocab_size:
            break
        tokens[f"\u0120n{index}"] = None
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


STAGES = (served,)
