"""What the decoder of a vision model receives in a step: rows instead of ids, and positions.

Used by the programs of modules. `RunningImages` knows which images the running sequences have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.models.generic.vision.running_images import Part, RunningImages, axes_of
from tgi_asgi.models.generic.vision.text import (
    VisionTraits,
    decoder_of,
    layer_inputs,
    takes_token_ids,
    token_rows,
)


class DecoderInputs:
    """Makes the decoder's arguments for the tokens of a step."""

    def __init__(self, model: Any, traits: VisionTraits, images: RunningImages, device: torch.device) -> None:
        self._traits, self._images, self._device = traits, images, device
        self._decoder, self._embed = decoder_of(model), model.get_input_embeddings()
        self._takes_ids = takes_token_ids(self._decoder)
        self._marks: Tensor | None = None
        with torch.inference_mode():
            others = token_rows(model, device)
            if others is not None:
                ids, self._rows = others
                self._marks, order = ids.sort()
                self._rows = self._rows[order]

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
        seen = self._images.rows(parts)
        places = np.concatenate(seen.places) if seen.places else np.empty(0, np.int64)
        at = torch.from_numpy(places).to(self._device)
        ids[at] = self._traits.pad_token_id
        embeds = self._embed(ids[None]).clone()
        if self._marks is not None:
            near = torch.searchsorted(self._marks, ids).clamp(max=len(self._marks) - 1)
            embeds[0] = torch.where((self._marks[near] == ids)[:, None], self._rows[near], embeds[0])
        if seen.rows:
            embeds[0, at] = torch.cat(seen.rows)
        flat = axes_of(parts, self._traits.num_axes) + self._traits.first_position
        flat = flat.to(self._device)
        given["inputs_embeds"] = embeds
        given["position_ids"] = flat[:, None] if self._traits.has_axes else flat[:1]
        if self._traits.has_layer_inputs:
            given["per_layer_inputs"] = layer_inputs(self._decoder, ids[None])
        if seen.deep and seen.deep[0]:
            mask = torch.zeros(1, len(ids), dtype=torch.bool, device=self._device)
            mask[0, at] = True
            given |= self._deep(mask, [torch.cat(layer) for layer in zip(*seen.deep, strict=True)])
        return given

    def _deep(self, mask: Tensor, deep: list[Tensor]) -> dict[str, Any]:
        """Return the decoder's arguments for images' deep rows at the positions of a mask [1, n_tokens]."""
        if self._traits.deep_layers:
            features = dict(zip(self._traits.deep_layers, deep, strict=True))
            return {"vision_mask": mask[..., None], "deepstack_features": features}
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": deep}
