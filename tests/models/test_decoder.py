"""The forward pass against `transformers`, on tiny random models of both formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.checkpoints import (
    LLAMA3_SCALING,
    make_model,
    our_logits,
    reference_logits,
    save,
    save_gguf,
)
from tgi_asgi.models.layer_spec import RopeSpec
from tgi_asgi.models.rope import inverse_frequencies

IDS = torch.randint(0, 160, (100,), generator=torch.Generator().manual_seed(2)).tolist()
# Worst element of float32 logits of magnitude 10 after three layers: about a hundred roundings of 6e-8 each.
TOLERANCE = 5e-5


def assert_equal(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert torch.isfinite(ours).all()
    assert float(reference.std()) > 0.5, "flat logits prove nothing"
    assert float((ours - reference).abs().max()) < tolerance


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("Llama", {}, id="plain"),
        pytest.param("Llama", {"tie_word_embeddings": True}, id="tied"),
        pytest.param("Llama", {"num_key_value_heads": 4}, id="multi-head"),
        pytest.param("Llama", {"num_key_value_heads": 1}, id="multi-query"),
        pytest.param("Llama", {"head_dim": 32}, id="head-dim"),
        pytest.param("Llama", {"num_attention_heads": 8, "head_dim": 16}, id="wide-attention"),
        pytest.param("Llama", {"rope_theta": 500000.0}, id="theta"),
        pytest.param("Llama", {"rope_scaling": LLAMA3_SCALING}, id="llama3-scaling"),
        pytest.param("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, id="linear-scaling"),
        pytest.param("Llama", {"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param("Llama", {"hidden_size": 72, "intermediate_size": 100, "head_dim": 20}, id="odd-sizes"),
        pytest.param("Mistral", {"sliding_window": 256}, id="mistral"),
        pytest.param("Mistral", {"sliding_window": 20}, id="mistral-window"),
        pytest.param("Qwen2", {}, id="qwen2"),
        pytest.param(
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            id="qwen2-window",
        ),
        pytest.param("Qwen3", {"head_dim": 32}, id="qwen3"),
        pytest.param("Qwen3", {"head_dim": 16, "attention_bias": True}, id="qwen3-biases"),
    ],
)
def test_logits_equal_transformers(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    model = make_model(kind, **changes)
    files = save(model, tmp_path)
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


def test_a_prompt_in_chunks_gives_the_same_logits(tmp_path: Path) -> None:
    model = make_model()
    files = save(model, tmp_path)
    assert_equal(our_logits(files, IDS, chunk=17), reference_logits(model, IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model()
    files = save(model, tmp_path, dtype)
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


def test_sharded_files_are_read(tmp_path: Path) -> None:
    model = make_model()
    files = save(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


def test_bfloat16_arithmetic_stays_close(tmp_path: Path) -> None:
    model = make_model()
    files = save(model, tmp_path, torch.bfloat16)
    ours, reference = our_logits(files, IDS, is_exact=False), reference_logits(model, IDS)
    assert 1e-4 < float((ours - reference).norm() / reference.norm()) < 0.02


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_gguf_logits_equal_transformers(tmp_path: Path, kind: str) -> None:
    model = make_model()
    files = save_gguf(model, tmp_path / "model.gguf", kind)
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


def test_gguf_biases_are_permuted_with_their_rows(tmp_path: Path) -> None:
    model = make_model(attention_bias=True)
    files = save_gguf(model, tmp_path / "model.gguf", "Q8_0")
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


def test_gguf_of_qwen2_is_not_permuted(tmp_path: Path) -> None:
    model = make_model("Qwen2")
    files = save_gguf(model, tmp_path / "model.gguf", "F32")
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf_of_qwen3_has_norms_of_heads(tmp_path: Path, kind: str) -> None:
    model = make_model("Qwen3", head_dim=32)
    files = save_gguf(model, tmp_path / "model.gguf", kind)
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


@pytest.mark.parametrize("head_dim", [6, 16, 20, 32, 64, 80, 128, 256])
def test_qwen3_equals_transformers_at_all_head_sizes(tmp_path: Path, head_dim: int) -> None:
    model = make_model("Qwen3", head_dim=head_dim)
    files = save(model, tmp_path)
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


def test_gguf_without_output_weight_is_tied(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    files = save_gguf(model, tmp_path / "model.gguf", "F16")
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))


def test_gguf_keeps_llama3_scaling_as_a_tensor(tmp_path: Path) -> None:
    model = make_model(rope_scaling=LLAMA3_SCALING)
    scaled = model.model.rotary_emb.inv_freq.numpy()
    factors = (inverse_frequencies(RopeSpec(16, 10000.0)) / scaled).astype(np.float32)
    files = save_gguf(model, tmp_path / "model.gguf", "F32", tensors={"rope_freqs.weight": factors})
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS), 1e-3)


def test_gguf_linear_scaling(tmp_path: Path) -> None:
    model = make_model(rope_scaling={"rope_type": "linear", "factor": 4.0})
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    files = save_gguf(model, tmp_path / "model.gguf", "F32", metadata=scaling)
    assert_equal(our_logits(files, IDS), reference_logits(model, IDS))
