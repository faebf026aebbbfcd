"""A checkpoint's image processor from `transformers`, and the text that represents an image in prompts.

Only the image half of a processor's class is used: preparing images, and expanding placeholders. torchvision
is not needed if the image processor has a Pillow version.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.errors import InvalidRequest, ModelLoadError
from tgi_asgi.formats.files import read_optional_json
from tgi_asgi.models.generic.vision.bicubic import CohereImages, Gemma4UnifiedImages
from tgi_asgi.models.generic.vision.llama4_images import Llama4Images
from tgi_asgi.models.generic.vision.strips import check_strip
from tgi_asgi.models.generic.vision.without_torchvision import Lfm2Images, PixtralImages
from tgi_asgi.types import Image, ProcessedImage

logger = logging.getLogger(__name__)

_OWN = {"PixtralProcessor": PixtralImages}
# By the first letters of the class that the files name.
_OWN_IMAGES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "Cohere2Vision": CohereImages,
    "Gemma4Unified": Gemma4UnifiedImages,
    "Lfm2Vl": Lfm2Images,
    "Llama4": Llama4Images,
}
_FILES = ("preprocessor_config.json", "processor_config.json")
_TOGETHER = frozenset({"LlavaOnevisionProcessor"})  # prepare an image differently if it is one of several
_WITH_FENCES = frozenset({"Idefics2Processor"})  # write a token around an image that two may share
_WITH_TENSORS = frozenset({"Ovis2Processor"})  # read an image's grid as a tensor
# Read how a video is cut when they are created, from settings that their image processors have as well.
_READ_VIDEO_SETTINGS = frozenset({"MiniCPMOcrProcessor", "MiniCPMV4_6Processor", "MiniCPMV4_7Processor"})


class VisionProcessor:
    """A `types.ImageProcessor`.

    Args:
        processor: Processor of `transformers`.
        token_id: Id of the placeholder tokens that an image's rows replace.
        input_names: Names of the inputs that the model's tower accepts.
        needs_gap: Whether the model would take two images without a token between them for one.
        is_seen_by_all: Whether every token of a prompt sees its images; see `ImageInput`.

    Attributes:
        encoded_bytes: Bytes of an encoded image, if a request keeps it until it ends.
        chat_text: See `types.ImageProcessor`.
        is_gguf: Whether it stands for a GGUF model's, whose projector `--mmproj none` leaves out.
    """

    def __init__(
        self, processor: Any, token_id: int, input_names: frozenset[str], *, needs_gap: bool = False,
        is_seen_by_all: bool = False,
    ) -> None:  # fmt: skip
        self._processor, self._token_id, self._input_names = processor, token_id, input_names
        self._needs_gap, self._is_seen_by_all = needs_gap, is_seen_by_all
        self._fence: str = processor.fake_image_token if _has(processor, _WITH_FENCES) else ""
        self.encoded_bytes, self.chat_text, self.is_gguf = 0, "", False
        self._token: str = processor.tokenizer.convert_ids_to_tokens(token_id)
        self._options, self.adds_special_tokens = _image_options(processor)
        self._is_together = _has(processor, _TOGETHER)

    @property
    def placeholder(self) -> str:
        """Text that chat templates write for an image; in Qianfan-OCR it differs from the image's tokens."""
        return str(getattr(self._processor, "image_placeholder_token", self._processor.image_token))

    def process(self, images: Sequence[Image]) -> list[ProcessedImage]:
        """Return the images of one prompt as inputs of the tower.

        Raises:
            InvalidRequest: if the processor rejects an image.
        """
        is_one_of_several = self._is_together and len(images) > 1
        found = [self._process(image, is_one_of_several) for image in images]
        if not _numbers_images(self._processor):
            return found
        texts = self._processor._prepend_local_ids(
            [self._token * len(found)], [each.text for each in found], self._token
        )
        return [dataclasses.replace(each, text=text) for each, text in zip(found, texts, strict=True)]

    def whole(self, image: Image, text: str) -> dict[str, Any]:
        """Return the output of the processor's class for a text with an image in place of `{}`.

        Used for the self-check. It raises if the class has no code for whole prompts.
        """
        prompt = text.replace("{}", self.placeholder)
        return dict(self._processor(images=[image.pixels], text=[prompt], return_tensors="pt"))

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text in which images are expanded, without special tokens around it."""
        return list(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _process(self, image: Image, is_one_of_several: bool) -> ProcessedImage:
        try:
            check_strip(
                self._processor.image_processor, *image.pixels.size, is_one_of_several=is_one_of_several
            )
            # Two copies tell the processor that there are several images. One per image of the prompt would
            # make the work and the memory grow with the square of their number.
            given = [image.pixels] * (2 if is_one_of_several else 1)
            found, texts = self._processor._process_images(
                [given] if self._is_together else given, **self._options
            )
            text = str(texts[0])
            num_tokens = text.count(self._token)
            if num_tokens == 0:  # LightOnOCR's processor refuses no strip
                raise ValueError("it is too small or too narrow")
        except (ValueError, ArithmeticError, LookupError) as error:  # too narrow a strip, no token left
            raise InvalidRequest(
                f"`{image.param}` is an image that the model does not take: {error}", param=image.param
            ) from error
        inputs = {name: _tensor(found[name]) for name in self._input_names if name in found}
        if is_one_of_several:
            inputs = {name: each[:1] for name, each in inputs.items()}
        num_bytes = self.encoded_bytes + sum(each.numel() * each.element_size() for each in inputs.values())
        return ProcessedImage(
            text, self._token_id, num_tokens, inputs, num_bytes, needs_gap=self._needs_gap,
            fence=self._fence, is_seen_by_all=self._is_seen_by_all,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class GivenProcessor:
    """What stands for a processor's files if the model has none: it is of a GGUF file.

    Attributes:
        images: Contents of a preprocessor_config.json, with the image processor's class.
        options: Contents of a processor_config.json.
        tokenizer: Makes the tokenizer of `transformers`, which knows the special tokens.
        chat_text: See `types.ImageProcessor`.
    """

    images: Mapping[str, Any]
    options: Mapping[str, Any]
    tokenizer: Callable[[], Any]
    chat_text: str


def load_processor(
    source: Path | GivenProcessor,
    config: Mapping[str, Any],
    token_id: int,
    input_names: frozenset[str],
    *,
    needs_gap: bool = False,
    is_seen_by_all: bool = False,
) -> VisionProcessor | None:
    """Return the processor of a checkpoint's directory; None, with a warning in the log, if it has none.

    Raises:
        ModelLoadError: if it needs a library that is not installed, or its files are damaged.
    """
    if isinstance(source, Path) and not any((source / name).exists() for name in _FILES):
        logger.warning("the model accepts images, but its files have no preprocessor_config.json: text only")
        return None
    try:
        made = VisionProcessor(
            _build(source, config), token_id, input_names, needs_gap=needs_gap,
            is_seen_by_all=is_seen_by_all,
        )  # fmt: skip
        if isinstance(source, GivenProcessor):
            made.chat_text, made.is_gguf = source.chat_text or made.placeholder, True
        return made
    except Exception as error:  # a file can make a `transformers` class raise anything
        reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        raise ModelLoadError(f"the model's image processor cannot be created: {reason}") from error


def _build(source: Path | GivenProcessor, config: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    options = _read_options(source) if isinstance(source, Path) else {**source.images, **source.options}
    kind = _OWN.get(_class_name(options, config)) or _image_half(_processor_class(options, config))
    parameters = inspect.signature(kind.__init__).parameters
    given: dict[str, Any] = {
        name: None for name in ("video_processor", "feature_extractor") if name in parameters
    }
    given |= {name: options[name] for name in parameters if name in options and name not in given}
    if isinstance(source, Path):
        given["image_processor"] = load_image_processor(source, options)
        given["tokenizer"] = AutoTokenizer.from_pretrained(source)
    else:
        given["image_processor"] = _image_processor(source.images)
        given["tokenizer"] = source.tokenizer()
    if any(each.__name__ in _READ_VIDEO_SETTINGS for each in kind.__mro__):
        given["video_processor"] = given["image_processor"]
    return kind(**given)


def _read_options(directory: Path) -> dict[str, Any]:
    """Return the contents of a processor's files."""
    options: dict[str, Any] = {}
    for name in _FILES:
        options.update(read_optional_json(directory / name))
    if options.get("processor_class") is None:
        options["processor_class"] = read_optional_json(directory / "tokenizer_config.json").get(
            "processor_class"
        )
    return options


