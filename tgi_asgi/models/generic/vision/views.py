"""What the tower made of pictures, kept by their digests: one in the second turn is not encoded again."""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from tgi_asgi.models.generic.vision.tower import Tower, View
from tgi_asgi.types import ImageInput

logger = logging.getLogger(__name__)

Key = tuple[bytes, int]


class Views:
    """Encodes pictures, a few pieces at a time or at once, and keeps the last ones.

    Args:
        max_bytes: of what is kept; the last view is, whatever its size.

    Attributes:
        num_encoded: pictures that the tower has run for.
    """

    def __init__(self, tower: Tower, max_bytes: int) -> None:
        self._tower, self._max_bytes = tower, max_bytes
        self._kept: OrderedDict[Key, View] = OrderedDict()
        self._num_bytes = 0
        self._under_way: Key | None = None
        self._wanted_by: weakref.ref[ImageInput] | None = None  # of a request: the one under way
        self._failed: OrderedDict[Key, None] = OrderedDict()
        self.num_encoded = 0

    def advance(self, images: Sequence[ImageInput], seconds: float) -> list[bool]:
        """Encode in turn until time is up, one piece at least; tell which need no more of this.

        One that fails needs no more: `get` will raise what it did. To be called in every step, also for no
        images: then what is known of one that nobody waits for any more is let go of.
        """
        is_unwanted = self._wanted_by is not None and self._wanted_by() is None
        if is_unwanted and self._under_way not in [key_of(image) for image in images]:
            self._end()
        ends_at = time.monotonic() + seconds
        for image in images:
            if self._is_done(image):
                continue
            self._go_on(image, max(ends_at - time.monotonic(), 0.0))
            # The tower has one under way: to begin the next would be to forget this one.
            if not self._is_done(image) or time.monotonic() >= ends_at:
                break
        return [self._is_done(image) for image in images]

    def get(self, image: ImageInput) -> View:
        """Return what the tower makes of a picture, which is encoded at once if it is not kept.

        Raises:
            Exception: whatever the tower does.
        """
        key = key_of(image)
        view = self._kept.get(key)
        if view is None:
            logger.debug("an image is encoded within a step")
            self._end()
            self.num_encoded += 1
            view = self._tower.encode(_inputs(image))
            self._keep(key, view)
        self._kept.move_to_end(key)
        return view

    def _is_done(self, image: ImageInput) -> bool:
        key = key_of(image)
        return key in self._kept or key in self._failed

    def _go_on(self, image: ImageInput, seconds: float) -> None:
        key = key_of(image)
        self._wanted_by = weakref.ref(image)
        try:
            if self._under_way != key:
                self._under_way = key
                self.num_encoded += 1
                self._tower.begin(_inputs(image))
            view = self._tower.go_on(seconds)
        except Exception:  # a picture that the tower cannot take fails its own request, when its rows are due
            logger.exception("an image could not be encoded")
            self._end()
            self._failed[key] = None
            if len(self._failed) > 100:
                self._failed.popitem(last=False)
            return
        if view is not None:
            self._end()
            self._keep(key, view)

    def _end(self) -> None:
        """Let go of all that is known of the picture under way."""
        self._under_way = self._wanted_by = None
        self._tower.forget()

    def _keep(self, key: Key, view: View) -> None:
        self._failed.pop(key, None)
        self._kept[key] = view
        self._num_bytes += view.num_bytes
        while self._num_bytes > self._max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.num_bytes


def key_of(image: ImageInput) -> Key:
    """Return what names a picture's view: some models see it otherwise where it is one of several."""
    return image.digest, image.num_tokens


def _inputs(image: ImageInput) -> dict[str, Any]:
    inputs: dict[str, Any] = image.payload
    return inputs
