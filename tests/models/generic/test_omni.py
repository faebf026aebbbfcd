"""Qwen-Omni: checkpoints with a part that writes and parts that speak, of which only the first is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import vision_models as vision
from tests.support.vision_chats import Part, chatting, greedy, url_of
from tests.support.vision_runs import served
from tgi_asgi.models.generic.vision.sequence_images import PromptImage, _axes_by_marks

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.mark.parametrize(
    ("name", "kind", "architecture"),
    [
        ("qwen2_5_omni", "qwen2_5_omni", "Qwen2_5OmniModel"),
        ("qwen3_omni", "qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration"),
    ],
)
async def test_a_published_checkpoint_answers_as_the_part_that_writes(
    name: str, kind: str, architecture: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of(name), tmp_path / "published")
    parts: list[Part] = ["what is ", vision.picture(50, 30), " and ", vision.picture(40, 70, 1), " this?"]
    wanted = greedy(name, folder, parts, 6)
    config = json.loads((folder / "config.json").read_text())
    whole = {"architectures": [architecture], "model_type": kind, "thinker_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    weights = {f"thinker.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    weights["talker.codec_head.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors")
    async with chatting(folder) as (ask, _):
        found = await ask(parts)
    assert found.choices[0].message.content == wanted


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"])
async def test_prompts_need_no_marks_around_images(name: str, folder_of: Callable[[str], Path]) -> None:
    """The model's own function of positions raises, or takes an image for text, where they are missing."""
    folder = folder_of(name)
    config, tokenizer = (
        json.loads((folder / file).read_text()) for file in ("config.json", "tokenizer.json")
    )
    texts = {int(token_id): text for text, token_id in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        texts[token["id"]] = token["content"]
    begin, sound = (texts.get(config.get(f"{each}_start_token_id")) for each in ("vision", "audio"))
    image = f"![]({url_of(vision.picture(50, 30))})"
    prompts = [
        f"a {begin}{image}{begin}{image}", f"{image} b {begin}{image} c", f"{image} {image} {image}",
        *([f"a {sound} b {image}"] if sound else []),
    ]  # fmt: skip
    async with served(folder) as (url, _), httpx.AsyncClient(base_url=url, timeout=60) as http:
        for prompt in prompts:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 3}}
            answer = await http.post("/generate", json=body)
            assert answer.status_code == 200, (prompt[:40], answer.text)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"])
def test_marked_images_get_the_positions_of_the_model_s_own_function(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder_of(name))
    config, grid = model.config, torch.tensor([[1, 4, 6], [1, 2, 4]])
    start, image = config.vision_start_token_id, config.image_token_id
    sizes = [int(each.prod()) // model.config.vision_config.spatial_merge_size**2 for each in grid]
    ids = [80, start, *[image] * sizes[0], 81, 82, start, *[image] * sizes[1], 83, 83]
    expected, delta = model.model.get_rope_index(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), image_grid_thw=grid
    )
    places = np.flatnonzero(np.array(ids) == image)
    seen: list[Any] = [PromptImage(cast(Any, None), each) for each in np.split(places, [sizes[0]])]
    found, found_delta = _axes_by_marks(model, np.array(ids), seen, {"image_grid_thw": grid})
    assert torch.equal(found.float(), expected[:, 0].float()) and found_delta == int(delta)
