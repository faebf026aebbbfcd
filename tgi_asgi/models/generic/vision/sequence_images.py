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
    compute = model.model.get_rope_index
    known = inspect.signature(compute).parameters
    # The numbers of patches, [images, 3] in time, height and width; MiniCPM-V's are [tiles, 2], without time.
    name = next(name for name in SIZES if name in known)
    sizes = torch.cat([image.payload[name] for image in images])
    if "mm_token_type_ids" not in known:
        return _axes_by_marks(model, ids, seen, {name: sizes})
    kinds = np.zeros((1, len(ids)), np.int32)
    for each in seen:
        kinds[0, each.places] = 1
    positions, deltas = compute(
        torch.from_numpy(ids)[None], mm_token_type_ids=torch.from_numpy(kinds), **{name: sizes}
    )
    return positions[:, 0, : len(ids)], int(deltas.reshape(-1)[0])


def _axes_by_marks(
    model: Any, ids: Ints, seen: Sequence[PromptImage], sizes: dict[str, Tensor]
) -> tuple[Tensor, int]:
    """Return the same for Qwen-Omni, whose function finds images by marks and takes a token after each.

    Clients may write other marks, or none. Each token of text adds one, so the function gets marks of our own
    and no others, and the positions that these take are subtracted:

        prompt      a <bos> I I I I b
        given       t t   < I I I I > t      t: any token of text
    """
    config = model.config
    others = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    text = next(token_id for token_id in range(len(others) + 1) if token_id not in others)
    given, kept, inserted = [], [], []
    ends = {int(each.places[-1]) for each in seen}
    starts = {int(each.places[0]) for each in seen}
    are_images = np.zeros(len(ids), bool)
    for each in seen:
        are_images[each.places] = True
    for at, token_id in enumerate(ids.tolist()):
        if at in starts:
            given.append(config.vision_start_token_id)
        inserted.append(len(given) - at)
        kept.append(len(given))
        given.append(token_id if are_images[at] else text)
        if at in ends:
            given.append(text)
    mask = torch.ones(1, len(given), dtype=torch.long)
    found, _ = model.model.get_rope_index(torch.tensor([given]), attention_mask=mask, **sizes)
    positions = found[:, 0, kept] - torch.tensor(inserted)
    return positions, int(positions.max()) + 1 - len(ids)
