"""The images that the running sequences of a vision model see, and what a step needs of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.generic.vision.encodings import EncodingCache
from tgi_asgi.models.generic.vision.sequence_images import (
    NO_IMAGES,
    PromptImage,
    SequenceImages,
    sequence_images_of,
)
from tgi_asgi.models.generic.vision.text import Lookahead, VisionTraits
from tgi_asgi.models.generic.vision.tower import ImageEncoding
from tgi_asgi.types import Bidirectional, ImageInput

_BIDIRECTIONAL = {
    Lookahead.NOTHING: Bidirectional.NOTHING,
    Lookahead.IMAGES: Bidirectional.IMAGES,
    Lookahead.IMAGES_IN_WINDOWS: Bidirectional.IMAGES,
    Lookahead.PROMPT: Bidirectional.PROMPT,
}
Part = tuple[int, SequenceImages, Any]  # index of a sequence's first token, its images, and its positions


@dataclass(frozen=True, slots=True)
class SeenRows:
    """Rows of images among a step's tokens, in the order of the tokens.

    Attributes:
        places: Indices of the tokens, one array per image.
        rows: [n, hidden] of each image.
        deep: Each image's deeper levels, [n, hidden] each.
    """

    places: list[Any] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    deep: list[tuple[Tensor, ...]] = field(default_factory=list)


class RunningImages:
    """Knows which images the running sequences have.

    Attributes:
        encodings: Cache of image encodings.
    """

    def __init__(self, model: Any, traits: VisionTraits, encodings: EncodingCache) -> None:
        self.encodings = encodings
        self._model, self._traits = model, traits
        self._sequences: dict[int, SequenceImages] = {}

    @property
    def bidirectional(self) -> Bidirectional:
        """Which parts of a prompt must be in one step."""
        return _BIDIRECTIONAL[self._traits.lookahead]

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> SequenceImages:
        """Assign a slot to a sequence with these images; return them and where they are."""
        found = self._sequences[slot] = sequence_images_of(self._model, self._traits, prompt_ids, images)
        return found

    def of(self, slot: int) -> SequenceImages:
        """Return the images of a slot's sequence."""
        return self._sequences.get(slot, NO_IMAGES)

    @property
    def is_encoding(self) -> bool:
        """Whether an image is encoded in part."""
        return self.encodings.is_encoding

    def advance(self, images: Sequence[ImageInput], seconds: float) -> tuple[list[bool], float]:
        """Encode images before the steps that need them, as `EncodingCache.advance`; and the seconds."""
        begun = time.monotonic()
        return self.encodings.advance(images, seconds), time.monotonic() - begun

    def parts(self, batch: ops.FlatRows) -> list[Part]:
        """Return the index of each row's first token in a step, its `SequenceImages`, and its positions."""
        stops = batch.query_start.tolist()
        positions = batch.positions.astype(np.int64)
        return [
            (first, self.of(slot), positions[first:stop])
            for slot, first, stop in zip(batch.row_slots.tolist(), stops[:-1], stops[1:], strict=True)
        ]

    def encoding(self, seen: PromptImage) -> ImageEncoding:
        """Return the encoding of an image that a row of the step needs."""
        image = seen.image()
        assert image is not None, "the engine holds a sequence while a step has a row of it"
        return self.encodings.get(image)

    def rows(self, parts: Sequence[Part]) -> SeenRows:
        """Return the rows of the images that have tokens in these parts of a step.

        Raises:
            ValueError: if an image has another number of rows than of tokens.
        """
        found = SeenRows()
        for first, sequence, positions in parts:
            begin, end = int(positions[0]), int(positions[-1]) + 1
            for seen in sequence.images:
                low, high = np.searchsorted(seen.places, (begin, end)).tolist()
                if low == high:
                    continue
                encoding = self.encoding(seen)
                if len(encoding.rows) != len(seen.places):
                    raise ValueError(f"an image has {len(encoding.rows)} rows for {len(seen.places)} tokens")
                found.places.append(seen.places[low:high] - begin + first)
                found.rows.append(encoding.rows[low:high])
                found.deep.append(tuple(each[low:high] for each in encoding.deep))
        return found


def axes_of(parts: Sequence[Part], num_axes: int) -> Tensor:
    """Return the positions [axes, n_tokens] of a step's tokens in the rotary tables."""
    return torch.cat(
        [
            _positions(sequence, int(positions[0]), int(positions[-1]) + 1, num_axes)
            for _, sequence, positions in parts
        ],
        dim=-1,
    )


def _positions(sequence: SequenceImages, begin: int, end: int, num_axes: int) -> Tensor:
    """Return the positions [axes, end - begin] of a sequence's tokens."""
    split = min(max(sequence.num_prompt, begin), end) if sequence.positions is not None else begin
    after = (torch.arange(split, end) + sequence.delta).expand(num_axes, -1)
    if sequence.positions is None or split == begin:
        return after
    return torch.cat([sequence.positions[:, begin:split], after], dim=-1)
