"""From files to a module: names, conversions, quantised matrices, the checkpoint's own code, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import architectures
from tests.support.checkpoints import make_model, reference_logits, save_gguf
from tests.support.compressed import save_compressed
from tests.support.generic import load_generic, measure, open_generic, run_steps
from tests.support.quantised import save_quantised
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic import guards
from tgi_asgi.models.generic.common import CommonDecoder
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.generic.model import GenericConfig
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings

Checkpoint = Callable[[str], Path]

EQUAL = 1e-3  # of the largest logit
ROUNDING = 2e-5  # the same, where both compute in float32 with the same weights
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = [
    torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    for length in (40, 17)
]
STEPS = [[(0, 0, 20)], [(0, 20, 19), (1, 0, 17)], [(0, 39, 1)]]


def with_tensors(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a checkpoint with other tensors."""
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("path", ["common", "module"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "no tensor 'model.layers.1.mlp.up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(96)}),
            "'model.layers.1.mlp.up_proj.bias', which LlamaForCausalLM of transformers has no place for",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}),
            r"'model.norm.weight' has the shape \[65\]",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int64)}),
            "of dtype I64",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Any,
    reason: str,
    path: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if path == "module":
        monkeypatch.setattr(CommonDecoder, "find", lambda *_: None)
    folder = with_tensors(checkpoint("llama"), tmp_path, change)
    with pytest.raises(ModelLoadError, match=reason):
        load_generic(folder)


