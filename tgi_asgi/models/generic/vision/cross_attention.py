"""Images that layers of cross-attention read (Mllama), instead of rows in place of their tokens.

An image's encoding is the keys and values that each of these layers makes of it. What a token sees depends on
the images' tokens, of which there is one each (I and J, and K right after J), and on the images' tiles, which
padding brings to the same number (p):

    token         a b I c d J K e f        images            i = [i1 i2 p p], j = [j1 p p p], k = [k1 k2 k3 p]
    I c d         see the image before     i1 i2
    J             sees its own             j1
    K e f         see all that stand side by side            j1 k1 k2 k3
    a b           see everything           i1 i2 p p j1 p p p k1 k2 k3 p

The last line is what `transformers` computes, whose masks hide nothing from tokens that should see no image.
Their MLPs are skipped in these layers. A sequence without images skips the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.modules import Mode
from tgi_asgi.models.generic.vision.tower import ImageEncoding


@dataclass(slots=True)
class Piece:
    """A function that a tower may run in its turn, and whose result it then keeps; see `Tower`."""

    forward: Callable[..., Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(*args, **kwargs)


class CrossFeatures:
    """Encodes an image as the tower's code and the decoder's layers do: `get_image_features` of Mllama.

    Attributes:
        mode: How the model computes.
        is_exact: Whether keys and values are float32 in any mode; otherwise bfloat16, unless it is exact.
        pieces: What is computed besides the modules of the tower.
    """

    def __init__(self, inner: Any) -> None:
        from transformers.models.mllama import modeling_mllama

        self._inner, self._layers = inner, cross_layers(inner.language_model)
        self.mode: Mode | None = None
        self.is_exact = False
        # For four tiles of 560 x 560, these take 0.25 s: too long to be computed again for each other piece.
        self._code: Any = modeling_mllama
        self._mask = Piece(modeling_mllama._prepare_aspect_ratio_attention_mask)
        inner.vision_model.apply_class_embedding = Piece(inner.vision_model.apply_class_embedding)
        self._projections = [
            Piece(functools.partial(self._project, layer.cross_attn, of_keys=of_keys))
            for layer in self._layers
            for of_keys in (True, False)
        ]
        self.pieces = [self._mask, inner.vision_model.apply_class_embedding, *self._projections]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the keys and values."""
        is_exact = self.is_exact or (self.mode is not None and self.mode.is_exact)
        return torch.float32 if is_exact else torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """Bytes of an encoding: each has all tiles."""
        tower = self._inner.vision_model
        num_rows = tower.max_num_tiles * tower.num_patches
        columns = sum(_width(layer.cross_attn) for layer in self._layers)
        return int(num_rows * 2 * columns * self.dtype.itemsize)

    def __call__(
        self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor, **_: Any
    ) -> ImageEncoding:
        """Return an image's keys and values, for each layer [num_kv_heads, num_rows, head_dim]."""
        inner, before = self._inner, self._code._prepare_aspect_ratio_attention_mask
        self._code._prepare_aspect_ratio_attention_mask = self._mask
        try:
            states = inner.vision_model(pixel_values, aspect_ratio_ids, aspect_ratio_mask).last_hidden_state
        finally:
            self._code._prepare_aspect_ratio_attention_mask = before
        num_visible = int(aspect_ratio_mask.sum()) * states.shape[-2]
        rows = inner.multi_modal_projector(states.reshape(-1, states.shape[-1]))
        return ImageEncoding(rows[:0], tuple(piece(rows) for piece in self._projections), num_visible)

    def _project(self, attention: Any, rows: Tensor, *, of_keys: bool) -> Tensor:
        made = (attention.k_proj if of_keys else attention.v_proj)(rows)
        heads = made.view(-1, attention.num_key_value_heads, attention.head_dim)
        heads = attention.k_norm(heads) if of_keys else heads
        ordered: Tensor = heads.transpose(0, 1).to(self.dtype).contiguous()
        return ordered


