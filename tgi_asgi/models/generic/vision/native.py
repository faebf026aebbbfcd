"""A native family's program that reads images: steps bring their rows and positions, the rest is as for text.

The tower is the code of `transformers`, as for any vision model. Most steps have no token of an image, and
run without Python: the extension knows by how much images have moved the positions of the tokens after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Model, record
from tgi_asgi.models.generic.vision.encodings import EncodingCache
from tgi_asgi.models.generic.vision.native_text import NativeText
from tgi_asgi.models.generic.vision.program import ImageProgram
from tgi_asgi.models.generic.vision.running_images import Part, RunningImages, SeenRows, axes_of
from tgi_asgi.models.generic.vision.text import Lookahead
from tgi_asgi.models.generic.vision.tower import Tower
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.types import ImageInput

Ints = npt.NDArray[np.int64]


class NativeImages:
    """How a native model reads images.

    Args:
        module: The model of `transformers`, without weights of its decoder.
        text: What is known of its text model.
        model: The text model.

    Attributes:
        tower: The vision tower.
    """

    def __init__(self, module: Any, tower: Tower, text: NativeText, model: Decoder) -> None:
        self.tower = tower
        self._module, self._traits, self._axis_of = module, text.traits, text.axis_of
        self._factor, self._rope = text.rows_factor, model.turns_by

    def program(
        self, model: Model, caches: Sequence[ops.Cache], states: Sequence[ops.StateLayer],
        limits: ops.StepLimits, *, adapters: ops.AdapterLayout | None, image_cache: int,
    ) -> NativeVisionProgram:  # fmt: skip
        """Return the program that runs a model's steps; `image_cache` is that of `make_program`."""
        images = self.running(image_cache)
        return NativeVisionProgram(record(model, caches, states), limits, self, images, adapters)

    def running(self, image_cache: int) -> RunningImages:
        """Return a table of the images that sequences have, with a cache of so many bytes of encodings."""
        return RunningImages(self._module, self._traits, EncodingCache(self.tower, image_cache))

    @property
    def lookahead(self) -> Lookahead:
        """Which tokens see later ones."""
        return self._traits.lookahead

    def bring(self, images: RunningImages, batch: ops.FlatRows) -> None:
        """Add to a step what it has of images; nothing if it has no token of a prompt with images."""
        parts = images.parts(batch)
        if not any(
            sequence.images and positions[0] < sequence.num_prompt for _, sequence, positions in parts
        ):
            return
        seen = images.rows(parts)
        tokens = np.concatenate(seen.places) if seen.places else np.empty(0, np.int64)
        rows = ops.ImageRows(
            tokens, self.levels(seen).numpy(), **self.rotary(parts), visible_until=self._ends(parts)
        )
        batch.set_images(rows.native, self._traits.pad_token_id)

    def levels(self, seen: SeenRows) -> Tensor:
        """Return images' rows [levels, n, hidden], those of the first level times a factor."""
        if not seen.rows:
            return torch.empty(1, 0, 0)
        levels = [torch.cat(list(each)) for each in (seen.rows, *zip(*seen.deep, strict=True))]
        if self._factor != 1:
            levels[0] = levels[0] * self._factor
        return torch.stack(levels)

    def rotary(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Return where tokens are in the rotary table; those on several axes get rows of their own.

        The result is empty if positions have one axis, else as the arguments of `ops.ImageRows`.
        """
        if self._axis_of is None or self._rope is None:
            return {}
        axes = axes_of(parts, self._traits.num_axes).numpy()
        rotary = axes[0].copy()
        own = np.flatnonzero((axes != axes[0]).any(axis=0))
        rotary[own] = -1 - np.arange(len(own))
        places, pairs = axes[self._axis_of][:, own].T, np.arange(len(self._axis_of))
        cosines, sines = (table[places, pairs] for table in (self._rope.cos, self._rope.sin))
        return {"rotary": rotary, "cosines": cosines, "sines": sines}

    def _ends(self, parts: Sequence[Part]) -> Ints:
        """Return where the range ends that each token sees; empty if no token sees a later one."""
        if self.lookahead is Lookahead.NOTHING:
            return np.empty(0, np.int64)
        return np.concatenate([sequence.ends(self.lookahead, at) for _, sequence, at in parts])


class NativeVisionProgram(ImageProgram, ops.CpuProgram):
    """Steps of a native family, with images' rows in place of their tokens."""

    def __init__(
        self, recorder: ops.Recorder, limits: ops.StepLimits, parts: NativeImages, images: RunningImages,
        adapters: ops.AdapterLayout | None,
    ) -> None:  # fmt: skip
        super().__init__(recorder, limits, adapters=adapters)
        self._parts, self._images = parts, images

    def start(self, slot: int, prompt_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Assign a slot to a sequence with these images."""
        found = self._images.start(slot, prompt_ids, images)
        self.native.set_rotary_shift(slot, found.delta)

    def run(self, batch: ops.FlatRows, rows: Iterable[int]) -> Floats:
        """Compute a step; see `CpuProgram.run`."""
        self._parts.bring(self._images, batch)
        return super().run(batch, rows)

    def run_and_sample(
        self,
        batch: ops.FlatRows,
        rows: Sequence[int],
        slots: Sequence[int],
        state: ops.SampleState,
        mask: npt.NDArray[np.int32] | None = None,
        drafts: Sequence[int] = (),
    ) -> ops.SampleResult:
        """Compute a step and sample; see `CpuProgram.run_and_sample`."""
        self._parts.bring(self._images, batch)
        return super().run_and_sample(batch, rows, slots, state, mask, drafts)
