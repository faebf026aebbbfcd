"""The server knows before reading weights whether a model fits, and its refusal says what would fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runner.test_load import settings
from tests.support.adapters import write_adapter
from tests.support.checkpoints import SHAPE, load_model, make_model, save, save_gguf, save_tokenizer
from tests.support.families import CASES
from tests.support.family_files import checkpoint
from tests.support.quantised import save_quantised
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.adapters import AdapterLoader, targets_of
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.families.gemma4 import Gemma4
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.models.loading.recognise import read_config
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.runner import load as loading
from tgi_asgi.runner.memory import (
    check_rope_fits,
    check_weights_fit,
    cut_tensors,
    log_adapter_memory,
    packed_bytes,
    reserved_adapter_bytes,
)

GIB, MIB = 1 << 30, 1 << 20
FAST = ops.Packing(is_exact=False)
ROUNDED = ops.Packing(is_exact=False, rounds_floats=True)


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (5 * GIB, None),
        (
            2 * GIB,
            r"take 4\.0 GiB, but 2\.0 GiB .*: --quantize q8_0 \(1\.1 GiB\) or --quantize q4_0 \(0\.6 GiB\)",
        ),
        (GIB, r"GiB of memory are free: --quantize q4_0 \(0\.6 GiB\) would fit"),
        (GIB // 4, "use a smaller model"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_would(free: int, words: str | None) -> None:
    tensors = [("F32", GIB - 64), ("F32", 64)]
    if words is None:
        assert check_weights_fit(tensors, FAST, (), free) == 4 * GIB
        return
    with pytest.raises(ModelLoadError, match=words):
        check_weights_fit(tensors, FAST, (), free)


@pytest.mark.parametrize(
    ("name", "packing", "expected"),
    [
        ("BF16", FAST, 2048),
        ("BF16", ops.Packing(is_exact=True), 2048),
        ("BF16", ops.Packing(is_exact=False, quantise="Q8_0"), 1088),
        ("F32", FAST, 4096),
        ("F32", ROUNDED, 2048),
        ("F16", ROUNDED, 2048),
        ("F32", ops.Packing(is_exact=False, quantise="Q8_0", rounds_floats=True), 1088),
        ("Q4_0", ROUNDED, 576),
        ("Q4_0", ops.Packing(is_exact=False, quantise="Q8_0"), 576),
        ("Q4_K", FAST, 592),  # its scales are whole bytes
        ("IQ2_XS", FAST, 596),
        ("F8_32", FAST, 2048),
        ("F8_32", ops.Packing(is_exact=True), 4096),
        ("I32", FAST, 4096),
    ],
)
def test_a_weight_takes_what_it_is_packed_to(name: str, packing: ops.Packing, expected: int) -> None:
    assert packed_bytes([(name, 1024)], packing, ()) == expected


@pytest.mark.parametrize("quantise", [None, "Q8_0", "Q4_0"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_predicted_weight_bytes_are_those_packed(tmp_path: Path, kind: str, quantise: str | None) -> None:
    files = save_gguf(
        make_model(vocab_size=32, num_attention_heads=2, num_key_value_heads=2), tmp_path / "model.gguf", kind
    )
    for rounds in (False, True):
        assert_size_is_predicted(files, ops.Packing(is_exact=False, quantise=quantise, rounds_floats=rounds))


def test_embeddings_of_layers_are_foretold_at_eight_bits() -> None:
    """They are most of a small Gemma 4."""
    case = next(case for case in CASES if case.name == "gemma4-shared")
    packing = ops.Packing(is_exact=False, quantise="Q4_0")
    with OpenModel(checkpoint(case)) as opened:
        predicted = packed_bytes(opened.packed_tensors(), packing, opened.config.vocabulary_sizes)
        others = packed_bytes(opened.packed_tensors(), packing, opened.config.vocabulary_sizes[:1])
    model = load_model(checkpoint(case), packing, max_positions=16)
    assert isinstance(model, Gemma4)
    table = model.input_table.made.matrix.nbytes
    assert predicted - others == pytest.approx(table - table * 4.5 / 8.5, rel=0.06)


def assert_size_is_predicted(files: ModelFiles, packing: ops.Packing) -> None:
    """Check that the packed weights of a model are as large as predicted from its files."""
    with OpenModel(files) as opened:
        vocabulary = opened.config.vocabulary_sizes
        predicted = packed_bytes(opened.packed_tensors(), packing, vocabulary)
    model = load_model(files, packing, max_positions=16)
    assert isinstance(model, Decoder)
    assert held_bytes(model) == pytest.approx(predicted, rel=0.06)


def held_bytes(model: Decoder) -> int:
    """Return the bytes of a model's packed matrices."""
    made = [model.embedding.made, model.head.made]
    for layer in model.layers:
        made += [*layer.qkv.made.parts, layer.output.made, *layer.up.made.parts, layer.down.made]
    return sum(part.matrix.nbytes for part in made)


