"""GGUF models with a projector beside them: logits and prompts are those of the same model as safetensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.models.generic.test_vision import ANSWER, distance
from tests.support import gguf_vision
from tests.support import vision_models as vision
from tests.support.gguf_vision import CASES, Made
from tests.support.vision_chats import Part
from tests.support.vision_models import Prompt, picture
from tests.support.vision_runs import run
from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import ImageProcessor

FEW = ("smolvlm", "gemma3", "qwen2_5_vl", "mistral3")

pytestmark = [pytest.mark.demo, pytest.mark.filterwarnings("ignore")]  # the converter is fetched


def of_each(names: Sequence[str]) -> list[Any]:
    """Return these cases as parameters, with those outside `FEW` marked `models`."""
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.models) for name in names]


@pytest.fixture(scope="module", autouse=True)
def threads() -> None:
    ops.configure_threads(1, nice=0, pin=False)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return a function that makes each case once."""
    made: dict[str, Made] = {}

    def model(name: str) -> Made:
        if name not in made:
            made[name] = gguf_vision.make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return model


def opened(files: ModelFiles) -> tuple[GenericModel, ImageProcessor, Tokenizer]:
    with OpenModel(files, model_impl="auto") as found:
        processor = found.read_image_processor()
        tokenizer, _ = found.read_text()
        model = found.load(ops.Packing(is_exact=True), 2048)
        assert found.weights.unread() == []
    assert isinstance(model, GenericModel)
    assert processor is not None
    return model, processor, tokenizer


def prompts_of(made: Made, name: str, processor: ImageProcessor) -> list[Prompt]:
    parts: list[list[Part]] = [
        ["what is ", picture(50, 30), " and ", picture(40, 70, 1), " this?"],
        ["no picture here, is there"],
        ["one ", picture(130, 190, 2), "?"],
    ]
    return [vision.prompt_with(CASES[name].family, made.checkpoint, processor, each) for each in parts]


@pytest.mark.parametrize("name", of_each(list(CASES)))
def test_logits_are_those_of_transformers(name: str, model_of: Callable[[str], Made]) -> None:
    made = model_of(name)
    model, processor, _ = opened(made.files)
    prompts = prompts_of(made, name, processor)
    own = prompts_of(made, name, vision.processor_of(made.checkpoint))
    assert [each.ids for each in prompts] == [each.ids for each in own]
    reference = vision.open_reference(made.checkpoint)
    found, _ = run(model, [(prompt, ANSWER) for prompt in prompts], [7, 5, 1000])
    for logits, prompt in zip(found, own, strict=True):
        wanted = vision.reference(made.checkpoint, prompt, ANSWER, reference)
        assert distance(logits, wanted) < 1e-4
