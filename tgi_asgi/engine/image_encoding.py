"""Images in prompts: which are encoded ahead of the chunks that need them, and where chunks may end.

A chunk ends before the first image that has not been encoded yet. Until it is encoded, steps encode it
alongside the rows of other sequences. Images that every token sees are all encoded before the first chunk.
Called by the scheduler; pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.runner.plan import StepPlan, StepResult
from tgi_asgi.types import Bidirectional, ImageInput

MAX_ENCODE_S = 1.0  # longest that a step spends on encoding: after a longer silence the engine seems hung


@dataclass(frozen=True, slots=True)
class PendingImage:
    """An image that a step encodes, and the sequence that it belongs to."""

    sequence: Sequence
    epoch: int
    index: int  # among the images of its prompt

    @property
    def image(self) -> ImageInput:
        """The image."""
        return self.sequence.images[self.index]


def unencoded_images(sequence: Sequence, end: int) -> list[PendingImage]:
    """Return the images that tokens in [num_computed, end) see and that are not known to be encoded."""
    start = sequence.num_computed
    return [
        PendingImage(sequence, sequence.epoch, index)
        for index, image in enumerate(sequence.images)
        if index >= sequence.num_encoded_images
        and (image.is_seen_by_all or (image.start < end and image.start + image.num_tokens > start))
    ]


def awaits_image(sequence: Sequence) -> bool:
    """Return whether the sequence's next token sees an image that is not known to be encoded."""
    return bool(sequence.images) and bool(unencoded_images(sequence, sequence.num_computed + 1))


def settle(pending: Many[PendingImage], result: StepResult) -> None:
    """Record which images a step has encoded: for each sequence, only a leading run of its images."""
    waiting: set[Sequence] = set()
    for each, is_encoded in zip(pending, result.is_encoded, strict=False):
        sequence = each.sequence
        if not is_encoded:
            waiting.add(sequence)
        elif sequence.epoch == each.epoch and sequence not in waiting:
            sequence.num_encoded_images = max(sequence.num_encoded_images, each.index + 1)


def plan_image_encoding(plan: StepPlan, pending: Many[PendingImage], spare_s: float) -> None:
    """Give a step's images the time that is left, or `MAX_ENCODE_S` if no row of the step samples a token."""
    plan.images = [each.image for each in pending]
    has_samples = any(row.samples for row in plan.rows)
    plan.image_budget_s = min(MAX_ENCODE_S, spare_s) if has_samples else MAX_ENCODE_S


class ChunkBoundaries:
    """Where a prompt may be cut into chunks.

    Cached blocks may end inside an image: they were computed with all of it.

    Args:
        bidirectional: Which parts of a prompt must not be cut; None: nothing is protected.
    """

    def __init__(self, bidirectional: Bidirectional | None) -> None:
        self._bidirectional = bidirectional

    def spans(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Return the token ranges [start, end) that must each be computed in one step."""
        if self._bidirectional is Bidirectional.PROMPT:
            return [(0, sequence.prompt_len)]
        if self._bidirectional is Bidirectional.IMAGES:
            return [(each.start, each.start + each.num_tokens) for each in sequence.images]
        return []

    def end(self, sequence: Sequence, start: int, end: int) -> int:
        """Return where to end a chunk planned to end at `end`: before or after the span that it cuts."""
        for first, stop in self.spans(sequence):
            if first < end < stop:
                return first if first > start else stop
        return end

    def before_images(self, sequence: Sequence, count: int, room: int) -> tuple[int, list[PendingImage]]:
        """Return how many tokens of a chunk can be computed, up to an image that must be encoded first.

        A span that must not be cut is left to the next step if it exceeds `room`. Also returns the images to
        encode.
        """
        start = sequence.num_computed
        end = self.end(sequence, start, start + count)
        pending = unencoded_images(sequence, end)
        if pending:
            first = pending[0].image
            reach = start if first.is_seen_by_all else max(first.start, start)
            end = self.end(sequence, start, reach) if reach > start else start
            if end > reach:
                return 0, pending
        return (end - start if end - start <= room else 0), pending

    def min_step_tokens(self, images: Many[ImageInput], prompt_len: int) -> int:
        """Return the minimum number of the prompt's tokens that a single step must be able to compute."""
        if self._bidirectional is Bidirectional.PROMPT:
            return prompt_len
        sizes = [each.num_tokens for each in images] if self._bidirectional is Bidirectional.IMAGES else []
        return max(sizes, default=0)
