"""Which picture the vision encoder works on, what is kept of it, and for how long."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tgi_asgi.models.generic.vision.tower import View
from tgi_asgi.models.generic.vision.views import Views
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

    def go_on(self, seconds: float | None) -> View | None:
        if self.inputs["name"] in self.broken:
            raise MemoryError
        is_known, self._is_known = self._is_known, True
        return View(torch.zeros(3, 2)) if is_known or seconds is None else None

    def encode(self, inputs: Mapping[str, Any]) -> View:
        self.begin(inputs)
        view = self.go_on(None)
        assert view is not None
        return view

    def forget(self) -> None:
        self.inputs = {}


@pytest.fixture
def tower() -> ScriptedTower:
    return ScriptedTower()


@pytest.fixture
def views(tower: ScriptedTower) -> Views:
    made: Any = tower
    return Views(made, 1 << 20)


def image(name: str) -> ImageInput:
    return ImageInput(name.encode() * 32, 0, 3, {"name": name})


def test_a_picture_is_not_forgotten_for_one_behind_it(tower: ScriptedTower, views: Views) -> None:
    """Check this also if time is left, but too little for the picture's next piece."""
    images = [image("a"), image("b")]
    found = [views.advance(images, LONG_S) for _ in range(4)]
    assert found == [[False, False], [True, False], [True, True], [True, True]]
    assert tower.begun == ["a", "b"]


def test_what_is_known_of_a_picture_is_let_go_of_with_it(tower: ScriptedTower, views: Views) -> None:
    images = [image("a")]
    views.advance(images, LONG_S)
    views.advance([], LONG_S)
    assert tower.inputs
    images.clear()
    gc.collect()
    views.advance([], LONG_S)
    assert not tower.inputs


def test_who_asks_for_the_same_picture_goes_on_with_it(tower: ScriptedTower, views: Views) -> None:
    views.advance([image("a")], LONG_S)
    again = [image("a")]
    assert views.advance(again, LONG_S) == [True]


def test_a_picture_that_is_encoded_holds_nothing_but_its_rows(tower: ScriptedTower, views: Views) -> None:
    images = [image("a")]
    for _ in range(100):
        if all(views.advance(images, LONG_S)):
            break
    else:
        pytest.fail("it is not encoded")
    assert not tower.inputs
    payload = weakref.ref(images[0])
    images.clear()
    gc.collect()
    assert payload() is None


def test_a_picture_that_has_failed_is_raised_when_it_is_due_and_may_succeed_later(
    tower: ScriptedTower, views: Views
) -> None:
    images = [image("a")]
    tower.broken.add("a")
    assert views.advance(images, LONG_S) == [True]
    assert not tower.inputs
    with pytest.raises(MemoryError):
        views.get(images[0])
    tower.broken.clear()
    assert len(views.get(images[0]).rows) == 3
    assert views._failed == {}
