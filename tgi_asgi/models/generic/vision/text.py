"""The text decoder inside a model with a vision tower, and what is particular about how it sees.

Everything is asked of the model, but for the masks that it makes outside its decoder: these are named.
"""

from __future__ import annotations

import enum
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.discover import arguments


class Ahead(enum.Enum):
    """Which tokens of a prompt see tokens behind them."""

    NOTHING = "nothing"
    IMAGES = "images"  # an image's see each other
    IMAGES_IN_WINDOWS = "images in windows"  # only in layers that have a window
    PROMPT = "prompt"  # all


# What reads an image otherwise than as rows in the places of its tokens.
_OTHERWISE = {
    "Ernie4_5_VLMoeForConditionalGeneration": "sends the tokens of images to experts of their own",
    "Llama4ForConditionalGeneration": "has its tower beside a decoder with a head, which is not read",
    "Molmo2ForConditionalGeneration": "lets the tokens of all images of a prompt see each other",
    "Ovis2ForConditionalGeneration": "replaces the tokens round an image's, too",
}
_AHEAD = {"Gemma3ForConditionalGeneration": Ahead.IMAGES, "PaliGemmaForConditionalGeneration": Ahead.PROMPT}
_FIRST_POSITION = {"PaliGemmaForConditionalGeneration": 1}


@dataclass(frozen=True, slots=True)
class Seeing:
    """What a model with a tower has beside a decoder.

    Attributes:
        image_token_id: of the tokens that an image's rows replace.
        ahead: which tokens see those behind them.
        has_axes: positions have several axes.
        has_layer_inputs: layers are given something of each token's id.
        pad_token_id: what stands for an image's tokens where their ids are read.
    """

    image_token_id: int
    ahead: Ahead = Ahead.NOTHING
    has_axes: bool = False
    has_layer_inputs: bool = False
    pad_token_id: int = 0
    first_position: int = 0


class TextView(nn.Module):
    """A model's text decoder, called with ids as a model of text alone is; discovery runs it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.get_decoder()
        self.config = self.decoder.config

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        """Run the decoder."""
        given = {"position_ids": position_ids, "use_cache": use_cache}
        if takes_layer_inputs(self.decoder):
            given["per_layer_inputs"] = self.decoder.get_per_layer_inputs(input_ids, None)
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


def find(model: Any) -> Seeing | None:
    """Return how a model sees; None if it is one of text alone.

    Raises:
        ModelLoadError: in a way that is not served.
    """
    config = model.config
    inner = getattr(model, "model", model)
    if getattr(config, "vision_config", None) is None or not hasattr(inner, "get_image_features"):
        return None
    name = type(model).__name__
    if name in _OTHERWISE:
        raise ModelLoadError(f"{name} cannot be served: it {_OTHERWISE[name]}")
    text = config.get_text_config()
    token = next((getattr(config, key, None) for key in _TOKEN_NAMES if getattr(config, key, None)), None)
    if token is None:
        raise ModelLoadError(f"{name} has no token that stands for an image")
    counts = getattr(inner, "get_rope_index", None)
    if counts is not None and "mm_token_type_ids" not in inspect.signature(counts).parameters:
        raise ModelLoadError(
            f"{name} cannot be served: it counts the positions of images in a way of its own"
        )
    decoder = model.get_decoder()
    ahead = _AHEAD.get(name, Ahead.NOTHING)
    if getattr(text, "use_bidirectional_attention", None) == "vision":
        ahead = Ahead.IMAGES_IN_WINDOWS
    return Seeing(
        image_token_id=int(token),
        ahead=ahead,
        has_axes=counts is not None,
        has_layer_inputs=takes_layer_inputs(decoder),
        pad_token_id=int(getattr(text, "pad_token_id", None) or 0),
        first_position=_FIRST_POSITION.get(name, 0),
    )


_TOKEN_NAMES = ("image_token_id", "image_token_index")


def takes_layer_inputs(decoder: Any) -> bool:
    """Tell whether a decoder's layers are given something of each token's id (Gemma 4)."""
    return bool(getattr(decoder.config, "hidden_size_per_layer_input", 0)) and hasattr(
        decoder, "get_per_layer_inputs"
    )


def check_looks_through_rows(model: Any) -> None:
    """Refuse a model that reads an image otherwise than as rows among those of its tokens.

    Raises:
        ModelLoadError: it has layers that attend to images.
    """
    text = model.config.get_text_config()
    if getattr(text, "cross_attention_layers", None):
        raise ModelLoadError(
            f"{type(model).__name__} attends to images by layers of cross-attention: it is not served"
        )


class DecoderOutput:
    """What a decoder returned, for code that asks more of it than it has: None."""

    def __init__(self, rows: Tensor) -> None:
        self.last_hidden_state = rows

    def __getitem__(self, index: int) -> Tensor:
        if index != 0:
            raise IndexError(index)
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
