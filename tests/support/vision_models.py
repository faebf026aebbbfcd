"""Tiny random checkpoints of vision models with their processors, and their reference outputs.

    make("llava", folder)
    prompt = prompt_of("llava", folder, ["what?", picture, "and", other])
    reference(folder, prompt)                 # logits of transformers' own model, all at once

`vision_table` holds the particulars of each family.
"""

from __future__ import annotations

import copy
import inspect
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
import transformers
from torch import nn

from tests.support.architectures import one_thread
from tests.support.vision_family import VOCAB_SIZE, Family
from tests.support.vision_table import FAMILIES
from tgi_asgi.models.generic.vision.cross_attention import CrossFeatures
from tgi_asgi.models.generic.vision.processor import VisionProcessor, load_processor
from tgi_asgi.models.generic.vision.text import complete_outputs, decoder_of
from tgi_asgi.text.images import expand_placeholders, join_fences, locate_images
from tgi_asgi.types import Image, ImageInput, ImageProcessor

_BASIC = ("<s>", "</s>", "<pad>", "<unk>")
_CONFIG_NAMES = {
    "boi_token": "boi_token_index",
    "eoi_token": "eoi_token_index",
    "audio_token": "audio_token_id",
    "image_start_token": "image_start_token_id",
    "image_end_token": "image_end_token_id",
}
_SPREAD = 3.0  # approximate standard deviation of the logits


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens and the positions of its images."""

    ids: list[int]
    images: tuple[ImageInput, ...]
    pictures: tuple[PIL.Image.Image, ...]


def require_processor(name: str) -> None:
    """Skip the test if the installed `transformers` cannot make the family's processor."""
    if name.startswith("gemma4"):
        reason = "in this version of transformers Gemma 4's processor needs torchvision"
        pytest.importorskip(
            "transformers.models.gemma4.processing_gemma4", reason=reason, exc_type=ImportError
        )


