"""Quantised matrices of hostile files: any dtype, rank or size yields weights or a `ModelLoadError`."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.support.hypothesis_examples import for_all
from tests.support.quantised import (
    awq_tensors,
    compressed_tensors,
    float8_tensors,
    gptq_tensors,
    random_codes,
)
from tests.support.scale import Scale
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.ops import Packing, linear_weight

STEM = "model.layers.0.mlp.down_proj."
ROWS, COLUMNS = 16, 64
DTYPES = (
    torch.int32, torch.int64, torch.uint8, torch.bool, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn,
)  # fmt: skip


def sound_tensors(recipe: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one matrix as its recipe writes them."""
    torch.manual_seed(0)
    if recipe.startswith("fp8"):
        return float8_tensors(torch.randn(ROWS, COLUMNS), recipe.removeprefix("fp8-"))[0]
    bits = 8 if recipe.endswith("8") else 4
    matrix = random_codes(ROWS, COLUMNS, 32, bits=bits, is_centred=bits == 8, order_seed=1)
    if recipe.startswith("gptq"):
        return gptq_tensors(matrix, bits=bits)
    if recipe == "awq":
        return awq_tensors(matrix)
    if recipe == "w8a8":
        codes = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8)
        return {"weight": codes, "weight_scale": torch.rand(ROWS, 1).half()}
    if recipe in ("nvfp4", "mxfp4"):
        codes = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8)
        if recipe == "mxfp4":
            return {"weight_packed": codes, "weight_scale": torch.full((ROWS, COLUMNS // 32), 127).byte()}
        scales = torch.rand(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scales, "weight_scale_2": torch.tensor(0.5)}
    if recipe == "nf4":
        state = {"shape": [ROWS, COLUMNS], "blocksize": 64}
        return {
            "weight": torch.randint(0, 256, (ROWS * COLUMNS // 2, 1), dtype=torch.uint8),
            "weight.absmax": torch.rand(ROWS * COLUMNS // 64),
            "weight.quant_map": torch.linspace(-1, 1, 16),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()]).byte(),
        }
    return compressed_tensors(matrix, is_centred=False) | {"weight_g_idx": torch.full((COLUMNS,), -1).int()}


OPTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "gptq-8": {"quant_method": "gptq", "bits": 8},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "w8a8": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "mxfp4": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    "nf4": {"quant_method": "bitsandbytes"},
    "fp8-tensor": {"quant_method": "fp8"},
    "fp8-row": {"quant_method": "fp8"},
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [32, 32]},
}


@st.composite
def changed_tensors(draw: st.DrawFn, recipe: str) -> dict[str, torch.Tensor]:
    """Remove a tensor, or change its dtype, sizes, rank or values."""
    tensors = sound_tensors(recipe)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        tensor = tensors.pop(name)
        if draw(st.integers(0, 9)) == 0:
            continue
        near = st.sampled_from(sorted({size + by for size in tensor.shape for by in (-1, 0, 1)} | {0, 1, 2}))
        sizes = draw(st.one_of(st.just(list(tensor.shape)), st.lists(near, max_size=3)))
        dtype = draw(st.sampled_from((tensor.dtype, tensor.dtype, *DTYPES)))
        count = int(np.prod(sizes, dtype=np.int64)) * dtype.itemsize
        fill = draw(st.sampled_from((0, 1, 0x7F, 0xFF, None)))
        data = torch.randint(256, (count,)) if fill is None else torch.full((count,), fill)
        data = data % 2 if dtype is torch.bool else data
        is_kept = sizes == list(tensor.shape) and dtype is tensor.dtype and draw(st.booleans())
        tensors[name] = tensor if is_kept else data.to(torch.uint8).view(dtype).view(sizes)
    return tensors


@pytest.mark.parametrize("recipe", OPTIONS)
def test_what_is_sound_is_read(recipe: str) -> None:
    read(recipe, sound_tensors(recipe), (ROWS, COLUMNS))


@pytest.mark.parametrize("size", [(), (0,), (64,), (0, 0), (0, 64), (16, 0), (2, 8, 4)], ids=str)
@pytest.mark.parametrize("recipe", sorted(OPTIONS.keys() - {"nf4"}))  # whose tensors may have any rank
def test_a_tensor_of_another_rank_is_refused(recipe: str, size: tuple[int, ...]) -> None:
    for name, tensor in sound_tensors(recipe).items():
        is_fine = (
            (size == () and name.startswith("weight_scale") and ("fp8" in recipe or recipe == "w8a8"))
            or (size == () and name == "weight_scale_2")
            or (size == (COLUMNS,) and "g_idx" in name)
        )
        changed = sound_tensors(recipe) | {name: torch.ones(size).to(tensor.dtype)}
        with contextlib.nullcontext() if is_fine else pytest.raises(ModelLoadError):
            read(recipe, changed, (ROWS, COLUMNS))


@pytest.mark.parametrize("recipe", OPTIONS)
def test_no_tensors_end_in_a_traceback(recipe: str, scale: Scale) -> None:
    shapes = st.sampled_from([(ROWS, COLUMNS)] * 3 + [(ROWS - 1, COLUMNS), (ROWS, COLUMNS + 1), (ROWS,)])

    @for_all(scale(20, 5000), changed_tensors(recipe), shapes)
    def check(tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
        with contextlib.suppress(ModelLoadError):
            read(recipe, tensors, shape)


def read(recipe: str, tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> None:
    """Read the matrix from a checkpoint of its tensors, count its memory, and pack it."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {STEM + name: each.contiguous() for name, each in tensors.items()}, f"{folder}/model.safetensors"
        )
        weights = SafetensorsWeights(
            Path(folder), Quantisation.from_json({"quantization_config": OPTIONS[recipe]})
        )
        try:
            assert all(elements >= 0 for _, elements in weights.stored().values())
            for name in weights.names():
                weights.shape(name)
            source = weights.get(f"{STEM}weight", shape)
            assert source.shape == shape
            if len(shape) == 2:
                linear_weight(source, Packing(is_exact=True))
        finally:
            weights.close()
