"""Image processors that transformers has only for torchvision: the same sizes; what files cannot ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.vision_models import picture
from tgi_asgi.models.generic.vision.bicubic import CohereImages, Gemma4UnifiedImages

SMALL = {"size": {"height": 56, "width": 56}, "max_patches": 4}


@pytest.mark.parametrize(
    ("options", "size", "num_tiles"),  # according to Cohere2VisionImageProcessor of transformers 5.24
    [({}, (50, 30), 1), ({}, (800, 600), 5), ({}, (33, 1200), 4), ({}, (3000, 200), 7), ({}, (512, 512), 1),
     (SMALL, (50, 30), 1), (SMALL, (60, 56), 3), (SMALL, (33, 1200), 5), (SMALL, (1, 1), 1)],
)  # fmt: skip
def test_cohere_s_images_are_cut_as_its_own_processor_does(
    options: dict[str, Any], size: tuple[int, int], num_tiles: int
) -> None:
    found = CohereImages(options)([picture(*size)])
    side = 56 if options else 512
    assert found["num_patches"] == [num_tiles]
    assert found["pixel_values"].shape == (num_tiles, 3, side, side)


def test_cohere_s_tiles_are_parts_of_the_image_and_the_last_is_all_of_it() -> None:
    found = CohereImages({**SMALL, "image_mean": [0.0] * 3, "image_std": [1.0] * 3})([picture(112, 56)])
    first, second, whole = found["pixel_values"]
    side_by_side = torch.cat([first, second], dim=-1)
    smaller = torch.nn.functional.avg_pool2d(side_by_side[None], (1, 2))[0]
    assert float((smaller - whole).abs().mean()) < 0.02
    assert float((first - second).abs().mean()) > 0.05


@pytest.mark.parametrize(
    ("options", "size", "num_tokens"),  # according to Gemma4UnifiedImageProcessor of transformers 5.24
    [({}, (50, 30), 252), ({}, (800, 600), 266), ({}, (33, 1200), 200), ({}, (3000, 200), 256),
     ({}, (1, 1), 256), ({}, (2000, 3), 280), ({"max_soft_tokens": 70}, (33, 1200), 50)],
)  # fmt: skip
def test_gemma_s_images_are_cut_as_its_own_processor_does(
    options: dict[str, Any], size: tuple[int, int], num_tokens: int
) -> None:
    most = options.get("max_soft_tokens", 280)
    found = Gemma4UnifiedImages(options)([[picture(*size)]])
    assert found["num_soft_tokens_per_image"] == [num_tokens]
    assert found["pixel_values"].shape == (1, most, 48 * 48 * 3)
    places = found["image_position_ids"][0]
    assert (places[num_tokens:] == -1).all()
    columns, rows = (places[num_tokens - 1] + 1).tolist()
    assert columns * rows == num_tokens
    assert places[1].tolist() == ([1, 0] if columns > 1 else [0, 1])


@pytest.mark.parametrize("kind", [CohereImages, Gemma4UnifiedImages])
@pytest.mark.parametrize("change", [{"do_rescale": False}, {"resample": 2}, {"do_resize": False}])
def test_what_files_cannot_ask_for_is_refused(kind: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be"):
        kind(change)


def test_tiles_are_squares() -> None:
    with pytest.raises(ValueError, match="size must be a square"):
        CohereImages({"size": {"height": 28, "width": 56}})
