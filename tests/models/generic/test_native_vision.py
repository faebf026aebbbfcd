"""Vision models whose text a native family computes: loading, and steps with and without Python.

test_vision.py compares their logits with those of transformers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.models.generic.test_vision import ANSWER, check_logits, of_each, prompts_of
from tests.support import vision_models as vision
from tests.support.vision_chats import Part, chatting
from tests.support.vision_models import picture
from tests.support.vision_runs import load, load_native, program_of
from tests.support.vision_table import FAMILIES
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.vision import tower
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.memory import packed_bytes

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.mark.parametrize("name", of_each(["llava", "qwen2_vl", "gemma4"]))
def test_a_native_text_and_its_tower_take_the_memory_of_the_module(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """What a module takes is compared with what it holds in test_forecast.py."""
    folder, found = folder_of(name), []
    for impl in ("auto", "transformers"):
        with OpenModel(ModelFiles(name, None, "directory", folder), model_impl=impl) as opened:
            sizes = opened.config.vocabulary_sizes
            found.append(packed_bytes(opened.packed_tensors(), ops.Packing(is_exact=True), sizes))
    assert found[0] == pytest.approx(found[1], rel=0.03)


def changed(name: str, tmp_path: Path, text: dict[str, Any]) -> Path:
    """Write the checkpoint of a family with other values in its text's configuration."""
    family = FAMILIES[name]
    config = {**family.config, "text_config": {**family.config["text_config"], **text}}
    vision.make_family(name, dataclasses.replace(family, config=config), tmp_path)
    return tmp_path


def test_tensors_that_the_class_ignores_are_ignored(tmp_path: Path) -> None:
    """Files of Gemma 4 have the keys and values of layers that read another's."""
    kinds = ["sliding_attention", "full_attention"] * 2
    folder = changed("gemma4", tmp_path, {"num_kv_shared_layers": 2, "layer_types": kinds})
    prompts = prompts_of("gemma4", folder)
    wanted = [vision.reference(folder, prompt, ANSWER) for prompt in prompts]
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    first = next(each for each in tensors if each.endswith("layers.0.self_attn.k_proj.weight"))
    for layer, name in ((2, "k_proj"), (3, "k_norm")):
        added = first.replace("layers.0", f"layers.{layer}").replace("k_proj", name)
        tensors[added] = torch.zeros(32, 64)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    native = load_native(folder)
    assert native is not None
    check_logits(native, prompts, wanted)
    with OpenModel(ModelFiles("gemma4", None, "directory", folder), model_impl="native") as opened:
        opened.load(ops.Packing(is_exact=True), 64)


@pytest.mark.parametrize("open_model", [load, load_native], ids=["module", "native"])
def test_a_padding_id_that_is_none_is_no_id(open_model: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = changed("llava", tmp_path, {"pad_token_id": -1})
    prompts = prompts_of("llava", folder)
    check_logits(open_model(folder), prompts, [vision.reference(folder, each, ANSWER) for each in prompts])


async def test_an_encoding_that_nobody_waits_for_is_released(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps without Python know nothing of it."""
    stacked = tower._stacked

    def slowly(parts: list[Any]) -> Any:
        time.sleep(0.05)
        return stacked(parts)

    async with chatting(folder_of("llava"), target_inter_token_ms=1.0) as (ask, app):
        encodings = program_of(app).encodings
        stream = aiter(await ask(["tell"], max_tokens=1500, stream=True, extra_body={"ignore_eos": True}))
        await anext(stream)
        monkeypatch.setattr(tower, "_stacked", slowly)
        asked = asyncio.ensure_future(ask(["what is ", picture(50, 30, 7)]))
        while not encodings.is_encoding:
            await anext(stream)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        monkeypatch.setattr(tower, "_stacked", stacked)
        for _ in range(200):
            await anext(stream)
            if not encodings.is_encoding:
                break
        assert not encodings.is_encoding


def test_native_code_alone_reads_no_images(folder_of: Callable[[str], Path]) -> None:
    smolvlm, qwen = (ModelFiles(name, None, "directory", folder_of(name)) for name in ("smolvlm", "qwen3_5"))
    with pytest.raises(ModelLoadError, match="it needs transformers' code"):
        OpenModel(smolvlm, model_impl="native")
    with OpenModel(qwen, model_impl="native") as opened:
        assert opened.kind == "native" and opened.read_image_processor() is None


@pytest.mark.parametrize(
    "name",
    of_each(["qwen2_vl", "qwen3_vl", "gemma3", "gemma4", "gemma4_large", "qwen3_5", "lfm2_vl", "glm4v"]),
)
async def test_drafts_choices_and_lost_blocks_change_no_answer(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    """Steps with and without Python, and sequences that start again, place and turn the same tokens."""
    turns: list[list[Part]] = [
        ["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"],
        ["no picture here, is there"],
        ["one ", picture(130, 33, 2), "?"],
    ]
    given: dict[str, Any] = {"max_tokens": 96, "extra_body": {"ignore_eos": True}}
    async with chatting(folder_of(name), speculate=0) as (ask, app):
        assert app.context.served is not None and app.context.served.info.implementation == "native"
        wanted = [(await ask(turn, **given)).choices[0].message.content for turn in turns]
        longest = max([(await ask(turn, max_tokens=1)).usage.prompt_tokens for turn in turns]) + 96
    room = {"max_batch_total_tokens": -(-longest // 16) * 16 + 48, "max_total_tokens": longest + 1}
    async with chatting(folder_of(name), speculate=4, max_batch_prefill_tokens=80, **room) as (ask, app):
        asked = [ask(turn, n=2, **given) for turn in turns for _ in range(2)]
        found = await asyncio.gather(*asked)
        assert app.context.served is not None and app.context.served.stats is not None
        assert app.context.served.stats.preemptions > 0
    answers = [[choice.message.content for choice in each.choices] for each in found]
    assert answers == [[answer] * 2 for answer in wanted for _ in range(2)]
