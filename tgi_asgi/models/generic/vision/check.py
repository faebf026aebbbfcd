"""Self-check of a vision model with an image: its own forward, against steps with the tower's rows.

It runs for classes that no test compares with the logits of `transformers`. The text-only self-check cannot
detect what such a class does with an image other than replacing its placeholder tokens by rows: experts for
images only, tokens that see later tokens, other tokens that are replaced as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.check import LARGEST, relative_difference, whole_logits
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.steps import BLOCK, flat_rows, make_pool
from tgi_asgi.models.generic.vision.processor import VisionProcessor
from tgi_asgi.models.generic.vision.program import SequentialVisionProgram, VisionProgram
from tgi_asgi.text.images import locate_images
from tgi_asgi.types import Image

# Classes that tests compare with `transformers` (tests/support/vision_table.py, gguf_vision.py).
TESTED_CLASSES = frozenset(
    f"{stem}ForConditionalGeneration"
    for stem in (
        "AyaVision", "Cohere2Vision", "CohereCompass", "Cosmos3Omni", "DeepseekVL", "DeepseekVLHybrid",
        "Dots3Note", "Ernie4_5_VLMoe", "Gemma3", "Gemma4", "Glm46V", "Glm4v", "Glm5Next", "GlmOcr",
        "Granite4Vision", "HYV4VL", "HunYuanVL", "Idefics2", "Idefics3", "InternVL", "Lfm2Vl", "LightOnOcr",
        "Llama4", "Llava", "LlavaNext", "LlavaOnevision", "MiniCPMV4_6", "MiniCPMV4_7", "Mistral3",
        "MistralLarge4", "Mllama", "Ovis2", "PaddleOCRVL", "PaliGemma", "QianfanOCR", "Qwen2VL",
        "Qwen2_5OmniThinker", "Qwen2_5_VL", "Qwen3OmniMoeThinker", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5",
        "Qwen3_5Moe", "Qwen4Exp", "SmolVLM",
    )
)  # fmt: skip
_SIZE = (48, 32)
_WITHOUT_FILES = "Remove preprocessor_config.json and processor_config.json to serve it for text only"
_WITHOUT_PROJECTOR = "Add --mmproj none to serve it for text only"


def is_tested(architecture: str) -> bool:
    """Return whether tests compare the logits of this class with those of `transformers`."""
    return architecture in TESTED_CLASSES


def check_processor(processor: VisionProcessor, architecture: str) -> None:
    """Prepare an image, for a class that no test covers; needs no weights.

    Raises:
        ModelLoadError: if it cannot be prepared, with the reason.
    """
    if is_tested(architecture):
        return
    try:
        processor.process([_picture()])
    except Exception as error:  # code for another kind of processor may raise anything
        raise _refused(architecture, processor, error) from error


def check_images(model: GenericModel, processor: VisionProcessor) -> None:
    """Compare the logits of a prompt with an image, for a class that no test covers.

    Raises:
        ModelLoadError: if they differ, or the class handles images in another way.
    """
    name = model.config.architecture
    if is_tested(name):
        return
    try:
        worst = _difference(model, processor)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's code may raise anything
        raise _refused(name, processor, error) from error
    if not worst <= LARGEST:
        raise ModelLoadError(
            f"{name} fails its image self-check against its own code: logits differ by {worst:.2g} of "
            f"the largest; {LARGEST} is allowed. {_advice(processor)}"
        )


def _advice(processor: VisionProcessor) -> str:
    return _WITHOUT_PROJECTOR if processor.is_gguf else _WITHOUT_FILES


def _refused(architecture: str, processor: VisionProcessor, error: Exception) -> ModelLoadError:
    reason = f"{type(error).__name__}: {str(error).strip()[:300]}".removesuffix(": ")
    return ModelLoadError(f"{architecture} cannot process images here ({reason}). {_advice(processor)}")


def _picture() -> Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*_SIZE[::-1], 3), dtype=np.uint8)
    return Image(PIL.Image.fromarray(pixels), bytes(32), "image")


def _difference(model: GenericModel, processor: VisionProcessor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    image = _picture()
    (processed,) = processor.process([image])
    given = processor.whole(image, "a {} b")
    ids = given["input_ids"][0].tolist()
    # Without special tokens at either end: those of a prompt are the template's affair, or the tokenizer's.
    wanted = processor.tokenize(f"a {processed.text} b")
    if ids.count(processed.token_id) != processed.num_tokens or not _contains(ids, wanted):
        raise ValueError("its processor writes other tokens for an image than the server computes")
    if model.config.vision is not None and model.config.vision.has_axes:
        # Cosmos 3's processor writes them only if it is asked to.
        given.setdefault("mm_token_type_ids", (given["input_ids"] == processed.token_id).int())
    device = model.backend.device
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()
    }
    with model.replaced.mode.exactly():
        expected = whole_logits(model, **moved)
        found = _steps(model, ids, locate_images(ids, [(image.digest, processed)]))
    return relative_difference(found, expected, expected)


def _contains(ids: list[int], wanted: list[int]) -> bool:
    """Return whether these tokens stand side by side in a prompt."""
    length = len(wanted)
    return any(ids[first : first + length] == wanted for first in range(len(ids) - length + 1))


def _steps(model: GenericModel, ids: list[int], images: Any) -> torch.Tensor:
    """Return the logits of a prompt from two steps: all tokens but the last, then the last, as in decode."""
    width = -(-len(ids) // BLOCK)
    pool = make_pool(model, width)
    program = model.program([] if pool is None else pool.layers, len(ids))
    assert isinstance(program, VisionProgram | SequentialVisionProgram)
    program.start(0, ids[:-1], images)
    parts = []
    for first, stop in ((0, len(ids) - 1), (len(ids) - 1, len(ids))):
        batch = flat_rows([(0, np.array(ids[first:stop]), first)], width)
        parts.append(torch.from_numpy(program.run(batch, range(stop - first)).copy()))
    return torch.cat(parts)
