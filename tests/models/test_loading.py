"""Weights by canonical names: translation, shapes, and the row order of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import (
    load_model,
    make_model,
    our_logits,
    reference_logits,
    save,
    save_gguf,
)
from tests.support.hypothesis_examples import for_all
from tests.support.scale import Scale
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import GGUF_NAMES
from tgi_asgi.models.loading.gguf import gguf_name
from tgi_asgi.models.loading.gguf_tensors import join_rotary_halves
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.recognise import architecture_of, with_architecture

Q_NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("canonical", "stored"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.12.mlp.down_proj.weight", "blk.12.ffn_down.weight"),
        ("model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
        ("model.layers.0.self_attn.q_norm.weight", "blk.0.attn_q_norm.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
    ],
)
def test_names_are_translated(canonical: str, stored: str) -> None:
    assert gguf_name(canonical, GGUF_NAMES) == stored


def test_rotary_pairs_become_halves_in_every_head() -> None:
    rows = np.array([[0, 4], [1, 5], [2, 6], [3, 7]], np.uint8)  # halves of one head
    stored = rows[[0, 2, 1, 3]]  # pairs (0, 2), (1, 3)
    two_heads = np.concatenate([stored, stored + 10])
    joined = join_rotary_halves(two_heads.reshape(-1), 8, 4)
    assert joined.reshape(8, 2).tolist() == np.concatenate([rows, rows + 10]).tolist()


def test_both_formats_give_the_same_bytes(tmp_path: Path) -> None:
    model = make_model()
    checkpoint = OpenModel(save(model, tmp_path / "directory"))
    gguf = OpenModel(save_gguf(model, tmp_path / "model.gguf", "F32"))
    with checkpoint, gguf:
        first, second = (opened.weights.get(Q_NAME, (64, 64)) for opened in (checkpoint, gguf))
        assert first.format == second.format == "F32"
        assert np.array_equal(first.data, second.data)


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_wrong_shape_names_the_tensor(tmp_path: Path, kind: str) -> None:
    model = make_model()
    files = save(model, tmp_path) if kind == "directory" else save_gguf(model, tmp_path / "m.gguf", "Q8_0")
    with OpenModel(files) as opened, pytest.raises(ModelLoadError, match=r"q.*\[64, 64\].*\[32, 64\]"):
        opened.weights.get(Q_NAME, (32, 64))


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_missing_tensor_is_named(tmp_path: Path, kind: str) -> None:
    model = make_model()
    files = save(model, tmp_path) if kind == "directory" else save_gguf(model, tmp_path / "m.gguf", "Q8_0")
    with OpenModel(files) as opened, pytest.raises(ModelLoadError, match=r"no tensor '.*9"):
        opened.weights.get("model.layers.9.self_attn.q_proj.weight", (64, 64))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    files = save(make_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[Q_NAME] = torch.zeros(64, 64, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="I32; supported are F32, F16, BF16"):
        load_model(files, max_positions=16)


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        OpenModel(ModelFiles("broken", None, "directory", tmp_path))


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_tensor_that_nobody_knows_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    model = make_model()
    name = "model.layers.0.self_attn.sinks" if kind == "directory" else "blk.0.attn_sinks.weight"
    if kind == "directory":
        files = save(model, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors | {name: torch.zeros(4)}, tmp_path / "model.safetensors")
    else:
        files = save_gguf(model, tmp_path / "m.gguf", "F32", tensors={name: np.zeros(4, np.float32)})
    with pytest.raises(ModelLoadError, match=f"'{name}', which this server does not know"):
        load_model(files, max_positions=16)


def test_tensors_that_are_known_to_mean_nothing_are_passed_over(tmp_path: Path) -> None:
    """Include the head of a model with tied embeddings, which some files store twice."""
    files = save(make_model(tie_word_embeddings=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    load_model(files, max_positions=16)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tied = load_model(save(make_model(tie_word_embeddings=True), tmp_path / "tied"), max_positions=16)
    own = load_model(save(make_model(), tmp_path / "own"), max_positions=16)
    assert isinstance(tied, Decoder) and isinstance(own, Decoder)
    assert tied.head is tied.embedding
    assert own.head is not own.embedding


def test_a_text_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """GPT-2's class is called `GPT2LMHeadModel`, as if it gave vectors."""
    config = transformers.GPT2Config(
        vocab_size=160, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(ModelLoadError, match=r"no tensor 'lm_head\.weight'"):
        load_model(ModelFiles("headless", None, "directory", tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_other", [False, True])
def test_a_stored_head_that_is_not_the_embedding_is_used(
    tmp_path: Path, dtype: torch.dtype, is_other: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = save(make_model(tie_word_embeddings=True).bfloat16(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    head = tensors["model.embed_tokens.weight"].to(dtype, copy=True)
    head[-1, -1] += is_other
    path.unlink()
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})
    model = load_model(files, max_positions=64)
    assert model.config.has_tied_embeddings is not is_other
    assert ("the files hold another head" in caplog.text) is is_other


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_weights_say_of_any_string_whether_they_have_it(tmp_path: Path, kind: str, scale: Scale) -> None:
    model = make_model()
    files = save(model, tmp_path) if kind == "directory" else save_gguf(model, tmp_path / "m.gguf", "F32")
    parts = st.sampled_from(
        ["model", "layers", ".", "0", "99999999999999999999", "weight", "\u0663", "attn_q", ""]
    )
    with OpenModel(files) as opened:
        assert Q_NAME in opened.weights

        @for_all(scale(300, 20_000), st.text() | st.lists(parts).map("".join))
        def check(name: str) -> None:
            assert name not in opened.weights


@pytest.mark.parametrize("architectures", [None, []])
def test_an_architecture_that_is_not_named_is_that_of_the_model_s_type(
    tmp_path: Path, architectures: list[str] | None
) -> None:
    files = save(make_model("Qwen2"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    with OpenModel(files) as opened:
        assert opened.config.architecture == "Qwen2ForCausalLM"
    path.write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(ModelLoadError, match="names no architecture"):
        OpenModel(files)


@pytest.mark.parametrize(
    ("model_type", "name", "served_as"),
    [
        ("iquestcoder", "IQuestCoderForCausalLM", "LlamaForCausalLM"),  # with code of its own on the Hub
        ("llama", "LLaMAForCausalLM", "LlamaForCausalLM"),
        ("jetmoe", "JetMoEForCausalLM", "JetMoeForCausalLM"),
        ("llama", "Eagle3LlamaForCausalLM", "Eagle3LlamaForCausalLM"),
        ("no such", "NoSuchForCausalLM", "NoSuchForCausalLM"),
        # Another type's class: transformers goes by the type.
        ("mistral", "LlamaForCausalLM", "MistralForCausalLM"),
        ("llama", "GraniteForCausalLM", "LlamaForCausalLM"),
        # Not so if the type's class is no text model, or the file's own is none of transformers'.
        ("gemma3", "Gemma3ForCausalLM", "Gemma3ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM", "Gemma3ForCausalLM"),
        ("RefinedWebModel", "RWForCausalLM", "RWForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification"),
        ("gpt2", "GPT2LMHeadModel", "GPT2LMHeadModel"),
    ],
)
def test_an_architecture_named_after_its_model_type_is_that_of_transformers(
    model_type: str, name: str, served_as: str
) -> None:
    config = {"model_type": model_type, "architectures": [name], "auto_map": {"AutoConfig": "own.Own"}}
    assert architecture_of(with_architecture(config)) == served_as


@pytest.mark.parametrize("names", [["MistralForCausalLM"], None])
def test_mistral_with_kinds_of_layers_is_ministral(tmp_path: Path, names: list[str] | None) -> None:
    """The reference is loaded by `AutoConfig`, which decides the same."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    files = save(make_model("Ministral", head_dim=16, sliding_window=12, layer_types=kinds), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mistral", "architectures": names}
    path.write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = list(range(3, 60))
    assert float((our_logits(files, ids) - reference_logits(model, ids)).abs().max()) < 1e-4
    path.write_text(json.dumps({**config, "layer_types": ["sliding_attention"] * 3}))
    assert float((our_logits(files, ids) - reference_logits(model, ids)).abs().max()) > 0.1


@pytest.mark.parametrize(("kind", "name"), [("Mistral", "LlamaForCausalLM"), ("Llama", "GraniteForCausalLM")])
def test_a_model_whose_architecture_is_another_type_s_is_that_of_its_type(
    tmp_path: Path, kind: str, name: str
) -> None:
    changes = {"sliding_window": 8} if kind == "Mistral" else {}
    files = save(make_model(kind, **changes), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name]}))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with OpenModel(files) as opened:
        assert opened.config.architecture == type(reference).__name__ == f"{kind}ForCausalLM"
