"""Experts of damaged files: missing or contradictory tensors are refused by name."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import family_files, gguf_bytes
from tests.support.checkpoints import SHAPE, load_model, make_model, save
from tests.support.families import CASES
from tests.support.gguf_blocks import random_matrix
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.experts import stack
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.loading.gguf import GgufWeights
from tgi_asgi.models.loading.watched import watched
from tgi_asgi.models.registry import find_by_gguf_name
from tgi_asgi.ops.sources import decode
from tgi_asgi.runner.weight_progress import WeightProgress

NUM_EXPERTS, SIZE, HEAD_DIM = 4, 32, 16
HIDDEN, LAYERS = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
MLP = "model.layers.1.mlp"
F32 = 0  # ggml's number

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def cut(name: str, rows: int) -> Callable[[Tensors], None]:
    """Return a change that keeps only this many rows, or experts, of a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:rows].contiguous()

    return change


def without(*names: str) -> Callable[[Tensors], None]:
    """Return a change that removes tensors."""

    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def without_expert(number: int) -> Callable[[Tensors], None]:
    return without(*(f"{MLP}.experts.{number}.{part}_proj.weight" for part in ("gate", "up", "down")))


def with_another_expert(tensors: Tensors) -> None:
    last, new = f"{MLP}.experts.{NUM_EXPERTS - 1}.", f"{MLP}.experts.{NUM_EXPERTS}."
    more = {name.replace(last, new): each.clone() for name, each in tensors.items() if last in name}
    assert len(more) == 3
    tensors |= more


def checkpoint(folder: Path, *, is_fused: bool, **config: int) -> ModelFiles:
    """Write a checkpoint; `config` makes its config.json contradict its tensors."""
    model = make_model(
        "Qwen3Moe", num_experts=NUM_EXPERTS, num_experts_per_tok=2, moe_intermediate_size=SIZE,
        head_dim=HEAD_DIM,
    )  # fmt: skip
    files = save(model, folder, save_original_format=not is_fused)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return files


def test_whole_files_are_loaded(tmp_path: Path) -> None:
    for is_fused in (False, True):
        load_model(checkpoint(tmp_path / str(is_fused), is_fused=is_fused))
    load_model(gguf_file(tmp_path))


UNFUSED = {
    "a matrix": (
        without(f"{MLP}.experts.2.up_proj.weight"), "there is no tensor '{}.experts.2.up_proj.weight'"
    ),
    "the first matrix": (
        without(f"{MLP}.experts.0.gate_proj.weight"), "there is no tensor '{}.experts.0.gate_proj.weight'"
    ),
    "an expert": (without_expert(1), "there is no tensor '{}.experts.1.gate_proj.weight'"),
    "the last expert": (without_expert(3), "there is no tensor '{}.experts.3.gate_proj.weight'"),
    "the router": (without(f"{MLP}.gate.weight"), "there is no tensor '{}.gate.weight'"),
    "an expert too many": (with_another_expert, "holds? the tensor '{}.experts.4.down_proj.weight'"),
    "a small router": (cut(f"{MLP}.gate.weight", 3), r"'{}.gate.weight' has the shape \[3, 64\].*\[4, 64\]"),
    "a small matrix": (
        cut(f"{MLP}.experts.3.gate_proj.weight", 31),
        r"'{}.experts.3.gate_proj.weight' has the shape \[31, 64\].*\[32, 64\]",
    ),
}  # fmt: skip
FUSED = {
    "gates and ups": (without(f"{MLP}.experts.gate_up_proj"), "there is no tensor '{}.experts.gate_up_proj'"),
    "downs": (without(f"{MLP}.experts.down_proj"), "there is no tensor '{}.experts.down_proj'"),
    "the router": (without(f"{MLP}.gate.weight"), "there is no tensor '{}.gate.weight'"),
    "an expert too few": (
        cut(f"{MLP}.experts.down_proj", 3),
        r"'{}.experts.down_proj' has the shape \[3, 64, 32\].*\[4, 64, 32\]",
    ),
    "a small router": (cut(f"{MLP}.gate.weight", 3), r"'{}.gate.weight' has the shape \[3, 64\].*\[4, 64\]"),
}
DAMAGES = [
    pytest.param(is_fused, change, message, id=f"{'fused' if is_fused else 'unfused'}: {name}")
    for is_fused, damages in ((False, UNFUSED), (True, FUSED))
    for name, (change, message) in damages.items()
]


