"""Steps of a vision model: like those of any module, except that its decoder receives rows instead of ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.generic.attention import PagedLayers
from tgi_asgi.models.generic.delta_nets import NativeStates
from tgi_asgi.models.generic.modules import Head, Mode
from tgi_asgi.models.generic.program import GenericProgram, SequentialProgram
from tgi_asgi.models.generic.recurrent import RecurrentLayers
from tgi_asgi.models.generic.vision.cross_attention import CrossAttention, Seen, seen_in
from tgi_asgi.models.generic.vision.decoder_inputs import DecoderInputs
from tgi_asgi.models.generic.vision.encodings import EncodingCache
from tgi_asgi.models.generic.vision.running_images import RunningImages
from tgi_asgi.models.generic.vision.text import DecoderOutput, Lookahead, VisionTraits, decoder_of
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.types import Bidirectional, ImageInput


class ImageProgram:
    """What programs have in common whose sequences have images."""

    _images: RunningImages

    @property
    def bidirectional(self) -> Bidirectional:
        """Which parts of a prompt must be in one step."""
        return self._images.bidirectional

    @property
    def is_encoding(self) -> bool:
        """Whether an image is partly encoded."""
        return self.encodings.is_encoding

    @property
    def encodings(self) -> EncodingCache:
        """The cache of image encodings."""
        return self._images.encodings

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with these images."""
        self._images.start(slot, prompt_ids, images)

    def advance(self, images: Sequence[ImageInput], seconds: float) -> tuple[list[bool], float]:
        """Encode images before the steps that need them; see `RunningImages.advance`."""
        return self._images.advance(images, seconds)


class VisionProgram(ImageProgram, GenericProgram):
    """All sequences of a step in one call of the decoder, with images' rows in place of their tokens."""

    def __init__(
        self, model: Any, head: Head, layers: PagedLayers, recurrent: RecurrentLayers | None,
        traits: VisionTraits, encodings: EncodingCache, *, vocab_size: int, mode: Mode,
        native_states: NativeStates | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            model, head, layers, recurrent, vocab_size=vocab_size, first_position=traits.first_position,
            decode=self._decode, mode=mode, native_states=native_states,
        )  # fmt: skip
        self._traits, self._decoder, self._embed = traits, decoder_of(model), model.get_input_embeddings()
        self._images = RunningImages(model, traits, encodings)
        self._decoder_inputs = DecoderInputs(model, traits, self._images, self._device)
        self._inputs: dict[str, Any] = {}
        self._cross = CrossAttention(self._decoder) if traits.has_cross_attention else None

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; see `GenericProgram.run`."""
        with torch.inference_mode():
            if self._cross is None:
                self._inputs = self._decoder_inputs.of(batch.ids, self._images.parts(batch))
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
                for _, sequence, positions in self._images.parts(batch)
            ])  # fmt: skip
            in_windows = self._traits.lookahead is Lookahead.IMAGES_IN_WINDOWS
            self._layers.look_ahead(batch, torch.from_numpy(ends.astype(np.int32)), in_windows=in_windows)

    def _decode(self, *_: Any, **__: Any) -> DecoderOutput:
        """Replace the part of the model that contains the tower and the decoder."""
        return DecoderOutput(self._decoder(**self._inputs).last_hidden_state)

    def _crossed_inputs(self, batch: ops.FlatRows, cross: CrossAttention) -> dict[str, Any]:
        """Return the decoder's arguments for a step, and set what its layers of cross-attention see."""
        ids = torch.from_numpy(batch.ids.astype(np.int64))[None].to(self._device)
        positions = torch.from_numpy(batch.positions.astype(np.int64))[None].to(self._device)
        given = {"inputs_embeds": self._embed(ids), "position_ids": positions, "use_cache": False}
        seen: list[Seen] = []
        for first, sequence, at in self._images.parts(batch):
            if sequence.images:
                starts = [int(each.places[0]) for each in sequence.images]
                encodings = [self._images.encoding(each) for each in sequence.images]
                seen += seen_in(first, int(at[0]), int(at[-1]) + 1, starts, encodings)
        if seen:
            cross.begin(seen, ids.shape[1], self._device)
            given["cross_attention_states"] = torch.empty(0)  # without any, the decoder skips the layers
        return given


class SequentialVisionProgram(ImageProgram, SequentialProgram):
    """One sequence after the other, on the model's own cache, with images' rows in place of their tokens."""

    def __init__(
        self, model: Any, head: Head, traits: VisionTraits, encodings: EncodingCache, *, vocab_size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(model, head, vocab_size=vocab_size, device=device, decode=self._decode)
        self._decoder = decoder_of(model)
        self._images = RunningImages(model, traits, encodings)
        self._decoder_inputs = DecoderInputs(model, traits, self._images, device)
        self._inputs: dict[str, Any] = {}

    def _compute(
        self, rows: list[int], batch: ops.FlatRows, index: int, inputs: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        kept = {name: value for name, value in inputs.items() if name != "input_ids"}
        first, sequence, positions = self._images.parts(batch)[index]
        ids = batch.ids[first : first + len(positions)]
        self._inputs = self._decoder_inputs.of(ids, [(0, sequence, positions)]) | kept
        return super()._compute(rows, batch, index, inputs)

    def _decode(self, *_: Any, **__: Any) -> DecoderOutput:
        """Replace the part of the model that contains the tower and the decoder."""
        output = self._decoder(**self._inputs)
        return DecoderOutput(output.last_hidden_state, output)