@pytest.mark.parametrize(
    "recipe",
    [
        {"recipe": "gptq"},
        {"recipe": "gptq", "has_order": True},
        {"recipe": "gptq", "has_order": True, "bits": 8, "is_centred": True},
        {"recipe": "gptq", "bits": 8, "is_centred": True},
        {"recipe": "gptq", "bits": 8},
        {"recipe": "awq"},
        {"recipe": "compressed"},
        {"recipe": "fp8", "kind": "row"},
    ],
    ids=lambda recipe: "-".join(str(value) for value in recipe.values()),
)
def test_what_is_foretold_of_quantised_checkpoints(tmp_path: Path, recipe: dict[str, Any]) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    files = save_quantised(make_model(vocab_size=32, **shape), tmp_path, **recipe)
    for is_exact in (False, True):
        assert_size_is_predicted(files, ops.Packing(is_exact))


@pytest.mark.parametrize("options", [{}, {"bits": 8, "is_centred": True}], ids=["4 bits", "8 bits"])
def test_what_shards_decode_is_counted_as_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Act-order has no blocks of columns to cut, so shards hold o_proj and down_proj in float16."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    files = save_quantised(make_model(vocab_size=32, **shape), tmp_path, "gptq", has_order=True, **options)
    save_tokenizer(tmp_path)
    held = 0
    for rank in (0, 1):
        with OpenModel(files) as opened:
            vocabulary = opened.config.vocabulary_sizes
            tensors = opened.packed_tensors()
            opened.use_cut(opened.cuts(2)[rank])
            model = opened.load(FAST, 16)
        assert isinstance(model, Decoder)
        held += held_bytes(model)
    assert packed_bytes(cut_tensors(tensors), FAST, vocabulary) == pytest.approx(held, rel=0.06)
    assert packed_bytes(tensors, FAST, vocabulary) < 0.8 * held
    monkeypatch.setattr(loading, "free_memory", lambda: int(0.9 * held))
    with pytest.raises(ModelLoadError, match="the model's weights take"):
        load(files, num_shard=2)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelFiles]:
    """Make a model whose configuration promises 16,777,216 tokens of context, with 64 MiB of free memory."""
    files = save(make_model(), tmp_path)
    save_tokenizer(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 1 << 24}))
    monkeypatch.setattr(loading, "free_memory", lambda: 64 * MIB)
    yield files


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that records the number of positions of each rotary table made from now on."""
    made: list[int] = []
    create = ops.RopeTable.create

    def noting(inverse: Any, max_positions: int, **options: Any) -> ops.RopeTable:
        made.append(max_positions)
        return create(inverse, max_positions, **options)

    monkeypatch.setattr(ops.RopeTable, "create", noting)
    return made


def load(files: ModelFiles, **changes: object) -> loading.LoadedModel:
    loaded = loading.load(settings(**changes), files)
    loaded.runner.close()
    return loaded


def test_nothing_is_read_of_weights_that_do_not_fit(
    files: ModelFiles, tables: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> ops.WeightSource:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsWeights, "get", fail)
    monkeypatch.setattr(loading, "free_memory", lambda: 1000)
    with pytest.raises(ModelLoadError, match=r"the model's weights take .* GiB .* are free: use a smaller"):
        load(files)
    assert not tables


def test_a_cpu_without_memory_for_a_cache_does_not_advise_what_it_ignores(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.runner.cpu_load.check_weights_fit", lambda *given, **_: given[-1])  # all
    with pytest.raises(ModelLoadError, match="free memory, or set --max-batch-total-tokens"):
        load(files, cuda_memory_fraction=0.5)


def test_a_context_without_end_is_cut_to_the_cache_before_its_table_is_made(
    files: ModelFiles, tables: list[int]
) -> None:
    info = load(files).info
    assert tables == [info.max_total_tokens]
    assert info.max_total_tokens * ops.RopeTable.bytes_per_position(16) < 64 * MIB / 8
    assert info.kv_bytes <= 32 * MIB


def test_a_rotary_table_that_does_not_fit_is_refused_before_it_is_made(
    files: ModelFiles, tables: list[int]
) -> None:
    """Check the rotary tables only; the administrator's cache size is trusted: memory is only reserved."""
    with pytest.raises(
        ModelLoadError, match=r"rotary tables, .* GiB are free: set --max-total-tokens to at most"
    ):
        load(files, max_batch_total_tokens=1 << 24, max_total_tokens=1 << 24)
    assert not tables
    cured = load(files, max_batch_total_tokens=1 << 24, max_total_tokens=100_000).info
    assert tables == [cured.max_total_tokens] == [100_000]


