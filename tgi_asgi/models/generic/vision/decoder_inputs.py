"""What the decoder of a vision model receives in a step: rows instead of ids, and positions.

Used by the programs of vision models. It knows which images the running sequences have, but not how the
decoder is called.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from tgi_asgi.models.generic.vision.text import (
    VisionTraits,
    decoder_of,
    layer_inputs,
    takes_token_ids,
    token_rows,
)
from tgi_asgi.models.generic.vision.tower import ImageEncoding
from tgi_asgi.types import ImageInput

Part = tuple[int, SequenceImages, Any]  # index of a sequence's first token, its images, and its positions


class DecoderInputs:
    """Makes the decoder's arguments for the tokens of a step.

    Attributes:
        encodings: Cache of image encodings.
    """

    def __init__(
        self, model: Any, traits: VisionTraits, encodings: EncodingCache, device: torch.device
    ) -> None:
        self.encodings = encodings
        self._model, self._traits, self._device = model, traits, device
        self._decoder, self._embed = decoder_of(model), model.get_input_embeddings()
        self._takes_ids = takes_token_ids(self._decoder)
        self._sequences: dict[int, SequenceImages] = {}
        self._marks: Tensor | None = None
        with torch.inference_mode():
            others = token_rows(model, device)
            if others is not None:
                ids, self._rows = others
                self._marks, order = ids.sort()
                self._rows = self._rows[order]

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with these images."""
        self._sequences[slot] = sequence_images_of(self._model, self._traits, prompt_ids, images)

    def advance(self, images: Sequence[ImageInput], seconds: float) -> tuple[list[bool], float]:
        """Encode images before the steps that need them, as `EncodingCache.advance`; and the seconds."""
        begun = time.monotonic()
        return self.encodings.advance(images, seconds), time.monotonic() - begun

    def parts(self, batch: ops.FlatRows) -> list[Part]:
        """Return the index of each row's first token in a step, its `SequenceImages`, and its positions."""
        stops = batch.query_start.tolist()
        positions = batch.positions.astype(np.int64)
        return [
            (first, self._sequences.get(slot, NO_IMAGES), positions[first:stop])
            for slot, first, stop in zip(batch.row_slots.tolist(), stops[:-1], stops[1:], strict=True)
        ]

    def encoding(self, seen: PromptImage) -> ImageEncoding:
        """Return the encoding of an image that a row of the step needs."""
        image = seen.image()
        assert image is not None, "the engine holds a sequence while a step has a row of it"
        return self.encodings.get(image)

    def of(self, token_ids: Any, parts: Sequence[Part]) -> dict[str, Any]:
        """Return the decoder's arguments for these tokens of a step, all in one row."""
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self._device)
        given: dict[str, Any] = {"use_cache": False}
        if self._takes_ids:
            given["ple_input_ids"] = ids[None].clone()
        if self._traits.routed_ids:
            given["moe_mm_token_type_ids"] = torch.from_numpy(
                np.concatenate([
                    np.isin(token_ids[first : first + len(at)], self._traits.routed_ids)
                    & (at < sequence.num_prompt)
                    for first, sequence, at in parts
                ])
            ).to(self._device)[None]  # fmt: skip
        axes: list[Tensor] = []
        places: list[Tensor] = []  # indices in the step of images' rows
        rows: list[Tensor] = []
        deep: list[tuple[Tensor, ...]] = []
        for first, sequence, positions in parts:
            begin, end = int(positions[0]), int(positions[-1]) + 1
            for seen in sequence.images:
                low, high = np.searchsorted(seen.places, (begin, end)).tolist()
                if low == high:
                    continue
                encoding = self.encoding(seen)
                if len(encoding.rows) != len(seen.places):
                    raise ValueError(f"an image has {len(encoding.rows)} rows for {len(seen.places)} tokens")
                places.append(torch.from_numpy(seen.places[low:high] - begin + first))
                rows.append(encoding.rows[low:high])
                deep.append(tuple(each[low:high] for each in encoding.deep))
            axes.append(_positions(sequence, begin, end, self._traits.num_axes))
        at = (torch.cat(places) if places else torch.empty(0, dtype=torch.long)).to(self._device)
        ids[at] = self._traits.pad_token_id
        embeds = self._embed(ids[None]).clone()
        if self._marks is not None:
            near = torch.searchsorted(self._marks, ids).clamp(max=len(self._marks) - 1)
            embeds[0] = torch.where((self._marks[near] == ids)[:, None], self._rows[near], embeds[0])
        if rows:
            embeds[0, at] = torch.cat(rows)
        flat = (torch.cat(axes, dim=-1) + self._traits.first_position).to(self._device)
        given["inputs_embeds"] = embeds
        given["position_ids"] = flat[:, None] if self._traits.has_axes else flat[:1]
        if self._traits.has_layer_inputs:
            given["per_layer_inputs"] = layer_inputs(self._decoder, ids[None])
        if deep and deep[0]:
            mask = torch.zeros(1, len(ids), dtype=torch.bool, device=self._device)
            mask[0, at] = True
            given |= self._deep(mask, [torch.cat(layer) for layer in zip(*deep, strict=True)])
        return given

    def _deep(self, mask: Tensor, deep: list[Tensor]) -> dict[str, Any]:
        """Return the decoder's arguments for images' deep rows at the positions of a mask [1, n_tokens]."""
        if self._traits.deep_layers:
            features = dict(zip(self._traits.deep_layers, deep, strict=True))
            return {"vision_mask": mask[..., None], "deepstack_features": features}
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": deep}


def _positions(sequence: SequenceImages, begin: int, end: int, num_axes: int) -> Tensor:
    """Return the positions [axes, end - begin] of a sequence's tokens."""
    split = min(max(sequence.num_prompt, begin), end) if sequence.positions is not None else begin
    after = (torch.arange(split, end) + sequence.delta).expand(num_axes, -1)
    if sequence.positions is None or split == begin:
        return after
    return torch.cat([sequence.positions[:, begin:split], after], dim=-1)
