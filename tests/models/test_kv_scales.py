"""Scales of keys and values in checkpoints: every writer's names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import make_model, save_gguf
from tests.support.quantised import save_quantised
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.loading.open import OpenModel


def scales_of(directory: Path, tensors: dict[str, Tensor]) -> list[tuple[float, float]] | None:
    """Return the scales read from two layers, with these tensors in the second layer's attention."""
    files = save_quantised(make_model(num_hidden_layers=2), directory, "fp8", kind="row")
    others = {f"model.layers.1.self_attn.{name}": tensor for name, tensor in tensors.items()}
    save_file(load_file(directory / "model.safetensors") | others, directory / "model.safetensors")
    return read(files)


def read(files: ModelFiles) -> list[tuple[float, float]] | None:
    with OpenModel(files) as opened:
        return opened.kv_scales()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("k_scale", "v_scale"), (0.25, 0.5)),
        (("k_proj.k_scale", "v_proj.v_scale"), (0.25, 0.5)),
        (("qkv_proj.k_scale", "qkv_proj.v_scale"), (0.25, 0.5)),
        (("k_proj.output_scale", "v_proj.output_scale"), (0.25, 0.5)),
        (("kv_scale",), (0.25, 0.25)),
        (("k_scale",), (0.25, 1.0)),
        ((), (1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_writer_s_names_are_read(
    tmp_path: Path, names: tuple[str, ...], expected: tuple[float, float], dtype: torch.dtype
) -> None:
    values = zip(names, (0.25, 0.5), strict=False)
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in values}
    assert scales_of(tmp_path, tensors) == [(1.0, 1.0), expected]


def test_heads_that_say_the_same_have_one_scale(tmp_path: Path) -> None:
    assert scales_of(tmp_path, {"k_scale": torch.full((2, 1), 0.125)}) == [(1.0, 1.0), (0.125, 1.0)]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"k_scale": 0.25, "kv_scale": 0.5}, r"'.*1.self_attn.k_scale' \(0.25\) and '.*kv_scale' \(0.5\)"),
        ({"v_scale": [0.25, 0.5]}, r"1\.self_attn\.v_scale' has 2 scales"),
        ({"v_proj.v_scale": 0.0}, r"v_proj\.v_scale' is \[0\.0\], but .* positive.*--kv-cache-dtype auto"),
        ({"k_scale": -1.0}, r"'model\.layers\.1\.self_attn\.k_scale' is \[-1\.0\]"),
        ({"k_scale": float("nan")}, "must be a positive number"),
        ({"k_scale": []}, r"is \[\]"),
    ],
)
def test_scales_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelLoadError, match=words):
        scales_of(tmp_path, {name: torch.tensor(value) for name, value in tensors.items()})


def test_a_gguf_file_has_none(tmp_path: Path) -> None:
    assert read(save_gguf(make_model(), tmp_path / "tiny.gguf", "F32")) is None
