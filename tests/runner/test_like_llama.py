"""Adapters and shards of models that have no class in `transformers`, by the names of their own files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.test_adapters import job_of, load_case, run
from tests.runner.test_shards import scored
from tests.support.adapters import write_adapter
from tests.support.family_files import Reference
from tests.support.family_scores import score
from tests.support.like_llama import LIKE_LLAMA, LikeLlama, make
from tests.support.runner_driver import compare
from tgi_asgi.formats.sources import ModelFiles, resolve
from tgi_asgi.settings import Settings

EXACT = 5e-5  # of a log-probability
SCALE = 2.0  # of the adapter
BY_NAME = {case.name: case for case in LIKE_LLAMA}


def made(name: str, folder: Path) -> tuple[LikeLlama, ModelFiles, Reference]:
    case = BY_NAME[name]
    found = make(replace(case, same=replace(case.same, gguf=())), folder)
    return case, ModelFiles(name, None, "directory", folder / "published"), found


def shape_of(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


@pytest.mark.parametrize("name", ["internlm2", "exaone", "qwen", "chatglm"])
def test_an_adapter_gives_what_its_base_with_the_merged_weights_gives(name: str, tmp_path: Path) -> None:
    case, files, found = made(name, tmp_path)
    tensors = load_file(files.path / "model.safetensors")
    matrices = {key.removesuffix(".weight") for key, value in tensors.items() if value.dim() == 2}
    layers = sorted(each for each in matrices if ".layers." in each or ".h." in each)
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"base_model.model.{each}": shape_of(tensors[f"{each}.weight"]) for each in layers},
        target_modules=sorted({each.rpartition(".")[2] for each in layers}),
        base_model_name_or_path=str(files.path),
    )
    changes = load_file(adapter / "adapter_model.safetensors")
    for each in layers:
        first, second = (changes[f"base_model.model.{each}.lora_{part}.weight"] for part in "AB")
        tensors[f"{each}.weight"] = tensors[f"{each}.weight"] + SCALE * second @ first
    shutil.copytree(files.path, tmp_path / "merged")
    save_file(tensors, tmp_path / "merged" / "model.safetensors")
    loaded = load_case(files)
    try:
        assert loaded.adapters is not None
        jobs = [job_of(found, weights) for weights in (None, loaded.adapters.load(adapter).weights)]
        run(loaded, jobs)
    finally:
        loaded.runner.close()
    truth = score(case.same, replace(files, path=tmp_path / "merged"), found, "float32")
    served = resolve(Settings(model_id=str(adapter)), lambda *_: None)
    merged = score(case.same, served, found, "float32")
    expected, by_request, by_id, alone = (
        np.array([value for value, _ in job.prompt_logprobs[1:]], float)
        for job in (truth, jobs[1], merged, jobs[0])
    )
    assert np.abs(by_request - expected).max() <= EXACT
    assert np.abs(by_id - expected).max() <= EXACT
    assert np.abs(alone - expected).max() > 0.1


@pytest.mark.parametrize(
    "name",
    [
        "internlm2",
        "chatglm",
        *(
            pytest.param(name, marks=pytest.mark.models)
            for name in (
                "exaone",
                "minicpm",
                "qwen",
                "orion",
                "baichuan-13b",
                "baichuan2-7b",
                "internlm2-biases",
            )
        ),
    ],
)
async def test_two_shards_write_what_one_does(name: str, tmp_path: Path) -> None:
    _, files, _ = made(name, tmp_path)
    compare(await scored(files, 2), await scored(files, 1))
