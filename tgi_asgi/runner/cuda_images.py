"""The images of a CUDA runner's sequences: their encodings, and what a step needs of them.

    between steps   the tower encodes images on the runner's stream, so that later steps can use the rows
    a step          rows in place of tokens; positions of its tokens in the rotary tables

Called by `CudaRunner`, on the thread that launches steps. A step with a prompt's images is launched call by
call; all others replay graphs, whose inputs have the right positions already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.cuda import CudaProgram
from tgi_asgi.ops.cuda_batch import CudaImageRows
from tgi_asgi.runner.cuda_drafts import DraftedRows
from tgi_asgi.runner.cuda_follower import StepImages
from tgi_asgi.runner.cuda_layout import StepLayout
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.types import Bidirectional

if TYPE_CHECKING:  # imports transformers
    from tgi_asgi.models.generic.vision.native import NativeImages
    from tgi_asgi.models.generic.vision.running_images import Part


class CudaImages:
    """Encodes images, and brings their rows to the steps of a program.

    Args:
        reader: Has the tower, and knows where the text model has its images' tokens.
        image_cache: Bytes of encoded images to keep on the device.
        num_slots: Number of slots, those of drafts included.
        share: Tells other shards what a step has of images, and gives them its rows; None: there are none.

    Attributes:
        bidirectional: Which parts of a prompt must be in one step.
    """

    bidirectional = Bidirectional.NOTHING

    def __init__(
        self, reader: NativeImages, program: CudaProgram, *, image_cache: int, num_slots: int,
        share: Callable[[StepImages, Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self._reader, self._program, self._share = reader, program, share
        self._images = reader.running(image_cache)
        self._shifts = np.zeros(num_slots, np.int32)  # added to positions after a prompt with images
        self._ends = [0] * num_slots  # the end of each slot's prompt, if it has images

    @property
    def is_encoding(self) -> bool:
        """Whether an image is encoded in part."""
        return self._images.is_encoding

    def start(self, start: SlotStart) -> None:
        """Assign a slot to a sequence with these images."""
        found = self._images.start(start.slot, start.prompt_ids, start.images)
        self._shifts[start.slot] = found.delta
        self._ends[start.slot] = found.num_prompt if found.images else 0

    def are_in(self, rows: Iterable[StepRow]) -> bool:
        """Return whether a row has tokens of a prompt with images."""
        ends = self._ends
        return any(row.start < ends[row.slot] for row in rows)

    def place(
        self, rows: Sequence[StepRow], drafted: DraftedRows | None, layout: StepLayout,
        inputs: npt.NDArray[np.uint8],
    ) -> CudaImageRows | None:  # fmt: skip
        """Write the tokens' places in the rotary tables; return the step's rows of images, if it has any.

        Args:
            drafted: Has the slots of rows that are drafts.
            inputs: The step's inputs, whose positions are the tokens' own.
        """
        slots = [row.slot for row in rows] if drafted is None else drafted.slots
        positions = layout.shape.sections.arrays(inputs)["positions"]
        shifts, decodes = self._shifts[slots], layout.rows.num_decodes
        positions[:decodes] += shifts[:decodes]
        for index in range(decodes, len(rows)):
            end = layout.end(index)
            positions[end - rows[index].num_tokens : end] += shifts[index]
        parts: list[Part] = []
        for index, row in enumerate(rows):
            if row.start < self._ends[row.slot]:
                own = np.arange(row.start, row.start + row.num_tokens)
                parts.append((layout.end(index) - len(own), self._images.of(row.slot), own))
        if not parts:
            return None
        cosines, sines = self._turn(parts, positions)
        seen, device = self._images.rows(parts), self._program.device
        tokens = np.concatenate(seen.places) if seen.places else np.empty(0, np.int64)
        found = self._reader.levels(seen).to(device, torch.float32)
        on_device = torch.from_numpy(tokens).to(device, non_blocking=True)
        # Last, after all that may lack memory: the others keep what they get for the next step that they run.
        if self._share is not None:
            self._share(StepImages(tokens, tuple(found.shape), cosines, sines), found)
        return CudaImageRows(on_device, found) if seen.places else None

    def _turn(
        self, parts: Sequence[Part], positions: npt.NDArray[Any]
    ) -> tuple[Floats, Floats] | tuple[None, None]:
        """Write the places of tokens whose positions have several axes; return their angles.

        Each of them has a row of the rotary table that only this step has.
        """
        turns, angles = self._reader.rotary(parts), self._program.own_angles
        if not turns or angles is None:
            return None, None
        cosines, sines, rotary = turns["cosines"], turns["sines"], turns["rotary"]
        first = angles.write(cosines, sines)
        tokens = np.concatenate([np.arange(at, at + len(own)) for at, _, own in parts])
        positions[tokens] = np.where(rotary < 0, first - 1 - rotary, rotary)
        return cosines, sines

    def advance(self, plan: StepPlan, result: StepResult) -> None:
        """Encode images before the steps that need them, as the plan asks, once the step has ended.

        What the tower takes would otherwise include the rest of the step, which the engine measures, too.
        """
        if plan.images:
            self._reader.tower.backend.wait()
        result.is_encoded, result.image_s = self._images.advance(plan.images, plan.image_budget_s)