@pytest.mark.parametrize(("is_fused", "change", "message"), DAMAGES)
def test_a_damaged_checkpoint_names_the_tensor(
    tmp_path: Path, is_fused: bool, change: Callable[[Tensors], None], message: str
) -> None:
    files = checkpoint(tmp_path, is_fused=is_fused)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=message.format(re.escape(MLP))):
        load_model(files)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "mlp.experts.0.gate_proj.weight"),
        ("mixtral", "block_sparse_moe.experts.0.w1.weight"),
        ("lfm2_moe", "feed_forward.experts.0.w1.weight"),
        ("deepseek_v2", "mlp.experts.0.gate_proj.weight"),
        ("granitemoe", "block_sparse_moe.input_linear.weight"),
        ("granitemoe-fused", "block_sparse_moe.experts.gate_up_proj"),
    ],
)
def test_a_layer_without_any_expert_names_one_as_its_files_have_it(
    tmp_path: Path, family: str, name: str
) -> None:
    (case,) = (case for case in CASES if case.name == family)
    folder = tmp_path / "model"
    shutil.copytree(family_files.checkpoint(case).path, folder)
    tensors = load_file(folder / "model.safetensors")
    last = max(key.removesuffix(name) for key in tensors if key.endswith(name))
    of_experts = re.compile(rf"{re.escape(last)}\S*\.(experts|input_linear|output_linear)\b.*")
    kept = {key: tensor for key, tensor in tensors.items() if not of_experts.fullmatch(key)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=re.escape(f"there is no tensor '{last}{name}'")):
        load_model(ModelFiles(family, None, "directory", folder))


