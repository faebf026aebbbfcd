"""The text decoder inside a vision model, and the particulars of its image handling.

Everything is read from the model, except masks that it creates outside its decoder: those are listed by
class.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.caller import decoders_of
from tgi_asgi.models.generic.zeros import arguments


class Lookahead(enum.Enum):
    """Which tokens of a prompt see later tokens."""

    NOTHING = "nothing"
    IMAGES = "images"  # tokens of an image see each other
    IMAGES_IN_WINDOWS = "images in windows"  # the same, only in layers that have a window
    PROMPT = "prompt"  # all tokens of the prompt


# Classes that do not treat an image as rows in place of its placeholder tokens.
_UNSUPPORTED = {
    "Blip2ForConditionalGeneration": "puts an image before the beginning of the text",
    "InstructBlipForConditionalGeneration": "lets its image encoder read the text",
    "Kosmos2ForConditionalGeneration": "marks an image's tokens by a mask instead of an id",
    "Kosmos2_5ForConditionalGeneration": "marks an image's tokens by a mask instead of an id",
    "Molmo2ForConditionalGeneration": "lets the tokens of all images of a prompt see each other",
}
_LOOKAHEAD = {
    "Gemma3ForConditionalGeneration": Lookahead.IMAGES,
    "PaliGemmaForConditionalGeneration": Lookahead.PROMPT,
}
# Where the configuration asks for it: unlike Gemma 4, this class applies it to layers without a window, too.
_VISION_LOOKAHEAD = {"Gemma4UnifiedForConditionalGeneration": Lookahead.IMAGES}
# Layers' inputs for an image's tokens are those of their own id.
_READS_IMAGE_IDS = frozenset({"Gemma3nForConditionalGeneration"})
# Of images, as the functions call them that compute positions.
SIZES = ("image_grid_thw", "target_sizes")
_TOKEN_NAMES = ("image_token_id", "image_token_index")  # of the placeholder, in configurations
_FIRST_POSITION = {"PaliGemmaForConditionalGeneration": 1}


@dataclass(frozen=True, slots=True)
class VisionTraits:
    """Properties of a vision model that text models lack.

    Attributes:
        image_token_id: Id of the placeholder tokens that an image's rows replace.
        lookahead: Which tokens see later tokens.
        num_axes: Number of axes of positions: 1, 3, or 4 in Hunyuan-VL.
        has_layer_inputs: Whether layers receive an extra input for each token id.
        pad_token_id: Id that replaces placeholder tokens where ids are read.
        first_position: Position of a sequence's first token.
        mark_ids: Ids of tokens around images that the class replaces by rows in prompts with images only.
        routed_ids: Ids of tokens in prompts that have experts of their own: of images, and around them.
        deep_layers: The decoder's layers before which an image's deep rows are added; empty: after the first.
        has_cross_attention: Whether layers of cross-attention read images, and no rows replace their tokens.
    """

    image_token_id: int
    lookahead: Lookahead = Lookahead.NOTHING
    num_axes: int = 1
    has_layer_inputs: bool = False
    pad_token_id: int = 0
    first_position: int = 0
    mark_ids: tuple[int, ...] = ()
    routed_ids: tuple[int, ...] = ()
    deep_layers: tuple[int, ...] = ()
    has_cross_attention: bool = False

    @property
    def is_rows_alone(self) -> bool:
        """Whether images are rows in place of tokens, and no mask or layer of the decoder knows of them."""
        return self.lookahead is Lookahead.NOTHING and not self.has_cross_attention

    @property
    def has_axes(self) -> bool:
        """Whether positions have several axes."""
        return self.num_axes > 1

    def remove_images(self, ids: npt.NDArray[np.int64]) -> None:
        """Replace tokens of and around images by padding."""
        ids[np.isin(ids, (self.image_token_id, *self.mark_ids, *self.routed_ids))] = self.pad_token_id


class TextView(nn.Module):
    """A vision model's text decoder, callable with ids like a text model; used by discovery."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = decoder_of(model)
        self.config = self.decoder.config

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        """Run the decoder."""
        given = {"position_ids": position_ids, "use_cache": use_cache}
        if takes_layer_inputs(self.decoder):
            given["per_layer_inputs"] = layer_inputs(self.decoder, input_ids)
        embeds = self.decoder.get_input_embeddings()(input_ids)
        return self.decoder(**arguments(self.decoder, inputs_embeds=embeds, **given))

    @property
    def base_model(self) -> Any:
        """The decoder."""
        return self.decoder

    def get_decoder(self) -> Any:
        """Return the decoder."""
        return self.decoder

    def _can_set_attn_implementation(self) -> bool:
        return bool(self.decoder._can_set_attn_implementation())


def decoder_of(model: Any) -> Any:
    """Return a vision model's text decoder without its head, which Llama 4's has inside."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    has_head = any(module is head for module in decoder.modules())
    return decoders_of(decoder)[0] if has_head else decoder


def complete_outputs(model: Any) -> None:
    """Add what Llama 4's class of transformers 5.24 reads of its decoder's output but does not find there."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model.language_model.register_forward_hook(_complete)


