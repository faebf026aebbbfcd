"""Qwen-Omni: checkpoints with a part that writes and parts that speak, of which only the first is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import vision_models as vision
from tests.support.vision_chats import Part, chatting, greedy
from tgi_asgi import ops

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.mark.parametrize(
    ("name", "kind", "architecture"),
    [
        ("qwen2_5_omni", "qwen2_5_omni", "Qwen2_5OmniModel"),
        ("qwen3_omni", "qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration"),
    ],
)
async def test_a_published_checkpoint_answers_as_the_part_that_writes(
    name: str, kind: str, architecture: str, tmp_path: Path
) -> None:
    ops.configure_threads(1, nice=0, pin=False)
    vision.make(name, tmp_path)
    parts: list[Part] = ["what is ", vision.picture(50, 30), " and ", vision.picture(40, 70, 1), " this?"]
    wanted = greedy(name, tmp_path, parts, 6)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": [architecture], "model_type": kind, "thinker_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    weights = {f"thinker.{key}": value for key, value in load_file(tmp_path / "model.safetensors").items()}
    weights["talker.codec_head.weight"] = torch.ones(2, 2)
    save_file(weights, tmp_path / "model.safetensors")
    async with chatting(tmp_path) as (ask, _):
        found = await ask(parts)
    assert found.choices[0].message.content == wanted
