"""The models that `bench.moe` measures: complete files, although a token uses only part of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.moe import active_bytes
from bench.moe_files import MODELS, cut_vocabulary, is_more, make
from tgi_asgi import ops
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading.open import OpenModel

LAYERS = 4


@pytest.mark.parametrize("name", MODELS)
def test_a_small_one_of_its_kind_is_loaded(tmp_path: Path, name: str) -> None:
    small = {"vocab_size": 2048, "hidden": 256, "num_heads": 8, "size": 256, "num_experts": 4, "top_k": 2}
    small |= {"num_kv_heads": 4, "head_dim": 32, "dense_size": 256, "query_rank": 256}
    small |= {"delta_heads": 4, "delta_key_heads": 2, "delta_dim": 64}
    fields = {field.name for field in dataclasses.fields(MODELS[name])}
    changes: dict[str, Any] = {key: small[key] for key in fields & small.keys()}
    model = dataclasses.replace(MODELS[name], **changes)
    path = tmp_path / "model.gguf"
    make(path, model, LAYERS)
    with OpenModel(ModelFiles(name, None, "gguf", path)) as opened:
        config = opened.config
        opened.load(ops.Packing(is_exact=False), 64)  # raises if it has tensors that it cannot use
        opened.read_text()
    assert isinstance(config, ModelConfig)
    assert config.num_layers == LAYERS
    assert config.vocab_size == cut_vocabulary(model, LAYERS)
    file = GgufFile.open(path)
    sizes = {name: info.nbytes for name, info in file.tensors.items()}
    file.close()
    is_tied = "output.weight" not in sizes
    not_needed = (
        sizes["token_embd.weight"] * (not is_tied)
        + sum(size for name, size in sizes.items() if name.endswith("_exps.weight")) / 2
    )
    biases = sum(size for name, size in sizes.items() if name.endswith("_exps.bias")) / 2
    assert active_bytes(path, model) == sum(sizes.values()) - not_needed - biases


def test_six_bits_are_where_llama_cpp_puts_them() -> None:
    """Q6_K goes to the first and last eighth of 48 layers and to every third between (llama-quant.cpp)."""
    more = [index for index in range(48) if is_more(index, 48)]
    assert more == [*range(6), *range(8, 42, 3), *range(42, 48)]


def test_the_head_has_its_share_of_a_file_of_few_layers() -> None:
    model = MODELS["qwen3-30b-a3b"]
    assert cut_vocabulary(model, model.num_layers) == model.vocab_size
    assert cut_vocabulary(model, 8) == 25344