def picture(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Return a picture of smooth random colours."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


def make(name: str, folder: Path) -> None:
    """Write a checkpoint of a family; the same family always yields the same checkpoint."""
    make_family(name, FAMILIES[name], folder)


@one_thread()
def make_family(name: str, family: Family, folder: Path) -> None:
    """Write a checkpoint of a family that the table may not have; its name seeds the weights."""
    torch.manual_seed(zlib.crc32(name.encode()))
    texts = _save_tokenizer(family, folder)
    kind = getattr(transformers, family.architecture)
    save_random(kind(_config(family, kind, texts)), folder)
    preprocessor = {"image_processor_type": family.image_processor, **family.preprocessor}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if family.processor:
        (folder / "processor_config.json").write_text(json.dumps(dict(family.processor)))


@torch.no_grad()
def save_random(model: Any, folder: Path) -> None:
    """Give a model weights that reveal faults, and write it."""
    complete_outputs(model)
    _randomise(model.eval())
    _spread(model)
    model.save_pretrained(folder)


def _tokens(family: Family) -> list[str]:
    """Return the special tokens in the order of their ids."""
    return list(dict.fromkeys([*_BASIC, *family.tokens.values(), *family.others]))


def _image_token(family: Family) -> str:
    return family.image_token or family.tokens[family.placeholder]


def _config(family: Family, kind: Any, tokens: list[str]) -> Any:
    values = copy.deepcopy(dict(family.config))
    values[family.image_key] = tokens.index(_image_token(family))
    if "video_token" in family.tokens:
        values[family.image_key.replace("image", "video")] = tokens.index(family.tokens["video_token"])
    for key in _CONFIG_NAMES:
        if key in family.tokens:
            values[_CONFIG_NAMES[key]] = tokens.index(family.tokens[key])
    made = kind.config_class(**values)
    made._attn_implementation = "eager"
    return made


def _save_tokenizer(family: Family, folder: Path) -> list[str]:
    """Write a tokenizer with a text for each id: special tokens, the 256 bytes, pairs of letters.

    Returns the texts.
    """
    letters = "etaoinsrhdlu"
    tokens, last = _tokens(family), []
    if family.has_image_last:
        last = [_image_token(family)]
        tokens.remove(last[0])
    texts = [*tokens, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    room = VOCAB_SIZE - len(texts) - len(last)
    pairs = [(first, second) for first in letters for second in letters][:room]
    texts += [*map("".join, pairs), *last]
    vocabulary = {text: index for index, text in enumerate(texts)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([*tokens, *last])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": dict(family.tokens),
        "chat_template": _template(family),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return texts


def _template(family: Family) -> str:
    image = family.before + family.tokens[family.placeholder] + family.after
    return (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'image' %}" + image + "{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def _randomise(model: Any) -> None:
    """Set every parameter to a value that affects the logits; tied embeddings are small."""
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    size, gain = (0.1, 1.5) if is_tied else (0.3, 1.2)
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for name, value in model.named_parameters():
        if id(value) in tables:
            value.normal_(0, size)
        elif name.endswith("_gate"):  # of cross-attention, and of what follows it
            value.fill_(1.0)
        elif name.endswith("dt_bias"):
            value.normal_(-1.0, 0.5)
        elif value.dim() < 2:
            if "A_log" not in name:
                value += torch.randn(value.shape) * 0.2
        else:
            is_stack = ".experts." in name  # [experts, columns, rows]
            columns = value.shape[1] if is_stack else value.numel() / value.shape[0]
            value.normal_(0, gain * columns**-0.5)


def _spread(model: Any) -> None:
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:
        decoder = decoder_of(model)
        head = decoder.norm.weight if hasattr(decoder, "norm") else head
    ids = torch.arange(60, 100)[None]
    for _ in range(12):
        std = model(input_ids=ids, use_cache=False).logits.std()
        if 0.8 < std / _SPREAD < 1.25:
            return
        head *= (_SPREAD / std).clamp(0.1, 10.0)


def processor_of(folder: Path) -> VisionProcessor:
    """Return this project's image processor for a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    token_id = config.get("image_token_id", config.get("image_token_index"))
    model = getattr(transformers, config["architectures"][0])
    inner = model.__init__.__globals__.get(_inner_name(model), model)  # Llama 4 has none
    features = getattr(inner, "get_image_features", CrossFeatures.__call__)
    names = frozenset(inspect.signature(features).parameters)
    is_seen_by_all = features is CrossFeatures.__call__
    made = load_processor(folder, config, token_id, names, is_seen_by_all=is_seen_by_all)
    assert made is not None
    return made


def _inner_name(model: Any) -> str:
    return str(model.__name__).replace("ForConditionalGeneration", "Model")


def prompt_of(name: str, folder: Path, parts: Sequence[str | PIL.Image.Image]) -> Prompt:
    """Return a prompt of texts and pictures, made by this project's image processor and text code."""
    return prompt_with(FAMILIES[name], folder, processor_of(folder), parts)


def prompt_with(
    family: Family, folder: Path, processor: ImageProcessor, parts: Sequence[str | PIL.Image.Image]
) -> Prompt:
    """Return a prompt of texts and pictures, made by an image processor."""
    pictures = tuple(part for part in parts if not isinstance(part, str))
    images = [Image(each, zlib.crc32(each.tobytes()).to_bytes(4, "big") * 8, "image") for each in pictures]
    processed = processor.process(images)
    image = family.before + processor.placeholder + family.after
    text = "".join(part if isinstance(part, str) else image for part in parts)
    text = expand_placeholders(text, processor.placeholder, [each.text for each in processed])
    text = join_fences(text, processed[0].fence if processed else "")
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    pairs = [(image.digest, each) for image, each in zip(images, processed, strict=True)]
    return Prompt(ids, locate_images(ids, pairs), pictures)


def open_reference(folder: Path) -> Any:
    """Return transformers' own model in float32 with eager attention; no weight may be missing."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), f"{folder} is not all of the model: {info}"
    complete_outputs(model)
    return model.eval()


@one_thread()
def reference(folder: Path, prompt: Prompt, answer: Sequence[int] = (), model: Any = None) -> np.ndarray:
    """Return the logits [n_tokens, vocab] float32 after each token of a prompt and an answer."""
    model = model or open_reference(folder)
    ids = torch.tensor([[*prompt.ids, *answer]])
    given = _inputs(folder, prompt, model, ids)
    with torch.inference_mode():
        found: np.ndarray = model(input_ids=ids, use_cache=False, **given).logits[0].float().numpy()
    return found


def _inputs(folder: Path, prompt: Prompt, model: Any, ids: torch.Tensor) -> Mapping[str, Any]:
    """Return the model's inputs other than ids; one call of its image processor handles all images."""
    made: dict[str, Any] = {}
    config = model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    kinds = (ids == token).long()
    name = type(model).__name__
    if name.startswith("PaliGemma"):  # 0 marks prompt tokens
        made["token_type_ids"] = (torch.arange(ids.shape[1]) >= len(prompt.ids)).long()[None]
    if not prompt.pictures:
        return made
    if name.startswith("Gemma3"):
        made["token_type_ids"] = kinds
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        made["mm_token_type_ids"] = kinds
    if "Omni" in name and not name.startswith("Cosmos"):  # without a mask, it ignores where images are
        made["attention_mask"] = torch.ones_like(ids)
    if name.startswith("Ernie"):
        around = [config.image_start_token_id, config.image_end_token_id]
        made["moe_mm_token_type_ids"] = torch.isin(ids, torch.tensor([token, *around])).long()
    processor = processor_of(folder)
    pictures: list[Any] = list(prompt.pictures)
    if any(each in name for each in ("Onevision", "Idefics", "SmolVLM")):
        pictures = [pictures]
    options = {**processor._options, "return_tensors": "pt"}
    found = processor._processor.image_processor(pictures, **options)
    known = ("pixel_values", "high_res_pixel_values", "pixel_attention_mask", "image_sizes",
             "image_grid_thw", "spatial_shapes", "image_position_ids", "batch_num_images", "target_sizes",
             "aspect_ratio_ids", "aspect_ratio_mask")  # fmt: skip
    made |= {key: found[key] for key in known if key in found}
    sized = ("Llava", "Mistral3", "Granite4", "MistralLarge4", "LightOn")
    if "image_sizes" in made and not any(each in name for each in sized):
        del made["image_sizes"]
    if name.startswith("Mllama"):
        made["cross_attention_mask"] = _cross_attention_mask(prompt, token, found["num_tiles"], ids.shape[1])
    return made


def _cross_attention_mask(
    prompt: Prompt, token: int, num_tiles: list[list[int]], length: int
) -> torch.Tensor:
    """Return Mllama's mask of a prompt, whose last row also holds for the answer."""
    from transformers.models.mllama import processing_mllama as own

    sparse = own.get_cross_attention_token_mask(prompt.ids, token)
    dense = own.convert_sparse_cross_attention_mask_to_dense([sparse], num_tiles, 4, len(prompt.ids))
    return torch.from_numpy(np.concatenate([dense, dense[:, -1:].repeat(length - dense.shape[1], 1)], 1))


def text_of(folder: Path, ids: Sequence[int]) -> str:
    """Return the text of tokens as a client receives it."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return str(backend.decode(list(ids)))
