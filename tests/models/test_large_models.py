"""Sizes: files beyond 2^32 bytes, long prompts, and models that do not fit into memory."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import make_model, our_logits, save, save_gguf, save_tokenizer
from tests.support.load_memory import measure
from tests.support.runner_driver import Job, generate
from tests.support.scale import Scale
from tests.support.sparse_files import HOLE_BYTES, sparse_checkpoint, sparse_gguf, stretch
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.safetensors import SafetensorsFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner import load as load_module
from tgi_asgi.runner.memory import packed_bytes
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

MIB, GIB = 1 << 20, 1 << 30
IDS = [(7 * index + 3) % 160 for index in range(50)]
WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "vocab_size": 16384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
WIDE_BYTES = 2 * (2 * 16384 * 1024 + 3 * (3 * 4096 * 1024 + 4 * 1024 * 1024))  # of matrices: 160 MiB
BEYOND: dict[str, Any] = {  # Llama 2 with 7 billion parameters
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

NUM_COMPARED, CHUNK = 64, 1000
EXACT = 1e-3  # of a log-probability
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * index for index in range(16)],
    "long_factor": [1.0 + 0.5 * index for index in range(16)],
    "original_max_position_embeddings": 1024,
}


# Files with offsets beyond 2^32.


def stretched(tmp_path: Path, kind: str) -> tuple[ModelFiles, ModelFiles]:
    """Return a small model, and the same with a hole of more than 2^32 bytes in its file."""
    model = make_model()
    if kind == "safetensors":
        small = save(model, tmp_path / "small")
        return small, stretch(small, tmp_path / "large")
    small = save_gguf(model, tmp_path / "small.gguf", "Q8_0")
    return small, stretch(small, tmp_path / "large.gguf")


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_tensors_beyond_2_32_bytes_are_read_right(tmp_path: Path, kind: str) -> None:
    small, large = stretched(tmp_path, kind)
    file: SafetensorsFile | GgufFile
    if kind == "gguf":
        file = GgufFile.open(large.path)
    else:
        file = SafetensorsFile.open(large.path / "model.safetensors")
    offsets = [info.offset for info in file.tensors.values()]
    file.close()
    assert min(offsets) < 1 << 20
    assert sum(offset > 1 << 32 for offset in offsets) >= len(offsets) // 2 - 1
    assert torch.equal(our_logits(large, IDS), our_logits(small, IDS))


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_loading_takes_the_weights_once(tmp_path: Path, kind: str) -> None:
    files = (
        sparse_gguf(tmp_path / "model.gguf", **WIDE)
        if kind == "gguf"
        else sparse_checkpoint(tmp_path / "model", has_unused=True, **WIDE)
    )
    file = files.path if kind == "gguf" else files.path / "model.safetensors"
    assert file.stat().st_size > HOLE_BYTES + WIDE_BYTES
    assert file.stat().st_blocks * 512 < MIB, "the file must be a hole"
    taken = measure(kind, files.path, free_bytes=GIB)
    assert WIDE_BYTES < taken.peak_bytes < 1.3 * WIDE_BYTES + 64 * MIB


def test_loading_takes_a_layer_of_experts_once(tmp_path: Path) -> None:
    shape = {**WIDE, "num_hidden_layers": 1, "vocab_size": 512, "intermediate_size": 1024}
    files = sparse_gguf(tmp_path / "model.gguf", num_experts=24, **shape)
    num_bytes = 2 * 24 * 3 * 1024 * 1024
    taken = measure("gguf", files.path, free_bytes=GIB)
    assert num_bytes < taken.peak_bytes < 1.3 * num_bytes + 64 * MIB


# Long prompts.


def logprobs_of_transformers(model: Any, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities [NUM_COMPARED, vocab] after the last tokens, without the very last."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]), logits_to_keep=NUM_COMPARED, use_cache=False).logits[0]
    found: torch.Tensor = logits.double().log_softmax(-1)
    return found


def largest_difference(files: ModelFiles, ids: list[int], expected: torch.Tensor) -> float:
    """Return the largest error of the log-probabilities of the last tokens and of the best ones there."""
    settings = Settings(
        dtype="float32",
        num_threads=2,
        thread_nice=0,
        max_batch_size=NUM_COMPARED,  # logits are computed for this many rows at a time
        max_batch_prefill_tokens=CHUNK,
        max_batch_total_tokens=len(ids),
    )
    job = Job(ids, 0, SamplingParams(temperature=0.0), wants_prompt_logprobs=5)
    runner = load_module.load(settings, files).runner
    try:
        asyncio.run(generate(runner, [job], chunk=CHUNK))
    finally:
        runner.close()
    assert len(job.prompt_logprobs) == len(ids)
    apart = [
        abs(logprob - float(truth[token_id]))
        for token, (own, top), truth in zip(
            ids[-NUM_COMPARED:], job.prompt_logprobs[-NUM_COMPARED:], expected, strict=True
        )
        for token_id, logprob in ((token, own), *top)
        if logprob is not None
    ]
    assert len(apart) == NUM_COMPARED * 6
    return float(torch.tensor(apart).nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize(
    ("kind", "rope"), [("Llama", LLAMA3), ("Phi3", LONGROPE)], ids=["llama3", "longrope"]
)
def test_a_prompt_of_thousands_of_tokens_is_that_of_transformers(
    tmp_path: Path, kind: str, rope: dict[str, Any], scale: Scale
) -> None:
    """Use more than one chunk, and at least three times the context before scaling."""
    length = scale(3072, 8192)
    model = make_model(
        kind,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        rope_parameters=rope,
        **({"original_max_position_embeddings": 1024, "pad_token_id": None} if kind == "Phi3" else {}),
    )
    model.config._attn_implementation = "sdpa"  # it needs no [length, length] scores
    ids = torch.randint(160, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    files = save(model, tmp_path / "model")
    save_tokenizer(files.path)
    expected = logprobs_of_transformers(model, ids)
    assert largest_difference(files, ids, expected) < EXACT
    # The comparison also detects missing scaling.
    path = files.path / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    path.write_text(json.dumps(config))
    assert largest_difference(files, ids, expected) > 10 * EXACT


# What fits into memory, and what does not.


def load_with(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> Callable[..., ModelInfo]:
    """Return a function that loads a model with changed settings and this much free memory."""
    monkeypatch.setattr(load_module, "free_memory", lambda: free_bytes)

    def load(files: ModelFiles, **changes: Any) -> ModelInfo:
        options = {"num_threads": 1, "thread_nice": 0, "max_batch_size": 2, "max_batch_prefill_tokens": 64}
        settings = Settings(**{**options, **changes})
        loaded = load_module.load(settings, files)
        loaded.runner.close()
        return loaded.info

    return load


@pytest.mark.parametrize(
    ("free_bytes", "advice"),
    [
        (5 * GIB, r"--quantize q4_0 \(3\.7 GiB\) would fit"),
        (8 * GIB, r"--quantize q8_0 \(6\.7 GiB\) or --quantize q4_0 \(3\.7 GiB\) would fit"),
        (2 * GIB, "use a smaller model, or a smaller quantisation of it"),
    ],
)
def test_weights_beyond_the_memory_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, advice: str
) -> None:
    files = sparse_checkpoint(tmp_path / "model", **BEYOND)
    stages: list[str] = []
    monkeypatch.setattr(load_module, "free_memory", lambda: free_bytes)
    with pytest.raises(
        ModelLoadError, match=rf"weights take 12\.6 GiB, but {free_bytes / GIB:.1f} .*{advice}"
    ):
        load_module.load(Settings(thread_nice=0), files, lambda stage, done, total: stages.append(stage))
    assert not stages


@pytest.mark.parametrize("quantise", [None, "Q8_0", "Q4_0"])
def test_what_weights_will_take_is_known_before(tmp_path: Path, quantise: str | None) -> None:
    files = sparse_checkpoint(
        tmp_path / "model", hidden_size=256, intermediate_size=512, vocab_size=8192, num_key_value_heads=4
    )
    packing = ops.Packing(is_exact=False, quantise=quantise)
    with OpenModel(files) as opened:
        expected = packed_bytes(opened.packed_tensors(), packing, opened.config.vocabulary_sizes)
        model: Any = opened.load(packing, 512)
    weights = [model.embedding, model.head]
    for layer in model.layers:
        weights += [layer.qkv, layer.output, layer.up, layer.down]
    parts = [part for weight in weights for part in getattr(weight.made, "parts", [weight.made])]
    assert sum(part.matrix.nbytes for part in parts) == pytest.approx(expected, rel=0.01)


def test_tensors_that_nothing_reads_need_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sparse_checkpoint(tmp_path / "model", has_unused=True)
    assert load_with(monkeypatch, GIB)(files).max_total_tokens == 512


def test_a_cache_beyond_the_memory_names_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_with(monkeypatch, 64 * MIB)
    files = sparse_checkpoint(tmp_path / "model", max_position_embeddings=1 << 20, num_key_value_heads=4)
    with pytest.raises(ModelLoadError, match="fewer than --max-total-tokens 1000000") as refused:
        load(files, max_total_tokens=1_000_000)
    found = re.search(r"set that to at most (\d+), or free memory", str(refused.value))
    assert found is not None
    largest = int(found[1])
    assert load(files, max_total_tokens=largest).max_total_tokens == largest
    with pytest.raises(ModelLoadError, match=f"at most {largest}"):
        load(files, max_total_tokens=largest + 1)


def test_a_rotary_table_beyond_the_memory_names_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = load_with(monkeypatch, 64 * MIB)
    files = sparse_checkpoint(tmp_path / "model", max_position_embeddings=1 << 24)
    options = {"max_batch_total_tokens": 1 << 20}  # the administrator has set the size of the cache
    with pytest.raises(ModelLoadError, match="for its rotary tables") as refused:
        load(files, max_total_tokens=1 << 20, **options)
    found = re.search(r"--max-total-tokens to at most (\d+)", str(refused.value))
    assert found is not None
    largest = int(found[1])
    assert load(files, max_total_tokens=largest, **options).max_total_tokens == largest
    with pytest.raises(ModelLoadError, match=f"at most {largest}"):
        load(files, max_total_tokens=largest + 1, **options)


def test_a_context_of_millions_is_cut_to_what_memory_holds(tmp_path: Path) -> None:
    files = sparse_checkpoint(tmp_path / "model", max_position_embeddings=1 << 24)
    taken = measure("safetensors", files.path, free_bytes=2 * GIB)
    assert 1 << 18 < taken.max_total_tokens < 1 << 20
    assert taken.peak_bytes < 512 * MIB