@pytest.mark.parametrize("is_fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 5}, r"'model.layers.0.mlp.gate.weight' has the shape \[4, 64\].*\[5, 64\]"),
        ({"num_experts": 3}, r"'model.layers.0.mlp.gate.weight' has the shape \[4, 64\].*\[3, 64\]"),
        ({"num_experts_per_tok": 5}, r"the experts of a token must be 1\.\.4, got 5"),
        ({"moe_intermediate_size": 64}, r"'model.layers.0.mlp.experts.*_proj.*' has the shape \[.*, but "),
    ],
    ids=str,
)
def test_counts_that_contradict_a_checkpoint_are_refused(
    tmp_path: Path, is_fused: bool, config: Mapping[str, int], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(checkpoint(tmp_path, is_fused=is_fused, **config))


def gguf_file(
    folder: Path,
    changes: Mapping[str, tuple[int, ...] | None] | None = None,
    counts: Mapping[str, int] | None = None,
) -> ModelFiles:
    """Write a GGUF file of ones; `changes` maps tensors to other shapes, or to None to omit them.

    `counts` overrides values of its header.
    """
    heads, keys = (SHAPE[f"num_{kind}_heads"] * HEAD_DIM for kind in ("attention", "key_value"))
    layer: Shapes = {
        "attn_norm": (HIDDEN,), "attn_q": (heads, HIDDEN), "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN), "attn_output": (HIDDEN, heads), "attn_q_norm": (HEAD_DIM,),
        "attn_k_norm": (HEAD_DIM,), "ffn_norm": (HIDDEN,), "ffn_gate_inp": (NUM_EXPERTS, HIDDEN),
        "ffn_gate_exps": (NUM_EXPERTS, SIZE, HIDDEN), "ffn_up_exps": (NUM_EXPERTS, SIZE, HIDDEN),
        "ffn_down_exps": (NUM_EXPERTS, HIDDEN, SIZE),
    }  # fmt: skip
    vocabulary = (SHAPE["vocab_size"], HIDDEN)
    shapes = {"token_embd.weight": vocabulary, "output_norm.weight": (HIDDEN,), "output.weight": vocabulary}
    for index in range(LAYERS):
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    wanted = {name: shape for name, shape in {**shapes, **(changes or {})}.items() if shape is not None}
    tensors = [
        gguf_bytes.Tensor(name, shape[::-1], F32, np.ones(shape, np.float32).tobytes())
        for name, shape in wanted.items()
    ]
    numbers = {
        "vocab_size": SHAPE["vocab_size"], "context_length": 512, "embedding_length": HIDDEN,
        "block_count": LAYERS, "feed_forward_length": SHAPE["intermediate_size"],
        "attention.head_count": SHAPE["num_attention_heads"],
        "attention.head_count_kv": SHAPE["num_key_value_heads"], "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0, "expert_count": NUM_EXPERTS, "expert_used_count": 2,
        "expert_feed_forward_length": SIZE, **(counts or {}),
    }  # fmt: skip
    metadata = {"general.architecture": "qwen3moe"} | {
        f"qwen3moe.{name}": value for name, value in numbers.items()
    }
    path = gguf_bytes.write(folder / "model.gguf", gguf_bytes.gguf_bytes(metadata, tensors))
    return ModelFiles("tiny", None, "gguf", path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("ffn_gate_exps", None, "no tensor 'blk.1.ffn_gate_exps.weight'"),
        ("ffn_up_exps", None, "no tensor 'blk.1.ffn_up_exps.weight'"),
        ("ffn_down_exps", None, "no tensor 'blk.1.ffn_down_exps.weight'"),
        ("ffn_down_exps", (3, 64, 32), r"'blk.1.ffn_down_exps.weight' has the shape \[3, 64, 32\]"),
        ("ffn_gate_exps", (5, 32, 64), r"'blk.1.ffn_gate_exps.weight' has the shape \[5, 32, 64\]"),
        ("ffn_up_exps", (128, 64), r"'blk.1.ffn_up_exps.weight' has the shape \[128, 64\]"),
        ("ffn_gate_inp", (3, 64), r"'blk.1.ffn_gate_inp.weight' has the shape \[3, 64\]"),
    ],
)
def test_a_damaged_gguf_file_names_the_tensor(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(gguf_file(tmp_path, {f"blk.1.{name}.weight": shape}))


def test_a_gguf_file_without_experts_names_them(tmp_path: Path) -> None:
    names = (f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
    with pytest.raises(ModelLoadError, match=r"'blk\.1\.ffn_gate_exps\.weight'"):
        load_model(gguf_file(tmp_path, dict.fromkeys(names)))


def test_a_layer_without_a_router_is_refused_by_its_experts(tmp_path: Path) -> None:
    """Check a GGUF file, in which a layer has experts if it has a router."""
    with pytest.raises(ModelLoadError, match=r"no tensor 'blk\.1\.ffn_gate\.weight'"):
        load_model(gguf_file(tmp_path, {"blk.1.ffn_gate_inp.weight": None}))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"expert_count": 5}, r"'blk.0.ffn_gate_inp.weight' has the shape \[4, 64\].*\[5, 64\]"),
        ({"expert_count": 3}, r"'blk.0.ffn_gate_inp.weight' has the shape \[4, 64\].*\[3, 64\]"),
        ({"expert_used_count": 5}, r"the experts of a token must be 1\.\.4, got 5"),
        ({"expert_used_count": 0}, r"the experts of a token must be 1\.\.4, got 0"),
        ({"expert_count": 0}, r"the experts of a layer must be 1\.\.1024, got 0"),
        ({"expert_feed_forward_length": 16}, r"'blk.0.ffn_.*_exps.weight' has the shape"),
    ],
    ids=str,
)
def test_counts_that_contradict_a_gguf_file_are_refused(
    tmp_path: Path, counts: Mapping[str, int], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(gguf_file(tmp_path, counts=counts))


@pytest.mark.parametrize("format", ["NVFP4", "Q8_0"])
def test_each_expert_of_a_gguf_file_is_read_alone(tmp_path: Path, format: str) -> None:
    """With all in one tensor, converting that for each of its experts took hours and gigabytes."""
    count, rows, columns = 32, 32, 1024
    matrix = random_matrix(format, count * rows, columns, 0.5, np.random.default_rng(1))
    stored = gguf_bytes.Tensor(
        "blk.0.ffn_up_exps.weight", (columns, rows, count), matrix.ggml_type, matrix.data.tobytes()
    )
    metadata = {"general.architecture": "qwen3moe"}
    path = gguf_bytes.write(tmp_path / "model.gguf", gguf_bytes.gguf_bytes(metadata, [stored]))
    progress: list[int] = []
    config: Any = SimpleNamespace(
        head_dim=HEAD_DIM, num_heads=1, num_kv_heads=1, has_output_gate=False, layers=[None]
    )
    with GgufFile.open(path) as file:
        weights = GgufWeights(file, config, find_by_gguf_name("qwen3moe"))
        reads = WeightProgress(weights.num_bytes, lambda stage, done, total: progress.append(done))
        tracked = watched(weights, reads)
        layer = LayerWeights(config, tracked, 0, ops.Packing(is_exact=True))
        tracemalloc.start()
        for index, one in enumerate(stack(layer, "mlp.experts.up_proj.weight", count, rows, columns)):
            expected = matrix.values[index * rows : (index + 1) * rows]
            np.testing.assert_allclose(decode(one), expected, rtol=1e-6)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert tracked.unread() == []
    assert index == count - 1
    assert peak < matrix.values.nbytes / 2
    if format == "Q8_0":
        assert progress == [index * matrix.data.nbytes // count for index in range(count)]
