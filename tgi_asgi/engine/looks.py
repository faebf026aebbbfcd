"""Images in prompts: which are encoded ahead of the chunks that need them, and where chunks may end.

A chunk ends before the first image that has not been encoded yet. Until it is encoded, steps carry it as a
view, alongside the rows of other sequences. Called by the scheduler; pure Python.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.runner.plan import StepPlan, StepResult
from tgi_asgi.types import Eyes, ImageInput

ALONE_S = 1.0  # longest that a step spends on encoding: after a longer silence the engine seems hung


@dataclass(frozen=True, slots=True)
class Look:
    """An image that a step encodes, and the sequence that it belongs to."""

    sequence: Sequence
    epoch: int
    index: int  # among the images of its prompt

    @property
    def image(self) -> ImageInput:
        """The image."""
        return self.sequence.request.images[self.index]


def looks_for(sequence: Sequence, end: int) -> list[Look]:
    """Return the images with a token in [num_computed, end) that are not known to be encoded."""
    start = sequence.num_computed
    return [
        Look(sequence, sequence.epoch, index)
        for index, image in enumerate(sequence.request.images)
        if index >= sequence.num_seen and image.start < end and image.start + image.num_tokens > start
    ]


def is_looking(sequence: Sequence) -> bool:
    """Return whether the sequence's next token belongs to an image that is not known to be encoded."""
    return bool(sequence.request.images) and bool(looks_for(sequence, sequence.num_computed + 1))


def settle(looks: Many[Look], result: StepResult) -> None:
    """Record which images a step has encoded: for each sequence, only a leading run of its images."""
    waiting: set[Sequence] = set()
    for look, is_viewed in zip(looks, result.is_viewed, strict=False):
        sequence = look.sequence
        if not is_viewed:
            waiting.add(sequence)
        elif sequence.epoch == look.epoch and sequence not in waiting:
            sequence.num_seen = max(sequence.num_seen, look.index + 1)


def plan_views(plan: StepPlan, looks: Many[Look], room_s: Callable[[], float]) -> None:
    """Give a step's images the time that is left, or `ALONE_S` if no row of the step samples a token."""
    plan.views = [look.image for look in looks]
    plan.view_s = min(room_s(), ALONE_S) if any(row.samples for row in plan.rows) else ALONE_S


class Cuts:
    """Where a prompt may be cut into chunks.

    Cached blocks may end inside an image: they were computed with all of it.

    Args:
        eyes: Which parts of a prompt must not be cut; None: nothing is protected.
    """

    def __init__(self, eyes: Eyes | None) -> None:
        self._eyes = eyes

    def spans(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Return the token ranges [start, end) that must each be computed in one step."""
        if self._eyes is Eyes.PROMPT:
            return [(0, sequence.prompt_len)]
        if self._eyes is Eyes.IMAGES:
            return [(each.start, each.start + each.num_tokens) for each in sequence.request.images]
        return []

    def end(self, sequence: Sequence, start: int, end: int) -> int:
        """Return where to end a chunk planned to end at `end`: before or after the span that it cuts."""
        for first, stop in self.spans(sequence):
            if first < end < stop:
                return first if first > start else stop
        return end

    def before_images(self, sequence: Sequence, count: int, room: int) -> tuple[int, list[Look]]:
        """Return how many tokens of a chunk can be computed, up to an image that must be encoded first.

        A span that must not be cut is left to the next step if it exceeds `room`. Also returns the images to
        encode.
        """
        start = sequence.num_computed
        end = self.end(sequence, start, start + count)
        looks = looks_for(sequence, end)
        if looks:
            reach = max(looks[0].image.start, start)
            end = self.end(sequence, start, reach) if reach > start else start
            if end > reach:
                return 0, looks
        return (end - start if end - start <= room else 0), looks

    def longest(self, images: Many[ImageInput], prompt_len: int) -> int:
        """Return the least number of the prompt's tokens that a single step must be able to compute."""
        if self._eyes is Eyes.PROMPT:
            return prompt_len
        sizes = [each.num_tokens for each in images] if self._eyes is Eyes.IMAGES else []
        return max(sizes, default=0)
