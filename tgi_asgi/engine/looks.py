"""Images in prompts: which are encoded ahead of the chunks that need them, and where chunks may end.

A chunk ends before the first image that is not encoded yet; until it is, steps carry it as a view, beside the
rows of others. Called by the scheduler; pure Python.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.runner.plan import StepPlan, StepResult
from tgi_asgi.types import Eyes, ImageInput

ALONE_S = 1.0  # what a step encodes while nobody decodes: an engine that hears of nothing longer seems hung


@dataclass(frozen=True, slots=True)
class Look:
    """An image that a step encodes, and whose it is."""

    sequence: Sequence
    epoch: int
    index: int  # among the images of its prompt

    @property
    def image(self) -> ImageInput:
        """The image."""
        return self.sequence.request.images[self.index]


def looks_for(sequence: Sequence, end: int) -> list[Look]:
    """Return the images that are not known to be encoded of those with a token in [num_computed, end)."""
    start = sequence.num_computed
    return [
        Look(sequence, sequence.epoch, index)
        for index, image in enumerate(sequence.request.images)
        if index >= sequence.num_seen and image.start < end and image.start + image.num_tokens > start
    ]


def is_looking(sequence: Sequence) -> bool:
    """Tell whether the next token of a sequence is an image's that is not known to be encoded."""
    return bool(sequence.request.images) and bool(looks_for(sequence, sequence.num_computed + 1))


def settle(looks: Many[Look], result: StepResult) -> None:
    """Learn which images a step has encoded: of each sequence the first ones."""
    waiting: set[Sequence] = set()
    for look, is_viewed in zip(looks, result.is_viewed, strict=False):
        sequence = look.sequence
        if not is_viewed:
            waiting.add(sequence)
        elif sequence.epoch == look.epoch and sequence not in waiting:
            sequence.num_seen = max(sequence.num_seen, look.index + 1)


def plan_views(plan: StepPlan, looks: Many[Look], room_s: Callable[[], float]) -> None:
    """Give the images of a step the time that there is; most of all where no token waits for its end."""
    plan.views = [look.image for look in looks]
    plan.view_s = min(room_s(), ALONE_S) if any(row.samples for row in plan.rows) else ALONE_S


class Cuts:
    """Where a prompt may be cut into chunks.

    Cached blocks with the beginning of an image can be taken: they were computed with all of it.

    Args:
        eyes: what must not be cut; None: nothing.
    """

    def __init__(self, eyes: Eyes | None) -> None:
        self._eyes = eyes

    def spans(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Return what must be computed in one step: [start, end) of the tokens."""
        if self._eyes is Eyes.PROMPT:
            return [(0, sequence.prompt_len)]
        if self._eyes is Eyes.IMAGES:
            return [(each.start, each.start + each.num_tokens) for each in sequence.request.images]
        return []

    def end(self, sequence: Sequence, start: int, end: int) -> int:
        """Return where a chunk ends that would end here: before what it would cut, or behind it."""
        for first, stop in self.spans(sequence):
            if first < end < stop:
                return first if first > start else stop
        return end

    def before_images(self, sequence: Sequence, count: int, room: int) -> tuple[int, list[Look]]:
        """Return how many tokens of a chunk can be computed: up to an image that is to be encoded first.

        What must not be cut is left to the next step where it is more than `room`. Also returns what is to be
        encoded.
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
        """Return how many tokens of a prompt a step must compute at the least."""
        if self._eyes is Eyes.PROMPT:
            return prompt_len
        sizes = [each.num_tokens for each in images] if self._eyes is Eyes.IMAGES else []
        return max(sizes, default=0)
