"""Finds out whether a native family can compute the text model of a vision model, and what it must know.

Only classes whose logits tests compare with those of `transformers` are computed in this way. Their text
models are those of native families but for images: rows in place of tokens, positions with several axes,
tokens that see later ones. Classes that do more with images (experts of their own, attention to them) stay
modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tgi_asgi.errors import NotInFamily
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.generic.caller import decoders_of
from tgi_asgi.models.generic.vision.text import (
    DecoderOutput,
    Lookahead,
    VisionTraits,
    decoder_of,
    has_token_rows,
    takes_token_ids,
)
from tgi_asgi.models.generic.zeros import arguments
from tgi_asgi.models.layer_spec import ImageSpec
from tgi_asgi.ops.arrays import Floats

Ints = npt.NDArray[np.int64]

# The class of a text model alone, by the type of a vision model's `text_config`.
_CLASSES = {
    "cohere2": "Cohere2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "glm4v_text": "Glm4ForCausalLM",
    "glm_ocr_text": "Glm4ForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "paddleocr_vl_text": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_omni_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
# What a type's own class computes where its configuration says nothing, unlike the class of the text alone.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "glm4v_text": {"partial_rotary_factor": 1.0},
    "glm_ocr_text": {"attention_bias": False, "partial_rotary_factor": 1.0},
}
_PRODUCTS = np.linspace(-60, 60, 25, dtype=np.float32)
_AXES = ("mrope_section", "mrope_interleaved")  # of rotary parameters; the rotary module itself is asked


@dataclass(frozen=True, slots=True)
class NativeText:
    """A vision model's text model.

    Attributes:
        config: The config.json of the text model alone; None: no native family reads such checkpoints.
        path, head: Paths of the decoder and the head in the module.
        traits: How the model handles images.
        images: Where rows enter.
        axis_of: The axis by which each pair of rotated dims turns; None: positions have one axis.
        logits: What the class makes of `_PRODUCTS`, products of its head.
        rows_factor: Factor by which the decoder multiplies all rows, those of images, too (Granite).
    """

    config: dict[str, Any] | None
    path: str
    head: str
    traits: VisionTraits
    images: ImageSpec
    axis_of: Ints | None
    logits: Floats
    rows_factor: float

    def with_images(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of the text model, as a native family has read it, with images.

        Raises:
            NotInFamily: if the family does not compute what the class does.
        """
        if np.allclose(self.logits, _PRODUCTS):  # unlike the class of the text alone (Aya Vision)
            config = replace(config, logits_scale=1.0, logits_cap=0.0)
        elif not np.allclose(self.logits, _logits(config), atol=1e-4):
            raise NotInFamily("its class changes logits in a way of its own")
        ropes = {layer.rope for layer in config.layers if layer.rope is not None}
        if self.axis_of is not None and [rope.dim for rope in ropes] != [2 * len(self.axis_of)]:
            raise NotInFamily("its positions have several axes, and layers turn by them in several ways")
        if self.traits.lookahead is not Lookahead.IMAGES_IN_WINDOWS:
            return replace(config, images=self.images)
        layers = (replace(layer, sees_ahead=layer.window is not None) for layer in config.layers)
        return replace(config, images=self.images, layers=tuple(layers))


