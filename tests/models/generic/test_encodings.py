"""Which picture the vision encoder works on, what is kept of it, and for how long."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tgi_asgi.models.generic.vision.encodings import EncodingCache
from tgi_asgi.models.generic.vision.tower import ImageEncoding
from tgi_asgi.types import ImageInput

LONG_S = 1000.0


class ScriptedTower:
    """A tower that pauses once in each picture, as if the next piece would be late; some pictures fail."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.broken: set[str] = set()
        self.inputs: Mapping[str, Any] = {}
        self._is_known = False

    def begin(self, inputs: Mapping[str, Any]) -> None:
        self.inputs, self._is_known = inputs, False
        self.begun.append(inputs["name"])

    def resume(self, seconds: float | None) -> ImageEncoding | None:
        if self.inputs["name"] in self.broken:
            raise MemoryError
        is_known, self._is_known = self._is_known, True
        return ImageEncoding(torch.zeros(3, 2)) if is_known or seconds is None else None

    def encode(self, inputs: Mapping[str, Any]) -> ImageEncoding:
        self.begin(inputs)
        view = self.resume(None)
        assert view is not None
        return view

    def forget(self) -> None:
        self.inputs = {}


@pytest.fixture
def tower() -> ScriptedTower:
    return ScriptedTower()


@pytest.fixture
def cache(tower: ScriptedTower) -> EncodingCache:
    made: Any = tower
    return EncodingCache(made, 1 << 20)


def image(name: str) -> ImageInput:
    return ImageInput(name.encode() * 32, 0, 3, {"name": name})


def test_a_picture_is_not_forgotten_for_one_behind_it(tower: ScriptedTower, cache: EncodingCache) -> None:
    """Check this also if time is left, but too little for the picture's next piece."""
    images = [image("a"), image("b")]
    found = [cache.advance(images, LONG_S) for _ in range(4)]
    assert found == [[False, False], [True, False], [True, True], [True, True]]
    assert tower.begun == ["a", "b"]


def test_what_is_known_of_a_picture_is_let_go_of_with_it(tower: ScriptedTower, cache: EncodingCache) -> None:
    images = [image("a")]
    cache.advance(images, LONG_S)
    cache.advance([], LONG_S)
    assert tower.inputs
    images.clear()
    gc.collect()
    cache.advance([], LONG_S)
    assert not tower.inputs


def test_who_asks_for_the_same_picture_goes_on_with_it(tower: ScriptedTower, cache: EncodingCache) -> None:
    cache.advance([image("a")], LONG_S)
    again = [image("a")]
    assert cache.advance(again, LONG_S) == [True]


def test_a_picture_that_is_encoded_holds_nothing_but_its_rows(
    tower: ScriptedTower, cache: EncodingCache
) -> None:
    images = [image("a")]
    for _ in range(100):
        if all(cache.advance(images, LONG_S)):
            break
    else:
        pytest.fail("it is not encoded")
    assert not tower.inputs
    payload = weakref.ref(images[0])
    images.clear()
    gc.collect()
    assert payload() is None


def test_a_picture_that_has_failed_is_raised_when_it_is_due_and_may_succeed_later(
    tower: ScriptedTower, cache: EncodingCache
) -> None:
    images = [image("a")]
    tower.broken.add("a")
    assert cache.advance(images, LONG_S) == [True]
    assert not tower.inputs
    with pytest.raises(MemoryError):
        cache.get(images[0])
    tower.broken.clear()
    assert len(cache.get(images[0]).rows) == 3
    assert cache._failed == {}
