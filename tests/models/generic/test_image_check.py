"""Vision classes that no test compares with `transformers`: checked with an image, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import vision_models as vision
from tests.support.gguf_vision import CASES
from tests.support.vision_table import FAMILIES
from tgi_asgi import ops
from tgi_asgi.errors import InvalidRequest, ModelLoadError
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.models.generic.guards import check_servable
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.open import OpenGeneric
from tgi_asgi.models.generic.vision import check
from tgi_asgi.models.generic.vision.processor import (
    VisionProcessor,
    _processor_class,
    load_image_processor,
)
from tgi_asgi.models.generic.vision.text import vision_traits
from tgi_asgi.models.generic.vision.without_torchvision import Lfm2Images
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.types import Image

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.fixture(autouse=True)
def threads() -> None:
    ops.configure_threads(1, nice=0, pin=False)


def load(name: str, folder: Path) -> GenericModel:
    """Load a new checkpoint of a family as a server does, with its processor first."""
    vision.make(name, folder)
    config = json.loads((folder / "config.json").read_text())
    opened = OpenGeneric(folder, config, trusts_code=False)
    opened.image_processor(folder)
    weights = SafetensorsWeights(folder, Quantisation.from_json(config))
    model = opened.load(weights, ops.Packing(is_exact=True, quantise=None), 2048)
    assert isinstance(model, GenericModel)
    return model


def test_classes_that_are_not_checked_are_those_that_tests_hold() -> None:
    checked = {"Gemma4UnifiedForConditionalGeneration"}  # it may have images that are longer than its window
    held = {family.architecture for family in FAMILIES.values()}
    held |= {case.family.architecture for case in CASES.values()}
    assert held - checked == check.TESTED_CLASSES


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "gemma4_unified", "ovis2"])
def test_a_class_that_is_not_held_is_served_where_its_rows_are_all_there_is_of_an_image(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    differs = check._difference

    def noted(model: GenericModel, processor: VisionProcessor) -> float:
        seen.append(differs(model, processor))
        return seen[-1]

    monkeypatch.setattr(check, "_difference", noted)
    monkeypatch.setattr(check, "TESTED_CLASSES", frozenset())
    load(name, tmp_path)
    assert 0 < seen[0] < 1e-4


def test_a_class_that_does_more_with_an_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llava.modeling_llava import LlavaModel

    forward = LlavaModel.forward

    def more(self: Any, input_ids: Any, pixel_values: Any = None, **given: Any) -> Any:
        found = forward(self, input_ids, pixel_values, **given)
        if pixel_values is not None:
            found.last_hidden_state[:, -3:] *= 0.5
        return found

    monkeypatch.setattr(LlavaModel, "forward", more)
    monkeypatch.setattr(check, "TESTED_CLASSES", frozenset())
    with pytest.raises(ModelLoadError, match="fails its image self-check against its own code"):
        load("llava", tmp_path)


def test_a_processor_that_does_not_mark_tokens_unasked_does_not_refuse_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of Cosmos 3, whose class computes no positions of images without the marks."""
    whole = VisionProcessor.whole

    def unmarked(self: VisionProcessor, image: Image, text: str) -> dict[str, Any]:
        return {name: each for name, each in whole(self, image, text).items() if name != "mm_token_type_ids"}

    monkeypatch.setattr(VisionProcessor, "whole", unmarked)
    monkeypatch.setattr(check, "TESTED_CLASSES", frozenset())
    load("qwen3_vl", tmp_path)


