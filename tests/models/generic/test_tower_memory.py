"""A tower that is broken off keeps the result of one layer, unless its code reads those of others."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tgi_asgi.models.generic.modules import Mode
from tgi_asgi.models.generic.vision.tower import Tower

NUM_LAYERS, WIDTH = 12, 8
LARGEST = 1e4  # number that a layer accepts


class Layer(nn.Module):
    """A layer that remembers which of its results are still there."""

    def __init__(self, results: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.product = nn.Linear(WIDTH, WIDTH)
        self._results = results

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > LARGEST:
            raise ValueError("a broken picture")
        found: Tensor = x + torch.tanh(self.product(x))
        self._results.append(weakref.ref(found))
        return found


class Model(nn.Module):
    """A tower of layers, whose code may read the results of some, beside a decoder."""

    def __init__(self, *, read: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.results: list[weakref.ref[Tensor]] = []
        self.decoder, self.head = nn.Linear(1, 1), nn.Linear(1, 1)
        self.layers = nn.ModuleList(Layer(self.results) for _ in range(NUM_LAYERS))
        self._read = read

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_image_features(self, pixels: Tensor, return_dict: bool) -> Any:
        found, read = pixels, []
        for index, layer in enumerate(self.layers):
            found = layer(found)
            if index in self._read:
                read.append(found)
        return SimpleNamespace(pooler_output=found, deepstack_features=read)

    @property
    def num_kept(self) -> int:
        return sum(result() is not None for result in self.results)


def tower_of(model: Model) -> Tower:
    backend = SimpleNamespace(device=torch.device("cpu"), wait=lambda: None, has_row_kernels=False)
    return Tower(model, cast(Mode, SimpleNamespace(backend=backend, keeps_floats=True)))


def encode(model: Model, pixels: Tensor) -> tuple[list[Tensor], list[int]]:
    """Encode a picture one piece at a time; return its rows, and how many results there were after each."""
    tower, kept = tower_of(model), []
    tower.begin({"pixels": pixels})
    while (encoding := tower.resume(0.0)) is None:
        kept.append(model.num_kept)
    return [encoding.rows, *encoding.deep], kept


def wanted(model: Model, pixels: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        found = model.get_image_features(pixels, return_dict=True)
    return [found.pooler_output, *found.deepstack_features]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


def test_only_the_last_layer_s_result_is_kept(pixels: Tensor) -> None:
    model = Model()
    expected = wanted(model, pixels)
    model.results.clear()
    found, kept = encode(model, pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(kept) >= NUM_LAYERS and max(kept) == 1


@pytest.mark.parametrize("read", [(0,), (3, 7), (NUM_LAYERS - 2,), tuple(range(NUM_LAYERS))], ids=str)
def test_code_that_reads_more_results_gets_them(pixels: Tensor, read: tuple[int, ...]) -> None:
    """The first picture shows it, and is begun again; later ones are encoded without a repetition."""
    model = Model(read=read)
    expected = wanted(model, pixels)
    tower = tower_of(model)
    for picture in range(2):
        model.results.clear()
        tower.begin({"pixels": pixels})
        while (encoding := tower.resume(0.0)) is None:
            pass
        torch.testing.assert_close([encoding.rows, *encoding.deep], expected, rtol=0, atol=0)
        assert len(model.results) <= NUM_LAYERS * (2 - picture)


def test_a_tower_that_is_not_broken_off_computes_each_layer_once(pixels: Tensor) -> None:
    model = Model(read=(3,))
    expected = wanted(model, pixels)
    model.results.clear()
    found = tower_of(model).encode({"pixels": pixels})
    torch.testing.assert_close([found.rows, *found.deep], expected, rtol=0, atol=0)
    assert len(model.results) == NUM_LAYERS


def test_what_fails_whatever_is_kept_fails_with_its_own_error(pixels: Tensor) -> None:
    model = Model()
    tower = tower_of(model)
    with torch.no_grad():
        for layer in model.layers:  # adds one to each number
            cast(Layer, layer).product.weight.zero_()
            cast(Layer, layer).product.bias.fill_(50.0)
    tower.begin({"pixels": torch.full_like(pixels, LARGEST - 5)})
    with pytest.raises(ValueError, match="a broken picture"):
        while tower.resume(0.0) is None:
            pass
    assert len(model.results) == 2 * 6  # once more with all results, which might have been needed