def _image_processor(options: Mapping[str, Any]) -> Any:
    """Return the image processor of these options, in its Pillow version."""
    import transformers

    own = _own_images(options)
    if own is not None:
        return own
    kind = getattr(transformers, f"{options['image_processor_type']}Pil")
    return kind.from_dict(dict(options))


def load_image_processor(directory: Path, options: Mapping[str, Any]) -> Any:
    """Return the image processor, in its Pillow version, which gives the same result on any machine."""
    from transformers import AutoImageProcessor

    nested = options.get("image_processor")  # for a processor_config.json that has everything in one file
    options = nested if isinstance(nested, dict) else options
    own = _own_images(options)
    return AutoImageProcessor.from_pretrained(directory, backend="pil") if own is None else own


def _own_images(options: Mapping[str, Any]) -> Any:
    """Return this server's image processor of these options; None if `transformers` has one for Pillow."""
    name = str(options.get("image_processor_type", ""))
    return next((own(options) for start, own in _OWN_IMAGES.items() if name.startswith(start)), None)


def _processor_class(options: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    name = _class_name(options, config)
    owners = [key for key, value in _known_classes().items() if value == name]
    for owner in dict.fromkeys([str(config.get("model_type")), *owners]):
        module = model_type_to_module_name(owner)
        try:
            found = importlib.import_module(f"transformers.models.{module}.processing_{module}")
        except ModuleNotFoundError:
            continue
        if hasattr(found, name):
            return getattr(found, name)
    raise ValueError(f"transformers has no {name}, or needs torchvision for it")


def _known_classes() -> dict[str, str]:
    """Return the class names of processors by model type."""
    from transformers.models.auto import processing_auto

    found: Any = processing_auto
    return dict(found.PROCESSOR_MAPPING_NAMES)


def _class_name(options: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the class that the files name, or else that of the model's type, as `AutoProcessor` does.

    The two differ for Pixtral-12B: a LLaVA whose images have Pixtral's tokens.
    """
    known, named = _known_classes(), options.get("processor_class")
    name = named if named in known.values() else known.get(str(config.get("model_type")))
    if name is None:
        raise ValueError(f"no processor is known for {config.get('model_type')}")
    return str(name)


def _image_half(kind: Any) -> Any:
    """Return a subclass of a processor's class that can be created without its video and audio parts."""
    written_in: Any = inspect.getmodule(kind)
    if getattr(written_in, "num2words", "") is None:
        written_in.num2words = str  # it spells out numbers of video frames
    more = {"check_argument_for_proper_class": _accept, **_TEXTS.get(kind.__name__, {})}
    return type(f"{kind.__name__}ForImages", (kind,), more)


def _accept(self: Any, name: str, value: Any) -> None:
    return None


def _idefics2_text(self: Any, image_inputs: Any, image_idx: int, **_: Any) -> str:
    """Return an image's text, which Idefics 2's processor writes within its code for whole prompts."""
    one = f"{self.fake_image_token}{self.image_token * self.image_seq_len}{self.fake_image_token}"
    return one * (5 if self.image_processor.do_image_splitting else 1)


_TEXTS = {"Idefics2Processor": {"replace_image_token": _idefics2_text}}


def _has(processor: Any, names: frozenset[str]) -> bool:
    """Return whether a processor is of a class of these names."""
    return any(kind.__name__ in names for kind in type(processor).__mro__)


def _numbers_images(processor: Any) -> bool:
    """Return whether a processor writes each image's number in its prompt before it (MiniCPM-V)."""
    if not hasattr(processor, "_prepend_local_ids"):
        return False
    asked = processor.use_image_id
    return bool(processor.default_use_image_id if asked is None else asked)


def _image_options(processor: Any) -> tuple[dict[str, Any], bool]:
    """Return the image options of the processor's class, and whether its tokenizer adds special tokens."""
    merge = processor._merge_kwargs
    kinds = inspect.signature(merge).parameters.get("ModelProcessorKwargs")
    # transformers 5.19 must be passed what later versions read from the processor.
    given = [processor.valid_processor_kwargs] if kinds is not None and kinds.default is kinds.empty else []
    merged = merge(*given, tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
    options: dict[str, Any] = dict(merged["images_kwargs"])
    texts = merged.get("text_kwargs", {})  # LFM2-VL has one of its options there, in 5.19
    options |= {name: texts[name] for name in ("use_image_special_tokens",) if name in texts}
    named = inspect.signature(processor._process_images).parameters
    options |= {name: merged[name] for name in named if name in merged}
    options.pop("return_tensors", None)
    if _has(processor, _WITH_TENSORS):
        options["return_tensors"] = "pt"
    return options, bool(texts.get("add_special_tokens", True))


def _tensor(value: Any) -> Tensor:
    """Return a tensor from an array, or from a list of one array per image."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (np.ndarray, Tensor)):
        return torch.stack([torch.as_tensor(each) for each in value])
    return torch.as_tensor(np.asarray(value))