def test_a_class_whose_processor_writes_more_than_the_tokens_of_an_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MiniCPM-V's writes the image's number."""
    whole = VisionProcessor.whole
    monkeypatch.setattr(
        VisionProcessor, "whole", lambda self, image, text: whole(self, image, text.replace("{}", "1{}"))
    )
    monkeypatch.setattr(check, "TESTED_CLASSES", frozenset())
    with pytest.raises(ModelLoadError, match="writes other tokens for an image than the server computes"):
        load("llava", tmp_path)


def test_a_processor_that_fails_refuses_the_model_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(*_: Any) -> None:
        raise NotImplementedError

    vision.make("llava", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    opened = OpenGeneric(tmp_path, config, trusts_code=False)
    monkeypatch.setattr(VisionProcessor, "process", process)
    monkeypatch.setattr(check, "TESTED_CLASSES", frozenset())
    reason = r"LlavaForConditionalGeneration cannot process images here \(NotImplementedError\)"
    with pytest.raises(ModelLoadError, match=reason):
        opened.image_processor(tmp_path)


@pytest.mark.parametrize("error", [IndexError("list index out of range"), ZeroDivisionError("by zero")])
def test_an_image_that_a_processor_stumbles_over_is_a_client_s_mistake(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: Any, **__: Any) -> None:
        raise error

    vision.make("llava", tmp_path)
    processor = vision.processor_of(tmp_path)
    monkeypatch.setattr(processor._processor, "_process_images", stumble)
    with pytest.raises(InvalidRequest, match="`image_url` is an image that the model does not take"):
        processor.process([Image(vision.picture(1, 1), b"d" * 32, "image_url")])


def test_an_image_without_tokens_is_a_client_s_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LightOnOCR's processor makes them of strips that are narrower than two patches."""
    vision.make("llava", tmp_path)
    processor = vision.processor_of(tmp_path)
    process = processor._processor._process_images

    def without_tokens(*given: Any, **options: Any) -> Any:
        found, _ = process(*given, **options)
        return found, [""]

    monkeypatch.setattr(processor._processor, "_process_images", without_tokens)
    with pytest.raises(InvalidRequest, match="does not take: it is too small or too narrow"):
        processor.process([Image(vision.picture(1, 1), b"d" * 32, "image_url")])


def model_named(name: str, **inner: Any) -> Any:
    config = SimpleNamespace(vision_config={}, image_token_id=7, get_text_config=lambda: SimpleNamespace())
    model = SimpleNamespace(get_image_features=None, **inner)
    return type(name, (), {"config": config, "model": model, "get_image_features": None})()


@pytest.mark.parametrize(
    ("stem", "reason"),
    [
        ("Blip2", "before the beginning of the text"),
        ("InstructBlip", "read the text"),
        ("Kosmos2", "by a mask"),
        ("Kosmos2_5", "by a mask"),
        ("Molmo2", "see each other"),
    ],
)
def test_classes_that_read_images_otherwise_are_refused_by_name(stem: str, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"{stem}ForConditionalGeneration cannot be served.*{reason}"):
        vision_traits(model_named(f"{stem}ForConditionalGeneration"))


def test_positions_that_are_asked_for_in_another_way_are_refused_by_name() -> None:
    model = model_named("OtherForConditionalGeneration", get_rope_index=lambda input_ids, audio_seqlens: None)
    with pytest.raises(ModelLoadError, match=r"OtherForConditionalGeneration .* positions of images"):
        vision_traits(model)


def test_a_decoder_with_its_own_head_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match=r"NemotronH_Omni.* its own head next to the tower"):
        check_servable(model_named("NemotronH_Omni_Reasoning_V3"))


def test_another_cross_attention_than_mllama_s_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match=r"IdeficsForVisionText2Text .* only Mllama's is supported"):
        check_servable(model_named("IdeficsForVisionText2Text"))


def test_a_window_that_prompts_are_outside_of_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match=r"UnlimitedOcr.* see all of the prompt"):
        check_servable(model_named("UnlimitedOcrForConditionalGeneration"))


def test_a_processor_is_found_whose_module_is_not_named_like_the_type() -> None:
    assert _processor_class({}, {"model_type": "inkling_mm_model"}).__name__ == "InklingProcessor"


def test_lfm2_s_image_processor_is_found_in_a_file_that_has_all_of_the_processor(tmp_path: Path) -> None:
    options = {"image_processor": {"image_processor_type": "Lfm2VlImageProcessor", "tile_size": 28}}
    (tmp_path / "processor_config.json").write_text(json.dumps(options))
    found = load_image_processor(tmp_path, options)
    assert isinstance(found, Lfm2Images)
    assert found.tile_size == 28