def test_the_advised_context_fits() -> None:
    _, config = read_config({**SHAPE, "architectures": ["LlamaForCausalLM"], "head_dim": 128})
    with pytest.raises(ModelLoadError, match="to at most 65536"):
        check_rope_fits(config, 1 << 24, 64 * MIB)
    check_rope_fits(config, 65536, 64 * MIB)


def test_files_say_what_they_store(tmp_path: Path) -> None:
    with OpenModel(save(make_model(), tmp_path)) as opened:
        stored = opened.weights.stored()
        assert {name for name, _ in stored.values()} == {"F32"}
        assert sum(elements for _, elements in stored.values()) * 4 == opened.weights.num_bytes


def test_adapters_at_their_largest_are_kept_room_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(save(make_model(), tmp_path / "model"), max_positions=64)
    assert isinstance(model, Decoder)
    loader = AdapterLoader(ops.AdapterLayout(targets_of(model), max_rank=8))
    shapes = {
        f"base_model.model.{name}": target.shape
        for name, target in loader.layout.targets.items()
        if "qkv" not in name and "gate_up" not in name
    }
    taken = loader.load(write_adapter(tmp_path / "adapter", shapes, 8)).num_bytes
    assert reserved_adapter_bytes(model.config, 3, 8, GIB) == 3 * loader.max_bytes
    assert loader.max_bytes <= taken <= 1.3 * loader.max_bytes, "rows and columns are padded"
    assert reserved_adapter_bytes(model.config, 3, 8, 1000) == 500, "the cache needs room, too"
    # 7 products; each of 4 shards has the sides that are as long as the residual, two each KV head's rows.
    config = model.config
    more = 3 * 7 * config.hidden_size + 2 * config.num_kv_heads * config.head_dim
    each = loader.max_bytes + config.num_layers * more * 8 * 2
    assert reserved_adapter_bytes(config, 3, 8, GIB, num_shards=4, repeats=2.0) == 3 * each
    with caplog.at_level("INFO"):
        log_adapter_memory(3, GIB, 3 * GIB)
        log_adapter_memory(3, GIB, 2 * GIB)
    enough, short = caplog.records
    assert (enough.levelname, short.levelname) == ("INFO", "WARNING")
    assert "would take 3.00 GiB; 2.00 GiB are kept free" in short.getMessage()
    assert "lower --max-cpu-loras or --max-lora-rank" in short.getMessage()


def test_the_cache_leaves_room_for_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = save(make_model(), tmp_path / "model")
    save_tokenizer(files.path)
    monkeypatch.setattr(loading, "free_memory", lambda: 8 * MIB)
    sizes = {}
    for enable_lora in (False, True):
        given = settings(
            enable_lora=enable_lora, max_cpu_loras=100, max_lora_rank=64, max_batch_total_tokens=None,
            max_batch_size=1000,
        )  # fmt: skip
        loaded = loading.load(given, files, lambda *_: None)
        sizes[enable_lora] = loaded.info.kv_tokens
        loaded.runner.close()
    assert sizes[True] <= 0.6 * sizes[False]


@pytest.mark.parametrize(
    ("stored", "dtype", "is_told"),
    [
        (torch.float32, "auto", True),
        (torch.float16, "auto", True),
        (torch.bfloat16, "auto", False),
        (torch.float32, "bfloat16", False),
        (torch.float32, "float32", False),
    ],
)
def test_what_rounding_would_gain_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: torch.dtype, dtype: str, is_told: bool
) -> None:
    files = save(make_model(), tmp_path, stored)
    save_tokenizer(tmp_path)
    with caplog.at_level("INFO"):
        load(files, dtype=dtype).runner.close()
    assert any("--dtype bfloat16" in record.getMessage() for record in caplog.records) == is_told