def find_text(model: Any, traits: VisionTraits) -> NativeText | None:
    """Return the text model of a vision model if a native family may compute it.

    Args:
        model: The module, without weights.
    """
    decoder = decoder_of(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if (
        traits.has_cross_attention
        or traits.routed_ids
        or traits.first_position
        or traits.lookahead is Lookahead.PROMPT
        or takes_token_ids(decoder)
        or has_token_rows(model)
        or decoder.config.vocab_size != rows
        or max(traits.image_token_id, traits.pad_token_id) >= rows
    ):
        return None
    axis_of = _axis_of(decoder, traits.num_axes) if traits.has_axes else None
    deep = _deep_layers(model, traits)
    if (traits.has_axes and axis_of is None) or max(deep, default=0) >= len(decoder.layers):
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    head = paths.get(id(model.get_output_embeddings()))
    if head is None:
        return None
    config = _config_of(model, decoder, head)
    factor = float(getattr(decoder, "embedding_multiplier", 1.0))
    images = ImageSpec(deep, sees_ahead=traits.lookahead is not Lookahead.NOTHING)
    return NativeText(config, paths[id(decoder)], head, traits, images, axis_of, _own_logits(model), factor)


def _config_of(model: Any, decoder: Any, head: str) -> dict[str, Any] | None:
    """Return the config.json of the text model; the whole model's says whether its head is the embedding."""
    kind = getattr(decoder.config, "model_type", "")
    architecture = _CLASSES.get(kind)
    if architecture is None:
        return None
    found: dict[str, Any] = {**_DEFAULTS.get(kind, {}), **decoder.config.to_dict()}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found |= {"architectures": [architecture], "tie_word_embeddings": f"{head}.weight" in tied}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(found.get(name), dict):
            found[name] = {key: value for key, value in found[name].items() if key not in _AXES}
    return found


def _axis_of(decoder: Any, num_axes: int) -> Ints | None:
    """Ask the rotary module by which axis each pair turns; None if a pair turns by none or by several."""
    whole = _sines(decoder, torch.ones(num_axes, dtype=torch.long))
    half = len(whole) // 2
    if torch.equal(whole[:half], whole[half:]):
        firsts = slice(0, half)
    elif torch.equal(whole[0::2], whole[1::2]):  # GLM: dims 2i and 2i + 1 turn together
        firsts = slice(0, None, 2)
    else:
        return None
    turns = torch.stack(
        [_sines(decoder, axis)[firsts] != 0 for axis in torch.eye(num_axes, dtype=torch.long)]
    )
    found: Ints = turns.int().argmax(dim=0).numpy()
    return found if bool((turns.sum(dim=0) == 1).all()) else None


def _sines(decoder: Any, position: Tensor) -> Tensor:
    """Return the sines of each dim of a token at this position on all axes."""
    with torch.inference_mode():
        _, sines = decoder.rotary_emb(torch.zeros(1), position[:, None, None])
    found: Tensor = sines.reshape(-1)
    return found


def _own_logits(model: Any) -> Floats:
    """Return what a class makes of its head's products."""
    outer, head = decoders_of(model)[0], model.get_output_embeddings()
    rows, products = torch.zeros(1, 1, 1), torch.from_numpy(_PRODUCTS)[None, None]
    kept = [vars(module).get("forward") for module in (outer, head)]
    try:
        outer.forward, head.forward = lambda *_, **__: DecoderOutput(rows), lambda x: products
        with torch.inference_mode():
            logits = model(**arguments(model, input_ids=torch.zeros(1, 1, dtype=torch.long))).logits
    finally:
        for module, forward in zip((outer, head), kept, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    found: Floats = logits.reshape(-1).float().numpy()
    return found


def _logits(config: ModelConfig) -> Floats:
    """Return what a native family makes of the same products."""
    found = _PRODUCTS * np.float32(config.logits_scale)
    cap = np.float32(config.logits_cap)
    capped: Floats = cap * np.tanh(found / cap) if cap else found
    return capped


def _deep_layers(model: Any, traits: VisionTraits) -> tuple[int, ...]:
    """Return the layers before which an image's deeper rows are added: listed, or those after the first."""
    if traits.deep_layers:
        return traits.deep_layers
    count = len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())
    return tuple(range(1, count + 1))


def strip(model: Any, text: NativeText) -> None:
    """Leave a module's tower alone: its decoder and head keep no parameters."""
    for path in (text.path, text.head):
        module = model.get_submodule(path)
        for name in dict(module.named_children()):
            setattr(module, name, nn.Identity())
        for name in list(module._parameters):
            module._parameters[name] = None
