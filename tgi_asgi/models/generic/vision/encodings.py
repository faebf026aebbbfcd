"""Image encodings, cached by image digest: an image that returns in a later turn is not encoded again."""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from tgi_asgi.models.generic.vision.tower import ImageEncoding, Tower
from tgi_asgi.types import ImageInput

logger = logging.getLogger(__name__)

Key = tuple[bytes, int]


class EncodingCache:
    """Encodes images, a few pieces at a time or at once, and caches the latest encodings.

    Encodings of images that every token sees are needed in each step, so they are held in addition until
    their requests have ended: the first step after that frees them.

    Args:
        max_bytes: Maximum bytes of the cache; the latest encoding is kept whatever its size.
    """

    def __init__(self, tower: Tower, max_bytes: int) -> None:
        self._tower, self._max_bytes = tower, max_bytes
        self._cache: OrderedDict[Key, ImageEncoding] = OrderedDict()
        self._num_bytes = 0
        self._held: dict[int, tuple[weakref.ref[ImageInput], ImageEncoding]] = {}  # by id of the image
        self._known: weakref.WeakValueDictionary[Key, ImageEncoding] = weakref.WeakValueDictionary()
        self._in_progress: Key | None = None
        self._wanted_by: weakref.ref[ImageInput] | None = None  # request image of the encoding under way
        self._failed: OrderedDict[Key, None] = OrderedDict()

    def advance(self, images: Sequence[ImageInput], seconds: float) -> list[bool]:
        """Encode images in turn until the time is up, at least one piece; return which need no more of this.

        An image that fails needs no more: `get` will raise its error. Call this in every step, even without
        images, so that a partial encoding that no request needs any more is released.
        """
        self._held = {key: held for key, held in self._held.items() if held[0]() is not None}
        is_unwanted = self._wanted_by is not None and self._wanted_by() is None
        if is_unwanted and self._in_progress not in [key_of(image) for image in images]:
            self._end()
        for image in images:  # first, because what is encoded now may replace them in the cache
            if (encoding := self._known.get(key_of(image))) is not None:
                self._hold(image, encoding)
        ends_at = time.monotonic() + seconds
        for image in images:
            if self._is_done(image):
                continue
            self._resume(image, max(ends_at - time.monotonic(), 0.0))
            # The tower holds one partial encoding; starting the next image would discard it.
            if not self._is_done(image) or time.monotonic() >= ends_at:
                break
        return [self._is_done(image) for image in images]

    @property
    def is_encoding(self) -> bool:
        """Whether a partial encoding is held."""
        return self._in_progress is not None

    def get(self, image: ImageInput) -> ImageEncoding:
        """Return the encoding of an image, which is computed at once if it is not cached.

        Raises:
            Exception: if the tower raises it.
        """
        key = key_of(image)
        encoding = self._known.get(key)
        if encoding is None:
            logger.debug("an image is encoded within a step")
            self._end()
            encoding = self._tower.encode(_inputs(image))
            self._keep(key, encoding)
        if key in self._cache:
            self._cache.move_to_end(key)
        self._hold(image, encoding)
        return encoding

    def _hold(self, image: ImageInput, encoding: ImageEncoding) -> None:
        """Keep an encoding for a request, if each of its steps needs it."""
        if image.is_seen_by_all:
            self._held[id(image)] = weakref.ref(image), encoding

    def _is_done(self, image: ImageInput) -> bool:
        key = key_of(image)
        return key in self._known or key in self._failed

    def _resume(self, image: ImageInput, seconds: float) -> None:
        key = key_of(image)
        self._wanted_by = weakref.ref(image)
        try:
            if self._in_progress != key:
                self._in_progress = key
                self._tower.begin(_inputs(image))
            encoding = self._tower.resume(seconds)
        except Exception:  # the tower's error fails the image's own request when its rows are due
            logger.exception("an image could not be encoded")
            self._end()
            self._failed[key] = None
            if len(self._failed) > 100:
                self._failed.popitem(last=False)
            return
        if encoding is not None:
            self._end()
            self._keep(key, encoding)
            self._hold(image, encoding)

    def _end(self) -> None:
        """Release the partial encoding."""
        self._in_progress = self._wanted_by = None
        self._tower.forget()

    def _keep(self, key: Key, encoding: ImageEncoding) -> None:
        self._failed.pop(key, None)
        self._cache[key] = self._known[key] = encoding
        self._num_bytes += encoding.num_bytes
        while self._num_bytes > self._max_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._num_bytes -= oldest.num_bytes


def key_of(image: ImageInput) -> Key:
    """Return the cache key of an image: some models encode it differently if it is one of several."""
    return image.digest, image.num_tokens


def _inputs(image: ImageInput) -> dict[str, Any]:
    inputs: dict[str, Any] = image.payload
    return inputs
