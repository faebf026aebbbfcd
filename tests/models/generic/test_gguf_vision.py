"""GGUF models with a projector beside them: logits and prompts are those of the same model as safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.models.generic.test_vision import ANSWER, distance
from tests.support import gguf_vision
from tests.support import vision_models as vision
from tests.support.gguf_vision import CASES, Made, changed
from tests.support.vision_chats import Part, chatting
from tests.support.vision_models import Prompt, picture
from tests.support.vision_runs import run, tower_of
from tgi_asgi import ops
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.loading.gguf_vision import GgufVisionWeights
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import ImageProcessor

LARGE = (1000, 600)  # pixels
MORE_CLIENTS = ("qwen2_5_vl", "qwen3_5", "lfm2_vl")
FEW = ("smolvlm", "gemma3", "qwen2_5_vl", "mistral3")

pytestmark = [pytest.mark.demo, pytest.mark.filterwarnings("ignore")]  # the converter is fetched


def of_each(names: Sequence[str]) -> list[Any]:
    """Return these cases as parameters, with those outside `FEW` marked `models`."""
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.models) for name in names]


def opened(files: ModelFiles, impl: str = "auto") -> tuple[GenericModel | Model, ImageProcessor, Tokenizer]:
    with OpenModel(files, model_impl=impl) as found:
        processor = found.read_image_processor()
        tokenizer, _ = found.read_text()
        model = found.load(ops.Packing(is_exact=True), 2048)
    assert model.kind != "encoder"
    assert processor is not None
    return model, processor, tokenizer


def prompts_of(made: Made, name: str, processor: ImageProcessor) -> list[Prompt]:
    parts: list[list[Part]] = [
        ["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"],
        ["no picture here, is there"],
        ["one ", picture(130, 190, 2), "?"],
    ]
    return [vision.prompt_with(CASES[name].family, made.checkpoint, processor, each) for each in parts]


@pytest.mark.parametrize("impl", ["auto", "transformers"])
@pytest.mark.parametrize("name", of_each(list(CASES)))
def test_logits_are_those_of_transformers(name: str, impl: str, model_of: Callable[[str], Made]) -> None:
    made = model_of(name)
    model, processor, _ = opened(made.files, impl)
    assert model.kind == ("native" if impl == "auto" else "generic")
    prompts = prompts_of(made, name, processor)
    own = prompts_of(made, name, vision.processor_of(made.checkpoint))
    assert [each.ids for each in prompts] == [each.ids for each in own]
    reference = vision.open_reference(made.checkpoint)
    found, _ = run(model, [(prompt, ANSWER) for prompt in prompts], [7, 5, 1000])
    for logits, prompt in zip(found, own, strict=True):
        wanted = vision.reference(made.checkpoint, prompt, ANSWER, reference)
        assert distance(logits, wanted) < 1e-4


@pytest.mark.models
@pytest.mark.parametrize("name", ["lfm2_vl"])
def test_large_images_are_cut_into_tiles(name: str, model_of: Callable[[str], Made]) -> None:
    made, family = model_of(name), CASES[name].family
    model, processor, _ = opened(made.files)
    parts: list[Part] = ["what is ", picture(*LARGE), " this?"]
    prompt = vision.prompt_with(family, made.checkpoint, processor, parts)
    own = vision.prompt_with(family, made.checkpoint, vision.processor_of(made.checkpoint), parts)
    assert prompt.ids == own.ids
    (found,), _ = run(model, [(prompt, ANSWER)], [1000])
    assert distance(found, vision.reference(made.checkpoint, own, ANSWER)) < 1e-4


@pytest.mark.models
def test_vocabularies_of_the_first_llavas_have_no_token_for_images(
    model_of: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.models.gguf_vision.llava._IMAGE", "<none>")
    made = model_of("llava")
    model, processor, _ = opened(made.files)
    assert processor.placeholder == "<unk>"
    prompt = prompts_of(made, "llava", processor)[0]
    own = prompts_of(made, "llava", vision.processor_of(made.checkpoint))[0]
    assert prompt.ids != own.ids and len(prompt.ids) == len(own.ids)
    (found,), _ = run(model, [(prompt, ANSWER)], [1000])
    assert distance(found, vision.reference(made.checkpoint, own, ANSWER)) < 1e-4


@pytest.mark.models
def test_a_llama_is_no_llava_for_a_file_that_only_lies_beside_it(
    model_of: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgi_asgi.models.gguf_vision.llava._IMAGE", "<none>")
    made = model_of("llava")
    assert made.files.projector is not None
    text, other = tmp_path / "llava-7b-F32.gguf", tmp_path / "mmproj-7b-F32.gguf"
    alike = tmp_path / "llava-7b-mmproj-F32.gguf"
    text.symlink_to(made.files.path)
    files = replace(made.files, path=text, is_projector_named=False)
    for path, accepts_images in ((other, False), (alike, True)):
        path.symlink_to(made.files.projector)
        with OpenModel(replace(files, projector=path), model_impl="auto") as found:
            assert (found.read_image_processor() is not None) == accepts_images


@pytest.mark.parametrize("name", of_each(["gemma3", "qwen2_vl"]))
def test_old_files_have_names_swapped(name: str, model_of: Callable[[str], Made], tmp_path: Path) -> None:
    made = model_of(name)
    assert made.files.projector is not None
    with GgufFile.open(made.files.projector) as file:
        names = [each for each in file.tensors if ".ffn_" in each]
        kept = {each: file.raw(each).view(np.float32).reshape(file.tensors[each].shape) for each in names}
        other = {
            each: each.replace("_up", "_x").replace("_down", "_up").replace("_x", "_down") for each in names
        }
        tensors = {other[each]: array.copy() for each, array in kept.items()}
    metadata = {"clip.vision.feed_forward_length": 0}
    old = changed(made.files.projector, tmp_path / "mmproj.gguf", metadata, tensors)
    model, processor, _ = opened(replace(made.files, projector=old))
    wanted, _, _ = opened(made.files)
    (image,) = prompts_of(made, name, processor)[2].images
    rows = [tower_of(each).encode(image.payload).rows for each in (model, wanted)]
    assert rows[0].equal(rows[1])


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        ("qwen2_5_vl", "q8_0"),
        pytest.param("qwen2_5_vl", "bf16", marks=pytest.mark.models),
        pytest.param("smolvlm", "f16", marks=pytest.mark.models),
        pytest.param("mistral3", "q8_0", marks=pytest.mark.models),
    ],
)
def test_files_with_codes_are_close(name: str, projector: str, tmp_path: Path) -> None:
    made = gguf_vision.make(name, tmp_path, ("q8_0", projector))
    model, processor, _ = opened(made.files)
    prompts = prompts_of(made, name, processor)
    found, _ = run(model, [(prompt, ANSWER) for prompt in prompts], [1000] * 3)
    reference = vision.open_reference(made.checkpoint)
    for logits, prompt in zip(found, prompts, strict=True):
        wanted = vision.reference(made.checkpoint, prompt, ANSWER, reference)
        assert 1e-6 < float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)) < 0.1


@pytest.mark.models
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_codes_in_another_order_give_what_their_values_give(name: str, tmp_path: Path) -> None:
    made = gguf_vision.make(name, tmp_path, ("q8_0", "f32"))
    model, processor, _ = opened(made.files)
    decoded = shutil.copytree(made.checkpoint, tmp_path / "decoded")
    path = decoded / "model.safetensors"
    with OpenModel(made.files, model_impl="transformers") as files:
        tensors = {
            key: values_of(files.weights, key, tensor)
            for key, tensor in safetensors.torch.load_file(path).items()
        }
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    prompts = prompts_of(made, name, processor)
    found, _ = run(model, [(prompt, ANSWER) for prompt in prompts], [7, 5, 1000])
    reference = vision.open_reference(decoded)
    for logits, prompt in zip(found, prompts, strict=True):
        assert distance(logits, vision.reference(decoded, prompt, ANSWER, reference)) < 1e-4


def values_of(weights: Weights, name: str, wanted: torch.Tensor) -> torch.Tensor:
    """Return the values of a weight of the files, which are near those of the checkpoint."""
    source = weights.get(name, tuple(wanted.shape))
    values = ops.decode(replace(source, order=None))
    if source.order is not None:
        values = values[:, np.argsort(source.order)]  # `in_order` rounds to float16
    found = torch.from_numpy(values).reshape(wanted.shape).contiguous()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    return found


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(name, marks=pytest.mark.models) for name in MORE_CLIENTS)]
)
async def test_a_client_gets_what_transformers_would_answer(
    name: str, model_of: Callable[[str], Made], tmp_path: Path
) -> None:
    made, family = model_of(name), CASES[name].family
    assert made.files.projector is not None
    shutil.copy(made.files.path, tmp_path / "m-F32.gguf")
    shutil.copy(made.files.projector, tmp_path / "mmproj-m-F32.gguf")
    turns: list[list[Part]] = [["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"], ["no"]]
    processor, reference = vision.processor_of(made.checkpoint), vision.open_reference(made.checkpoint)
    wanted = []
    for turn in turns:
        parts: list[Part] = ["user: ", *turn, "\nassistant: "]
        prompt, answer = vision.prompt_with(family, made.checkpoint, processor, parts), list[int]()
        for _ in range(6):
            logits = vision.reference(made.checkpoint, prompt, answer, reference)
            answer.append(int(logits[-1].argmax()))
        wanted.append(vision.text_of(made.checkpoint, answer))
    async with chatting(tmp_path) as (ask, app):
        found = [await ask(turn) for turn in turns]
        assert app.context.served is not None
        assert app.context.served.accepts_images
    assert [each.choices[0].message.content for each in found] == wanted


@pytest.mark.parametrize("name", of_each(("gemma3", "lfm2_vl", "qwen3_5", "llava")))
def test_formats_are_foretold(name: str, model_of: Callable[[str], Made], tmp_path: Path) -> None:
    """The memory that weights need is counted before they are read, by their formats."""
    made = model_of(name)
    assert made.files.projector is not None
    with GgufFile.open(made.files.projector) as file:
        patches = {  # which some towers compute, and all may have in float16
            each: file.raw(each).view(np.float32).reshape(info.shape).astype(np.float16)
            for each, info in file.tensors.items()
            if "patch_embd.weight" in each and info.type == "F32"
        }
    projector = changed(made.files.projector, tmp_path / "mmproj.gguf", {}, patches)
    with OpenModel(replace(made.files, projector=projector), model_impl="transformers") as opened:
        weights = opened.weights
        assert isinstance(weights, GgufVisionWeights)
        foretold = {name: format for name, (format, _) in weights.stored().items()}
        assert foretold == {each: weights.get(each, weights.shape(each)).format for each in weights.names()}
