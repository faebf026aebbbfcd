"""Which images each running sequence sees, and where: positions of their rows, and multi-axis positions."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.models.generic.vision.text import SIZES, Lookahead, VisionTraits
from tgi_asgi.types import ImageInput

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image in a prompt. The engine's sequence owns it, so that an idle slot keeps no pixels alive."""

    image: weakref.ref[ImageInput]
    places: Ints  # positions of its rows, ascending


@dataclass(frozen=True, slots=True)
class SequenceImages:
    """The images of a sequence, and the positions of its tokens.

    Attributes:
        num_prompt: Number of tokens of its prompt.
        positions: [axes, num_prompt] positions of the prompt's tokens; None if each is the token's index.
        delta: Number added to the index of a token after the prompt.
    """

    num_prompt: int
    images: tuple[PromptImage, ...] = ()
    positions: Tensor | None = None
    delta: int = 0

    def ends(self, lookahead: Lookahead, positions: Ints) -> Ints:
        """Return, for each of these tokens, where the range that it sees ends, at least after itself."""
        ends = positions + 1
        if lookahead is Lookahead.PROMPT:
            return np.where(positions < self.num_prompt, self.num_prompt, ends)
        for seen in self.images if lookahead is not Lookahead.NOTHING else ():
            for first, stop in runs(seen.places):
                ends[(positions >= first) & (positions < stop)] = stop
        return ends


NO_IMAGES = SequenceImages(0)


def runs(places: Ints) -> list[tuple[int, int]]:
    """Return the runs [first, stop) of consecutive numbers in an ascending array."""
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(places, cuts) if len(part)]


def sequence_images_of(
    model: Any, traits: VisionTraits, prompt_ids: Sequence[int], images: Sequence[ImageInput]
) -> SequenceImages:
    """Return the `SequenceImages` of a sequence with this prompt."""
    num_prompt = len(prompt_ids)
    if not images:
        return SequenceImages(num_prompt)
    ids = np.asarray(prompt_ids, np.int64)
    seen: list[PromptImage] = []
    for image in images:
        stop = image.start + image.num_tokens
        places = np.flatnonzero(ids[image.start : stop] == traits.image_token_id) + image.start
        seen.append(PromptImage(weakref.ref(image), places))
    positions, delta = None, 0
    if traits.has_axes:
        positions, delta = _axes(model, ids, seen, images)
    return SequenceImages(num_prompt, tuple(seen), positions, delta)


def _axes(
    model: Any, ids: Ints, seen: Sequence[PromptImage], images: Sequence[ImageInput]
) -> tuple[Tensor, int]:
    """Return the positions [axes, n] that the model's own function computes for a prompt, and its delta."""
    compute, num_tokens = model.model.get_rope_index, len(ids)
    known = inspect.signature(compute).parameters
    # The numbers of patches, [images, 3] in time, height and width; MiniCPM-V's are [tiles, 2], without time.
    name = next(name for name in SIZES if name in known)
    sizes = torch.cat([image.payload[name] for image in images])
    if "mm_token_type_ids" in known:
        kinds = np.zeros((1, len(ids)), np.int32)
        for each in seen:
            kinds[0, each.places] = 1
        given = {"mm_token_type_ids": torch.from_numpy(kinds)}
    else:
        # Qwen-Omni finds images by the token before them. It looks one token ahead, and wants one after an
        # image: a token of text more changes nothing else.
        ids = np.append(ids, 0)
        given = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    positions, deltas = compute(torch.from_numpy(ids)[None], **given, **{name: sizes})
    return positions[:, 0, :num_tokens], int(deltas.reshape(-1)[0])
