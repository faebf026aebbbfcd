"""Strips that an image processor would make huge are a client's mistake; other images are never refused."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
import transformers
from torch import Tensor
from transformers.image_processing_backends import PilBackend

from tests.support import vision_models as vision
from tgi_asgi.errors import InvalidRequest
from tgi_asgi.models.generic.vision import strips, without_torchvision
from tgi_asgi.models.generic.vision.strips import check_strip
from tgi_asgi.models.generic.vision.without_torchvision import Lfm2Images
from tgi_asgi.types import Image

CLIP = {"size": {"shortest_edge": 336}, "crop_size": 336}  # LLaVA 1.5's
PADDED = {"size": {"height": 384, "width": 384}, "do_pad": True}


def processor_named(name: str, **options: object) -> PilBackend:
    made: PilBackend = getattr(transformers, f"{name}ImageProcessorPil")(**options)
    return made


@pytest.mark.parametrize(
    ("processor", "is_one_of_several", "size"),
    [
        (processor_named("CLIP", **CLIP), False, (1, 60_000)),
        (processor_named("CLIP", **CLIP), False, (60_000, 20)),
        (processor_named("Llava", **PADDED), False, (1, 60_000)),
        (processor_named("LlavaOnevision"), True, (60_000, 20)),
    ],
    ids=["clip", "clip-wide", "llava", "onevision"],
)
def test_a_strip_that_would_become_huge_is_refused(
    processor: PilBackend, is_one_of_several: bool, size: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="it is too long and narrow"):
        check_strip(processor, *size, is_one_of_several=is_one_of_several)


@pytest.mark.parametrize("size", [(1, 1), (8000, 4000), (11_000, 90), (300, 1)])
@pytest.mark.parametrize(
    ("processor", "is_one_of_several"),
    [
        (processor_named("CLIP", **CLIP), False),
        (processor_named("Llava", **PADDED), False),
        (processor_named("LlavaOnevision"), True),
    ],
    ids=["clip", "llava", "onevision"],
)
def test_other_images_are_not(processor: PilBackend, is_one_of_several: bool, size: tuple[int, int]) -> None:
    check_strip(processor, *size, is_one_of_several=is_one_of_several)


@pytest.mark.parametrize(
    "processor",
    [
        processor_named("LlavaNext"),
        processor_named("LlavaOnevision"),
        processor_named("CLIP", size={"height": 336, "width": 336}),
        processor_named("CLIP", **CLIP, do_resize=False),
        processor_named("Qwen2VL"),
        processor_named("Llava", **PADDED | {"do_pad": False}),
    ],
    ids=["next", "onevision", "fixed", "not-resized", "qwen2", "not-padded"],
)
def test_a_processor_that_makes_no_image_huge_takes_strips(processor: PilBackend) -> None:
    check_strip(processor, 1, 1_000_000, is_one_of_several=False)


@pytest.mark.parametrize(("name", "count"), [("llava", 1), ("llava_onevision", 2)])
def test_a_client_is_told_which_image_it_is(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "MAX_PIXELS", 1 << 16)
    vision.make(name, tmp_path)
    images = [Image(vision.picture(*size), b"d" * 32, "image_url") for size in ((30, 30), (9, 3000))]
    with pytest.raises(InvalidRequest, match=r"`image_url` is an image .* not take: it is too long"):
        vision.processor_of(tmp_path).process(images[-count:])


def test_lfm2_refuses_a_strip_before_it_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    resized = without_torchvision._resized

    def noted(pixels: Tensor, size: tuple[int, int]) -> Tensor:
        seen.append(size[0] * size[1])
        return resized(pixels, size)

    monkeypatch.setattr(without_torchvision, "_resized", noted)
    with pytest.raises(ValueError, match="it is too long and narrow"):
        Lfm2Images({})([PIL.Image.new("RGB", (1, 400_000))])
    assert max(seen) <= 10 * 512**2  # the tiles