def _complete(module: Any, given: Any, output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def vision_traits(model: Any) -> VisionTraits | None:
    """Return a model's `VisionTraits`; None if it is text only.

    Raises:
        ModelLoadError: if its image handling is not supported.
    """
    config = model.config
    inner = getattr(model, "model", model)
    if getattr(config, "vision_config", None) is None or not hasattr(inner, "get_image_features"):
        return None
    name = type(model).__name__
    if name in _UNSUPPORTED:
        raise ModelLoadError(f"{name} cannot be served: it {_UNSUPPORTED[name]}")
    text = config.get_text_config()
    token = next((getattr(config, key, None) for key in _TOKEN_NAMES if getattr(config, key, None)), None)
    if token is None:
        raise ModelLoadError(f"{name} has no image placeholder token")
    positions_of = getattr(inner, "get_rope_index", None)
    if positions_of is not None and not {*inspect.signature(positions_of).parameters} & {*SIZES}:
        raise ModelLoadError(f"{name} cannot be served: it computes the positions of images in its own way")
    decoder = decoder_of(model)
    lookahead = _LOOKAHEAD.get(name, Lookahead.NOTHING)
    if getattr(text, "use_bidirectional_attention", None) == "vision":
        lookahead = _VISION_LOOKAHEAD.get(name, Lookahead.IMAGES_IN_WINDOWS)
    padding = int(token) if name in _READS_IMAGE_IDS else max(getattr(text, "pad_token_id", None) or 0, 0)
    return VisionTraits(
        image_token_id=int(token),
        lookahead=lookahead,
        num_axes=1 if positions_of is None else _num_axes(text),
        has_layer_inputs=takes_layer_inputs(decoder),
        pad_token_id=padding,
        first_position=_FIRST_POSITION.get(name, 0),
        mark_ids=tuple(getattr(config, "visual_indicator_token_ids", None) or ()),
        routed_ids=_routed_ids(config, int(token), decoder),
        deep_layers=_deep_layers(config),
        has_cross_attention=bool(getattr(text, "cross_attention_layers", None)),
    )


def _deep_layers(config: Any) -> tuple[int, ...]:
    """Return the layers that Granite 4 Vision adds an image's rows before, in the order of its features."""
    pairs = getattr(config, "deepstack_layer_map", None)
    return () if pairs is None else (*(layer for _, layer in pairs), *config.spatial_target_layers)


def _routed_ids(config: Any, image_token_id: int, decoder: Any) -> tuple[int, ...]:
    """Return the ids that Ernie 4.5-VL's processor marks for other experts."""
    if "moe_mm_token_type_ids" not in inspect.signature(type(decoder).forward).parameters:
        return ()
    return image_token_id, config.image_start_token_id, config.image_end_token_id


def _num_axes(text: Any) -> int:
    sections = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
    return max(len(sections or ()), 3)


def takes_layer_inputs(decoder: Any) -> bool:
    """Return whether a decoder's layers receive an extra input for each token id (Gemma 4)."""
    return bool(getattr(decoder.config, "hidden_size_per_layer_input", 0)) and hasattr(
        decoder, "get_per_layer_inputs"
    )


def layer_inputs(decoder: Any, ids: Tensor) -> Tensor:
    """Return the extra inputs of a decoder's layers for ids; Gemma 4's function also takes embeddings."""
    others = len(inspect.signature(decoder.get_per_layer_inputs).parameters) - 1
    found: Tensor = decoder.get_per_layer_inputs(ids, *[None] * others)
    return found


def has_token_rows(model: Any) -> bool:
    """Return whether some ids have other rows than the decoder's embedding; see `token_rows`."""
    return type(model).__name__ in _TOKEN_ROWS


def token_rows(model: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return ids whose rows are not those of the decoder's embedding, and the rows [n, hidden]; None: no id.

    These are tokens around images, such as the end of one. They have these rows in any prompt, so that what
    is cached of a prompt's beginning does not depend on the images that follow. Needs weights, on `device`.
    """
    make = _TOKEN_ROWS.get(type(model).__name__)
    if make is None:
        return None
    with device:  # for the ids that the embeddings read
        return make(model.model)


def _rows_of_gemma3n(inner: Any) -> tuple[Tensor, Tensor]:
    ids, rows = [], []
    for part in (inner.embed_vision, inner.embed_audio):
        ids.append(torch.arange(part.vocab_offset, part.vocab_offset + part.vocab_size))
        rows.append(part(input_ids=ids[-1]))
    return torch.cat(ids), torch.cat(rows)


def _rows_of_ovis2(inner: Any) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(inner.visual_indicator_token_ids)
    last = inner.visual_vocab_size
    return ids, inner.visual_embeddings_table(torch.arange(last - len(ids), last))


_TOKEN_ROWS: Mapping[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "Gemma3nForConditionalGeneration": _rows_of_gemma3n,
    "Ovis2ForConditionalGeneration": _rows_of_ovis2,
}


def takes_token_ids(decoder: Any) -> bool:
    """Return whether a decoder reads the ids of tokens beside their rows, even those of images (Qwen 4)."""
    return "ple_input_ids" in inspect.signature(type(decoder).forward).parameters


class DecoderOutput:
    """A decoder's output for code that expects more attributes than it has: the others are None.

    Args:
        rows: The states after the last norm.
        output: The output that has them, if the caller reads more of it, such as a cache.
    """

    def __init__(self, rows: Tensor, output: Any = None) -> None:
        self.last_hidden_state, self._output = rows, output

    def __getitem__(self, index: int) -> Tensor:
        if index != 0:
            raise IndexError(index)
        return self.last_hidden_state

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._output, name, None)
