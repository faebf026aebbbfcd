"""Mllama, whose decoder reads images through cross-attention: what each token sees, and what is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.support import vision_models as vision
from tests.support.vision_models import Prompt, picture
from tests.support.vision_runs import load, run
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.vision import cross_attention

TOLERANCE = 1e-5  # of the largest logit
ANSWER = list(range(120, 126))
# Sizes for one, two, three, four in a row, and four in a square of tiles of 28 x 28.
SIZES = ((20, 20), (50, 25), (28, 84), (112, 28), (56, 50))
NAME = "mllama"
Part = str | PIL.Image.Image

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.fixture(scope="module", autouse=True)
def threads() -> None:
    ops.configure_threads(1, nice=0, pin=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(NAME)
    vision.make(NAME, made)
    return made


def prompts_of(folder: Path) -> list[Prompt]:
    """Return prompts with images of each number of tiles, in any place, and one without images."""
    one, two, three, row, square = (picture(*size, seed) for seed, size in enumerate(SIZES))
    parts: list[list[Part]] = [
        ["user: what is ", one, " and ", row, two, " this?"],
        ["no picture here, is there"],
        [three, square, one, "x", two, "which one is the largest of them?"],
        ["this is the longest of all beginnings before an image ", square],
        ["a", two],
    ]
    return [vision.prompt_of(NAME, folder, each) for each in parts]


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("chunks", [[1000] * 5, [7, 5, 3, 16, 2], [1, 1000, 2, 1, 1]], ids=str)
def test_each_token_sees_what_it_sees_in_transformers(chunks: list[int], folder: Path) -> None:
    prompts = prompts_of(folder)
    reference = vision.open_reference(folder)
    wanted = [vision.reference(folder, prompt, ANSWER, reference) for prompt in prompts]
    assert [[_num_tiles(image) for image in prompt.images] for prompt in prompts] == [
        [1, 4, 2], [], [3, 4, 1, 2], [4], [2],
    ]  # fmt: skip
    found, program = run(load(folder), [(prompt, ANSWER) for prompt in prompts], chunks)
    for logits, expected in zip(found, wanted, strict=True):
        worst = difference(logits, expected)
        print(f"largest difference {worst:.2g}")
        assert worst < TOLERANCE
    assert program.encodings.num_encoded == 5


def _num_tiles(image: Any) -> int:
    return int(image.payload["aspect_ratio_mask"].sum())


def test_layers_of_cross_attention_in_another_class_are_refused() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(cross_attention_layers=[1]))
    model = type("OtherForConditionalGeneration", (), {"config": config})()
    with pytest.raises(ModelLoadError, match="OtherForConditionalGeneration has layers of cross-attention"):
        cross_attention.adapt(model)
