"""Steps of a vision model: like those of any module, except that its decoder receives rows instead of ids."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.generic.attention import PagedLayers
from tgi_asgi.models.generic.delta_nets import NativeStates
from tgi_asgi.models.generic.discover import arguments
from tgi_asgi.models.generic.modules import Head, Mode
from tgi_asgi.models.generic.program import GenericProgram
from tgi_asgi.models.generic.recurrent import RecurrentLayers
from tgi_asgi.models.generic.vision.cross_attention import CrossAttention, Seen, seen_in
from tgi_asgi.models.generic.vision.encodings import EncodingCache
from tgi_asgi.models.generic.vision.sequence_images import (
    NO_IMAGES,
    PromptImage,
    SequenceImages,
    sequence_images_of,
)
from tgi_asgi.models.generic.vision.text import (
    DecoderOutput,
    Lookahead,
    VisionTraits,
    decoder_of,
    layer_inputs,
    token_rows,
)
from tgi_asgi.models.generic.vision.tower import ImageEncoding
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.types import Bidirectional, ImageInput

_BIDIRECTIONAL = {
    Lookahead.NOTHING: Bidirectional.NOTHING,
    Lookahead.IMAGES: Bidirectional.IMAGES,
    Lookahead.IMAGES_IN_WINDOWS: Bidirectional.IMAGES,
    Lookahead.PROMPT: Bidirectional.PROMPT,
}


class VisionProgram(GenericProgram):
    """All sequences of a step in one call of the decoder, with images' rows in place of their tokens.

    Attributes:
        encodings: Cache of image encodings.
        bidirectional: Which parts of a prompt must be in one step.
    """

    def __init__(
        self, model: Any, head: Head, layers: PagedLayers, recurrent: RecurrentLayers | None,
        traits: VisionTraits, encodings: EncodingCache, *, vocab_size: int, mode: Mode,
        native_states: NativeStates | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            model, head, layers, recurrent, vocab_size=vocab_size, first_position=traits.first_position,
            decode=self._decode, mode=mode, native_states=native_states,
        )  # fmt: skip
        self.encodings = encodings
        self.bidirectional = _BIDIRECTIONAL[traits.lookahead]
        self._model, self._traits = model, traits
        self._decoder, self._embed = decoder_of(model), model.get_input_embeddings()
        self._sequences: dict[int, SequenceImages] = {}
        self._inputs: dict[str, Any] = {}
        self._marks: Tensor | None = None
        self._cross = CrossAttention(self._decoder) if traits.has_cross_attention else None
        with torch.inference_mode():
            others = token_rows(model)
            if others is not None:
                ids, self._rows = (each.to(self._device) for each in others)
                self._marks, order = ids.sort()
                self._rows = self._rows[order]

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with these images."""
        self._sequences[slot] = sequence_images_of(self._model, self._traits, prompt_ids, images)

    def advance(self, images: Sequence[ImageInput], seconds: float) -> tuple[list[bool], float]:
        """Encode images before the steps that need them, as `EncodingCache.advance`; and the seconds."""
        begun = time.monotonic()
        return self.encodings.advance(images, seconds), time.monotonic() - begun

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; see `GenericProgram.run`."""
        with torch.inference_mode():
            if self._cross is None:
                self._inputs = self._decoder_inputs(batch)
            else:
                self._inputs = self._crossed_inputs(batch, self._cross)
        try:
            return super().run(batch, rows)
        finally:
            if self._cross is not None:
                self._cross.end()

    def _begin(self, batch: ops.FlatRows) -> None:
        super()._begin(batch)
        if self._traits.lookahead is not Lookahead.NOTHING:
            ends = np.concatenate([
                sequence.ends(self._traits.lookahead, positions)
                for _, sequence, positions in self._parts(batch)
            ])  # fmt: skip
            in_windows = self._traits.lookahead is Lookahead.IMAGES_IN_WINDOWS
            self._layers.look_ahead(batch, torch.from_numpy(ends.astype(np.int32)), in_windows=in_windows)

    def _decode(self, *_: Any, **__: Any) -> DecoderOutput:
        """Replace the part of the model that contains the tower and the decoder."""
        return DecoderOutput(self._decoder(**self._inputs).last_hidden_state)

    def _parts(self, batch: ops.FlatRows) -> list[tuple[int, SequenceImages, Any]]:
        """Return the index of each row's first token in a step, its `SequenceImages`, and its positions."""
        stops = batch.query_start.tolist()
        positions = batch.positions.astype(np.int64)
        return [
            (first, self._sequences.get(slot, NO_IMAGES), positions[first:stop])
            for slot, first, stop in zip(batch.row_slots.tolist(), stops[:-1], stops[1:], strict=True)
        ]

    def _decoder_inputs(self, batch: ops.FlatRows) -> dict[str, Any]:
        """Return the decoder's arguments for a step."""
        ids = torch.from_numpy(batch.ids.astype(np.int64)).to(self._device)
        axes: list[Tensor] = []
        places: list[Tensor] = []  # indices in the step of images' rows
        rows: list[Tensor] = []
        deep: list[tuple[Tensor, ...]] = []
        for first, sequence, positions in self._parts(batch):
            begin, end = int(positions[0]), int(positions[-1]) + 1
            for seen in sequence.images:
                low, high = np.searchsorted(seen.places, (begin, end)).tolist()
                if low == high:
                    continue
                encoding = self._encoding(seen)
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
        given: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False}
        given["position_ids"] = flat[:, None] if self._traits.has_axes else flat[:1]
        if self._traits.has_layer_inputs:
            given["per_layer_inputs"] = layer_inputs(self._decoder, ids[None])
        given = arguments(self._decoder, **given)
        if deep and deep[0]:
            mask = torch.zeros(1, len(ids), dtype=torch.bool, device=self._device)
            mask[0, at] = True
            given |= self._deep_inputs(mask, [torch.cat(layer) for layer in zip(*deep, strict=True)])
        return given

    def _encoding(self, seen: PromptImage) -> ImageEncoding:
        image = seen.image()
        assert image is not None, "the engine holds a sequence while a step has a row of it"
        return self.encodings.get(image)

    def _crossed_inputs(self, batch: ops.FlatRows, cross: CrossAttention) -> dict[str, Any]:
        """Return the decoder's arguments for a step, and set what its layers of cross-attention see."""
        ids = torch.from_numpy(batch.ids.astype(np.int64))[None].to(self._device)
        positions = torch.from_numpy(batch.positions.astype(np.int64))[None].to(self._device)
        given = {"inputs_embeds": self._embed(ids), "position_ids": positions, "use_cache": False}
        seen: list[Seen] = []
        for first, sequence, at in self._parts(batch):
            if sequence.images:
                starts = [int(each.places[0]) for each in sequence.images]
                encodings = [self._encoding(each) for each in sequence.images]
                seen += seen_in(first, int(at[0]), int(at[-1]) + 1, starts, encodings)
        if seen:
            cross.begin(seen, ids.shape[1], self._device)
            given["cross_attention_states"] = torch.empty(0)  # without any, the decoder skips the layers
        return given

    def _deep_inputs(self, mask: Tensor, deep: list[Tensor]) -> dict[str, Any]:
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
