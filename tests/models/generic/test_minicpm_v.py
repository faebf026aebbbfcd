"""MiniCPM-V: its processor writes an image's number in the prompt before the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.support import vision_models as vision
from tgi_asgi.types import Image

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own code


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_7"])
@pytest.mark.parametrize(("asked", "usual"), [(None, True), (None, False), (False, True), (True, False)])
def test_prompts_are_those_of_its_own_processor(
    name: str, asked: bool | None, usual: bool, tmp_path: Path
) -> None:
    vision.make(name, tmp_path)
    own: Any = vision.processor_of(tmp_path)._processor
    own.use_image_id, own.default_use_image_id = asked, usual
    pictures = [vision.picture(50, 30), vision.picture(150, 90, 1), vision.picture(40, 70, 2)]
    text = "a {} b {}{} c"
    (wanted,) = own(images=pictures, text=[text.replace("{}", own.image_token)])["input_ids"]

    processor = vision.processor_of(tmp_path)
    processor._processor.use_image_id, processor._processor.default_use_image_id = asked, usual
    found = processor.process([Image(each, bytes(32), "image") for each in pictures])
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = backend.encode(text.format(*(each.text for each in found))).ids
    assert ids == list(wanted)
    assert ("<image_id>2</image_id>" in found[2].text) == (usual if asked is None else asked)
