"""Steps that need no Python once they are submitted, as most of streams: rows alone, in a graph's shape.

    event loop   rows ─► inputs in pinned memory, commands ─► queue         with the GIL, which it has anyway
    launcher             upload, graphs, results' copy, event               without
    waiter               the event, results ─► queue                        without

Other steps wait for the GIL in both threads, each time for up to a millisecond while the event loop is busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tgi_asgi.ops import DeviceQueue, DeviceRows
from tgi_asgi.runner.cuda_buffers import result_firsts
from tgi_asgi.runner.cuda_device import Command, Device, Event
from tgi_asgi.runner.cuda_images import CudaImages
from tgi_asgi.runner.cuda_layout import graph_layout
from tgi_asgi.runner.cuda_sampler import CudaSampler, SampleStaging
from tgi_asgi.runner.cuda_steps import CudaSteps
from tgi_asgi.runner.handoff import PendingStep
from tgi_asgi.runner.plan import SlotStart, StepPlan


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Pinned memory for a step in flight, and the event that it has ended."""

    inputs: Tensor  # [n_bytes] uint8
    array: npt.NDArray[np.uint8]  # the same memory
    sampling: SampleStaging
    event: Event


class PreparedSteps:
    """Prepares steps, on the event loop.

        if not prepared.push(step):        # queued for the launcher otherwise
            queue.push(step.number)
        prepared.start(plan.starts)        # as soon as the plan is submitted

    What slots have is known here before the launcher starts them, hence its own rows and sets of slots.

    Args:
        memories: By the places of steps in flight.
        rows: Used by nothing else.
        images: Those of the runner's sequences, if its model accepts any.
    """

    def __init__(
        self, queue: DeviceQueue, steps: CudaSteps, sampler: CudaSampler, device: Device,
        memories: Sequence[StepMemory], rows: DeviceRows, images: CudaImages | None,
    ) -> None:  # fmt: skip
        self._queue, self._steps, self._sampler, self._device = queue, steps, sampler, device
        self._memories, self._rows, self._images = memories, rows, images
        self._constrained: set[int] = set()  # slots with a grammar
        self._seeing: set[int] = set()  # slots with images
        self._listing: set[int] = set()  # slots that request the most probable tokens
        self._was_encoding = False  # whether the last plan had images to encode

    def start(self, plan: StepPlan) -> None:
        """Note the slots that a submitted plan starts."""
        self._was_encoding = bool(plan.images)
        for start in plan.starts:
            self._rows.start(start.slot, len(start.prompt_ids))
            self._put(start)

    def _put(self, start: SlotStart) -> None:
        for slots, is_in in (
            (self._constrained, start.grammar is not None),
            (self._seeing, bool(start.images)),
            (self._listing, bool(start.sampling.logprobs)),
        ):
            (slots.add if is_in else slots.discard)(start.slot)

    def push(self, step: PendingStep) -> bool:
        """Queue a step with its inputs written and its commands prepared; return False if it needs Python.

        Raises:
            PlanError: if a row names something that does not exist.
        """
        plan, rows = step.plan, self._rows
        if plan.starts or plan.copies or plan.images or not plan.rows or self._is_encoding():
            return False
        special = self._constrained | self._seeing if self._seeing else self._constrained
        if special and any(row.slot in special for row in plan.rows):
            return False
        rows.read(plan.rows)
        if rows.has_stops or rows.has_vectors or rows.is_scored or rows.has_adapters:
            return False
        padded = self._steps.padded(rows.num_decodes, rows.prompt_lens)
        if padded is None:
            return False
        shape = graph_layout(padded, rows).shape
        memory = self._memories[step.place]
        rows.write(memory.array, shape.sections.firsts, shape.sizes, None, (), ())
        is_listing = bool(self._listing) and not self._listing.isdisjoint(rows.sampling_slots)
        samples = self._sampler.samples(shape.num_rows, memory.sampling, is_listing=is_listing)
        graphs = self._steps.graphs_of(shape)
        commands: list[Command] = [
            self._steps.copy(shape, memory.inputs), graphs.forward, graphs.sample, samples.copy,
            memory.event,
        ]  # fmt: skip
        prepared = self._device.prepared(commands)
        self._queue.push_prepared(
            step.number, prepared.address, prepared, rows, shape.num_decodes, memory.sampling.array,
            result_firsts(shape.num_rows, samples.max_top), shape.num_rows, samples.max_top,
        )  # fmt: skip
        return True

    def _is_encoding(self) -> bool:
        """Return whether an image is being encoded, or may be by a step in flight.

        Then each step must run Python, which also frees encodings that no request needs any more.
        """
        return self._was_encoding or (self._images is not None and self._images.is_encoding)