@pytest.mark.usefixtures("as_module")
def test_a_head_that_is_the_embedding_need_not_be_stored(tmp_path: Path) -> None:
    """Check also that the matrix is not packed twice."""
    model = make_model(**SHAPE, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded: Any = load_generic(tmp_path)
    assert loaded.module.lm_head.inner.made is loaded.module.model.embed_tokens.made
    expected = [reference_logits(model, ids).numpy() for ids in IDS]
    assert run_steps(loaded, IDS, expected, STEPS) < EQUAL


@pytest.mark.usefixtures("as_module")
def test_values_that_a_class_computes_are_not_the_rounded_ones_of_the_files(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """MiniMax's decays of 16 bits contradict each other: they depend on how a text is cut into steps."""
    model = architectures.open_reference(checkpoint("minimax"))
    model.bfloat16().save_pretrained(tmp_path)
    architectures.save_tokenizer(tmp_path)
    reference = architectures.open_reference(tmp_path)
    exact = dict(architectures.open_reference(checkpoint("minimax")).named_buffers())
    is_rounded = False
    for name, buffer in reference.named_buffers():
        is_rounded |= not torch.equal(buffer, exact[name])
        buffer.copy_(exact[name])
    assert is_rounded
    expected = [reference_logits(reference, ids).numpy() for ids in IDS]
    assert run_steps(load_generic(tmp_path), IDS, expected, STEPS) <= ROUNDING


@pytest.mark.usefixtures("as_module")
def test_matrices_of_several_files_and_types_are_one_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Compare a checkpoint in bfloat16, in two shards, with the model of the rounded weights."""

    def halve(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    folder = with_tensors(checkpoint("qwen3_moe"), tmp_path, halve)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):  # experts' parts are in both
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert measure(folder).difference < EQUAL


@pytest.mark.usefixtures("as_module")
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("gptq", {}),
        ("gptq", {"bits": 8, "is_centred": True}),
        ("gptq", {"has_order": True}),
        ("awq", {}),
        ("compressed", {"is_centred": True}),
        ("fp8", {"kind": "row"}),
        ("fp8", {"kind": "block"}),
    ],
    ids=str,
)
def test_quantised_matrices_are_what_their_codes_mean(
    recipe: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(**SHAPE)
    save_quantised(model, tmp_path, recipe, **options)
    expected = [reference_logits(model, ids).numpy() for ids in IDS]
    loaded: Any = load_generic(tmp_path)
    assert run_steps(loaded, IDS, expected, STEPS) < EQUAL


@pytest.mark.usefixtures("as_module")
@pytest.mark.parametrize("form", ["pack-quantized", "float-quantized"])
def test_checkpoints_of_compressed_tensors_are_read(form: str, tmp_path: Path) -> None:
    model = make_model("Qwen3", **SHAPE)
    is_float = form == "float-quantized"
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"} if is_float else {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True
    }  # fmt: skip
    save_compressed(model, tmp_path, form, **weights)
    expected = [reference_logits(model, ids).numpy() for ids in IDS]
    assert run_steps(load_generic(tmp_path), IDS, expected, STEPS) < EQUAL


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"n_embd": 60, "n_head": 4}, "`head_dim` must be even and at most 512, got 15"),
        ({"n_embd": 1200, "n_head": 2}, "got 600"),
    ],
    ids=["odd", "wide"],
)
def test_heads_that_the_cache_cannot_have_run_alone(
    sizes: dict[str, int], reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with open_generic(with_config(checkpoint("gpt2"), tmp_path, **sizes)) as opened:
        assert isinstance(opened.config, GenericConfig)
        assert reason in opened.config.sequential_reason
        assert opened.config.caches == ()


def test_a_decoder_s_positions_are_those_that_it_has_a_table_of(checkpoint: Checkpoint) -> None:
    """Use Whisper, which also counts audio positions, under another name."""
    with open_generic(checkpoint("whisper")) as opened:
        table = json.loads((checkpoint("whisper") / "config.json").read_text())["max_target_positions"]
        assert opened.config.context_length == table


@pytest.mark.parametrize(("method", "distance"), [("Q8_0", 0.05), ("Q4_0", 0.6)])
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "qwen3_moe", "bart"])
def test_products_are_quantised_on_request(
    model_type: str, method: str, distance: float, checkpoint: Checkpoint
) -> None:
    """Check the distance between codes and floats; the self-check compares codes with codes."""
    folder = checkpoint(model_type)
    ids = [architectures.random_ids(length, seed) for seed, length in enumerate((37, 17))]
    expected = architectures.references(folder, ids)
    steps = [[(0, 0, 20)], [(0, 20, 16), (1, 0, 17)], [(0, 36, 1)]]
    loaded = load_generic(folder, arithmetic=ops.Packing(is_exact=True, quantise=method))
    assert 1e-4 < run_steps(loaded, ids, expected, steps) < distance


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

{assignment}

class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 0.5  # what makes it another model
        return found
"""


@pytest.fixture
def own_code(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a Llama whose files contain code that halves its logits and leaves a mark when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    for file in checkpoint("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    mark = f"open({str(tmp_path / 'mark')!r}, 'w').close()"
    (folder / "own.py").write_text(CODE.format(assignment=mark))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["OwnForCausalLM"],
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_checkpoint_is_not_run_unasked(own_code: Path) -> None:
    with pytest.raises(ModelLoadError, match="bring code of their own: --trust-remote-code runs it"):
        open_generic(own_code)
    assert not (own_code.parent / "mark").exists()


def test_code_of_a_checkpoint_is_run_on_request(own_code: Path, checkpoint: Checkpoint) -> None:
    ids = [architectures.random_ids(37, 0), architectures.random_ids(17, 1)]
    expected = [0.5 * logits for logits in architectures.references(checkpoint("llama"), ids)]
    with open_generic(own_code, trusts_code=True) as opened:
        loaded = opened.load(ops.Packing(is_exact=True), 64)
    assert not isinstance(loaded, EncoderModel)
    assert (own_code.parent / "mark").exists()
    steps = [[(0, 0, 20)], [(0, 20, 16), (1, 0, 17)], [(0, 36, 1)]]
    assert run_steps(loaded, ids, expected, steps) < EQUAL


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    """Copy a checkpoint's config.json with changes, but none of its tensors."""
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"architectures": ["NobodyForCausalLM"]},
            "'NobodyForCausalLM' are not supported: neither this server nor",
        ),
        *(({"architectures": names}, "names no architecture") for names in ({"a": 1}, 5, [None])),
        ({"hidden_size": "wide"}, "transformers cannot build LlamaForCausalLM: .* expected int, got str"),
        ({"hidden_act": "wave"}, "transformers cannot build LlamaForCausalLM: KeyError"),
        ({"architectures": ["AutoTokenizer"]}, "cannot build|not supported"),
    ],
    ids=str,
)
def test_what_transformers_cannot_build_is_refused(
    changes: dict[str, Any], reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        open_generic(with_config(checkpoint("llama"), tmp_path, **changes))


def test_doge_with_experts_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its logits depend on how a text is cut; transformers keeps that for the sake of published models."""
    folder = with_config(checkpoint("doge"), tmp_path, is_moe=True)
    with pytest.raises(ModelLoadError, match="routes a prompt's tokens by each other"):
        open_generic(folder)


def test_an_encoder_decoder_that_writes_no_text_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    changes = {"architectures": ["BartForQuestionAnswering"], "is_encoder_decoder": True}
    with pytest.raises(ModelLoadError, match="has no head"):
        open_generic(with_config(checkpoint("bart"), tmp_path, **changes))


def test_an_encoder_is_no_decoder_unless_its_configuration_says_so(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match="does not say `is_decoder`"):
        open_generic(with_config(checkpoint("roberta"), tmp_path, is_decoder=False))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_module_that_asks_its_cache_for_more_runs_alone(
    name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"def forward(self, {name}): self.cache.move_to_end(); {name}.update_indexer()"
    monkeypatch.setattr(
        guards, "class_source", lambda kind: source if kind.__name__ == "LlamaAttention" else ""
    )
    with open_generic(checkpoint("llama")) as opened:
        assert isinstance(opened.config, GenericConfig)
        assert opened.config.sequential_reason == (
            "LlamaAttention of transformers keeps more of a sequence than keys and values (update_indexer)"
        )


def test_a_gguf_file_has_no_code_of_transformers(tmp_path: Path) -> None:
    files = save_gguf(make_model(), tmp_path / "tiny.gguf", "F32")
    with pytest.raises(ModelLoadError, match="needs a checkpoint directory, not a GGUF file"):
        OpenModel(files, model_impl="transformers")


@pytest.mark.parametrize(("impl", "expected"), [("auto", "native"), ("transformers", "transformers")])
def test_a_family_of_ours_is_native_unless_it_is_forced(
    impl: str, expected: str, checkpoint: Checkpoint
) -> None:
    settings = Settings(thread_nice=0, num_threads=1, max_batch_size=2, dtype="float32", model_impl=impl)
    files = ModelFiles("tiny", None, "directory", checkpoint("llama"))
    loaded = load(settings, files, lambda *_: None)
    loaded.runner.close()
    assert loaded.info.implementation == expected


def test_an_architecture_without_a_family_is_refused_where_only_those_are_wanted(
    checkpoint: Checkpoint,
) -> None:
    files = ModelFiles("tiny", None, "directory", checkpoint("gptj"))
    with pytest.raises(ModelLoadError, match="GPTJForCausalLM"):
        OpenModel(files, model_impl="native")
