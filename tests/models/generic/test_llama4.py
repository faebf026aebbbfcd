"""Llama 4: its images are cut and written as by its own processor, and only chosen experts are computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tokenizers
import torch

from tests.support import vision_models as vision
from tests.support.call_count import CallCount
from tests.support.vision_models import picture
from tests.support.vision_runs import load, run
from tgi_asgi import ops
from tgi_asgi.models.generic.vision.llama4_images import Llama4Images
from tgi_asgi.types import Image

SMALL = {"size": {"height": 28, "width": 28}, "max_patches": 4}
LARGE = {"resize_to_max_canvas": True}

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.mark.parametrize(
    ("options", "size", "grid", "fitted"),  # according to Llama4ImageProcessor of transformers 5.24
    [({}, (50, 30), (1, 1), (201, 336)), ({}, (800, 600), (2, 3), (600, 800)),
     ({}, (33, 1200), (4, 1), (1200, 33)), ({}, (3000, 200), (1, 9), (200, 3000)),
     ({}, (336, 336), (1, 1), (336, 336)), ({}, (337, 336), (1, 2), (336, 337)),
     ({}, (1, 1), (1, 1), (336, 336)), ({}, (2000, 3), (1, 6), (3, 2000)),
     (SMALL, (50, 30), (2, 2), (30, 50)), (SMALL, (33, 1200), (4, 1), (112, 3)),
     (SMALL, (337, 336), (2, 2), (55, 56)), (SMALL, (2000, 3), (1, 4), (1, 112)),
     # 1680, but for float32
     (LARGE, (50, 30), (3, 5), (1008, 1679)), (LARGE, (33, 1200), (16, 1), (5376, 147)),
     (LARGE, (337, 336), (4, 4), (1340, 1344))],
)  # fmt: skip
def test_images_are_cut_as_its_own_processor_does(
    options: dict[str, Any], size: tuple[int, int], grid: tuple[int, int], fitted: tuple[int, int]
) -> None:
    found = Llama4Images(options)([PIL.Image.new("RGB", size, "white")])
    assert found["aspect_ratios"].tolist() == [list(grid)]
    rows, columns = grid
    tiles, side = found["pixel_values"], 28 if options is SMALL else 336
    count = rows * columns
    assert tiles.shape == (count + (count > 1), 3, side, side)
    cut = tiles[:count].reshape(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4)
    white = cut.reshape(3, rows * side, columns * side)[0] > 0
    assert (int(white.any(dim=1).sum()), int(white.any(dim=0).sum())) == fitted
    assert white[: fitted[0], : fitted[1]].all()
    assert count == 1 or (tiles[-1] > 0).all()  # all of the image, without padding


def test_colours_are_those_of_its_own_processor() -> None:
    options = {**SMALL, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    tiles = Llama4Images(options)([picture(50, 30)])["pixel_values"]
    wanted = {  # at a pixel of some tiles, according to Llama4ImageProcessor of transformers 5.24
        0: [1.1015625, 0.5078125, 0.671875], 1: [3.0, 1.1171875, -0.375],
        2: [0.6328125, -0.13671875, -0.029296875], 4: [1.7109375, 1.1328125, 0.5546875],
    }  # fmt: skip
    found = tiles[list(wanted), :, 1, 9]
    assert torch.allclose(found, torch.tensor(list(wanted.values())), atol=0.03)  # one of 255, and bfloat16
    assert torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize(
    "change",
    [
        {"do_rescale": False}, {"do_normalize": False}, {"resample": 3}, {"do_resize": False}, {"size": None},
        {"size": {"height": 28, "width": 56}}, {"size": {"height": 0, "width": 0}}, {"max_patches": 0},
        {"max_patches": 100_000}, {"max_patches": 4.0}, {"image_mean": None},
        {"image_std": [0.5, "0.5", 0.5]},
    ],
    ids=str,
)  # fmt: skip
def test_what_files_cannot_ask_for_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        Llama4Images(change)


def test_prompts_are_those_of_its_own_processor(tmp_path: Path) -> None:
    vision.make("llama4", tmp_path)
    own: Any = vision.processor_of(tmp_path)._processor
    pictures = [picture(20, 28), picture(150, 20, 1), picture(50, 30, 2)]
    text = "a {} b {}{} c"
    (wanted,) = own(images=pictures, text=[text.replace("{}", own.image_token)])["input_ids"]
    found = vision.processor_of(tmp_path).process([Image(each, bytes(32), "image") for each in pictures])
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode(text.format(*(each.text for each in found))).ids == list(wanted)
    assert [each.text.count("<|tile_x_separator|>") for each in found] == [0, 3, 2]
    assert [each.text.count("<|tile_y_separator|>") for each in found] == [0, 1, 2]


def test_without_processor_files_it_takes_text_alone(tmp_path: Path) -> None:
    ops.configure_threads(1, nice=0, pin=False)
    vision.make("llama4", tmp_path)
    prompt = vision.prompt_of(
        "llama4", tmp_path, ["no picture, but more tokens than one chunk of attention has"]
    )
    wanted = vision.reference(tmp_path, prompt, [120, 121])
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink()
    chunk = json.loads((tmp_path / "config.json").read_text())["text_config"]["attention_chunk_size"]
    assert len(prompt.ids) > chunk
    (found,), _ = run(load(tmp_path), [(prompt, [120, 121])], [7])
    assert abs(found - wanted).max() < 1e-3 * abs(wanted).max()


def test_a_tower_s_layers_encode_one_tile_at_a_time(tmp_path: Path, computed_pieces: CallCount) -> None:
    ops.configure_threads(1, nice=0, pin=False)
    vision.make("llama4", tmp_path)
    tower = load(tmp_path).tower
    assert tower is not None
    counts = []
    for size in ((20, 28), (50, 30)):  # one tile, five tiles
        before = computed_pieces.num
        tower.encode(vision.prompt_of("llama4", tmp_path, [picture(*size)]).images[0].payload)
        counts.append(computed_pieces.num - before)
    assert counts[1] > 3 * counts[0]


@pytest.mark.parametrize("quantised", [None, "Q8_0"])
def test_experts_are_packed_like_other_products(quantised: str | None, tmp_path: Path) -> None:
    """Its own code would keep them in float32, and multiply every token by all of them."""
    ops.configure_threads(1, nice=0, pin=False)
    vision.make("llama4", tmp_path)
    model = load(tmp_path, quantised)
    layers = [each for each in model.module.modules() if type(each).__name__ == "Llama4TextExperts"]
    text = model.module.config.text_config
    elements = 3 * text.num_local_experts * text.hidden_size * text.intermediate_size
    bytes_each = 4 if quantised is None else 34 / 32
    assert [each.tgi_experts.nbytes for each in layers] == [pytest.approx(elements * bytes_each, rel=0.1)] * 2
    assert not any(True for each in layers for _ in each.parameters())