@dataclass(frozen=True, slots=True)
class Seen:
    """Tokens of a sequence, consecutive in a step, that see the same images.

    Attributes:
        first, stop: Indices of the tokens in the step.
        encodings: The images that they see.
        is_before: Whether the tokens stand before any image.
    """

    first: int
    stop: int
    encodings: tuple[ImageEncoding, ...]
    is_before: bool

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what the tokens see in a layer, [num_kv_heads, num_rows, head_dim]."""
        found = []
        for at in (2 * layer, 2 * layer + 1):
            parts = [
                each.deep[at] if self.is_before else each.deep[at][:, : each.num_visible]
                for each in self.encodings
            ]
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return found[0], found[1]


def seen_in(
    first: int, begin: int, end: int, starts: Sequence[int], encodings: Sequence[ImageEncoding]
) -> list[Seen]:
    """Return what the tokens [begin, end) of a sequence see.

    Args:
        first: Index of the first of them in the step.
        starts: Positions of the images' tokens, ascending.
    """
    cuts = sorted({begin, end, *(start for start in starts if begin < start < end)})
    found = []
    for low, high in pairwise(cuts):
        stop = sum(start <= low for start in starts)
        since = stop - 1
        while since > 0 and starts[since - 1] + 1 == starts[since]:
            since -= 1
        visible = tuple(encodings[since:stop] if stop else encodings)
        found.append(Seen(first + low - begin, first + high - begin, visible, is_before=not stop))
    return found


class CrossAttention:
    """The decoder's layers of cross-attention, for those rows of a step whose sequences have images.

    cross = CrossAttention(decoder)
    cross.begin(seen, num_tokens, device)  # before a step; without images, the decoder skips the layers
    cross.end()
    """

    def __init__(self, decoder: Any) -> None:
        self._seen: list[Seen] = []
        self._rows: Tensor | None = None  # indices of the tokens that see images; None: all
        self._has_image = torch.empty(0)
        for index, layer in enumerate(cross_layers(decoder)):
            layer.forward = functools.partial(self._run, type(layer).forward.__get__(layer))
            attention = layer.cross_attn
            attention.forward = functools.partial(self._attend, index, attention)

    def begin(self, seen: Sequence[Seen], num_tokens: int, device: torch.device) -> None:
        """Set what the tokens of the next step see."""
        self._seen, at = [], 0
        for each in seen:  # where they are among the tokens that see images
            count = each.stop - each.first
            self._seen.append(Seen(at, at + count, each.encodings, each.is_before))
            at += count
        rows = [row for each in seen for row in range(each.first, each.stop)]
        self._rows = None if len(rows) == num_tokens else torch.tensor(rows, device=device)
        is_after = [float(not each.is_before) for each in seen for _ in range(each.first, each.stop)]
        self._has_image = torch.tensor(is_after, device=device).view(1, 1, -1, 1)

    def end(self) -> None:
        """Let go of the images that the step has seen."""
        self._seen = []

    def _run(self, forward: Callable[..., Tensor], hidden_states: Tensor, **_: Any) -> Tensor:
        """Replace a layer's `forward`."""
        if self._rows is None:
            return self._run_rows(forward, hidden_states)
        found = hidden_states.clone()
        found[:, self._rows] = self._run_rows(forward, hidden_states[:, self._rows])
        return found

    def _run_rows(self, forward: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
        return forward(
            hidden_states,
            cross_attention_states=None,
            cross_attention_mask=None,
            attention_mask=None,
            full_text_row_masked_out_mask=self._has_image,
        )

    def _attend(self, layer: int, attention: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Replace the `forward` of a layer's attention."""
        num_heads, num_kv_heads, dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
        queries = attention.q_norm(attention.q_proj(hidden_states[0]).view(-1, num_heads, dim))
        found = []
        for each in self._seen:
            keys, values = each.keys_and_values(layer)
            # Queries of a KV head's group lie one behind the other, so that no key is repeated.
            grouped = queries[each.first : each.stop].to(keys.dtype)
            grouped = grouped.view(-1, num_kv_heads, num_heads // num_kv_heads, dim).permute(1, 2, 0, 3)
            flat = grouped.reshape(1, num_kv_heads, -1, dim)
            rows = F.scaled_dot_product_attention(flat, keys[None], values[None], scale=attention.scaling)
            found.append(rows.view(grouped.shape).permute(2, 0, 1, 3).reshape(-1, num_heads * dim).float())
        return attention.o_proj(torch.cat(found)[None]), None


def adapt(model: Any) -> None:
    """Give a model whose images are read by cross-attention the method that encodes images in others.

    Raises:
        ModelLoadError: if it is not one whose layers are known.
    """
    if not getattr(model.config.get_text_config(), "cross_attention_layers", None):
        return
    name = type(model).__name__
    if name == "MllamaForConditionalGeneration":
        model.model.get_image_features = CrossFeatures(model.model)
    elif name != "MllamaForCausalLM":
        raise ModelLoadError(f"{name} has layers of cross-attention to images, which are not supported")


def cross_layers(decoder: Any) -> list[Any]:
    """Return a decoder's layers of cross-attention."""
    return [layer for layer in decoder.layers if hasattr(layer, "cross_attn")]


def _width(attention: Any) -> int:
    return int(attention.num_key_value_heads * attention.head_dim)
