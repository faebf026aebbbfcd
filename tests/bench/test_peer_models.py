"""The checkpoints that peers run: the shape of the 1 B model, with int8 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from bench import billion, export_w8a8
from tests.support.checkpoints import make_model, save, save_tokenizer
from tgi_asgi.formats.sources import ModelFiles


def test_the_billion_is_what_transformers_makes_of_its_configuration() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**billion.CONFIG))
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    numbers = {key: value for key, value in billion.CONFIG.items() if isinstance(value, int)}
    assert billion.shapes(numbers) == expected
    assert 1.0e9 < model.num_parameters() < 1.1e9


def test_a_small_one_of_its_kind_is_served(tmp_path: Path, demo_files: ModelFiles) -> None:
    small = {**billion.CONFIG, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    billion.make(tmp_path, {**small, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32})
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    encoded: Any = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    ids = encoded["input_ids"]
    with torch.inference_mode():
        logits = model(ids).logits
    assert logits.shape == (1, ids.shape[1], 49152) and bool(logits.isfinite().all())
    assert 0.5 < float(model.lm_head.weight.detach().float().std() * 128**0.5) < 1.5


def test_int8_weights_are_within_half_a_step_and_the_rest_is_kept(tmp_path: Path) -> None:
    model = make_model()
    save(model, tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    export_w8a8.export(tmp_path / "whole", tmp_path / "small")
    found = load_file(tmp_path / "small" / "model.safetensors")
    for name, weight in model.named_parameters():
        stored = found.pop(name)
        if not name.endswith("_proj.weight"):
            assert torch.equal(stored, weight.bfloat16()), name
            continue
        scale = found.pop(f"{name}_scale")
        assert stored.dtype == torch.int8 and scale.shape == (weight.shape[0], 1)
        error = (stored.float() * scale.float() - weight).abs()
        assert bool(
            (error <= scale.float() * 0.501 + scale.float() * 127 * 2**-8 * (stored.abs() == 127)).all()
        )
        assert int(stored.abs().max()) >= 126  # the whole range is used
    assert not found
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    assert (tmp_path / "small" / "tokenizer.json").exists()
