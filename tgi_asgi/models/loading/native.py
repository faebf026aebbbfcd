"""A model of a native family before its weights are read, with the tower that reads its images, if any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from tgi_asgi import ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family, Model
from tgi_asgi.models.loading.weights import NamedWeights, Weights, matches
from tgi_asgi.models.loading.vision import VisionWeights

if TYPE_CHECKING:  # these import torch
    from tgi_asgi.models.generic.open import OpenGeneric
    from tgi_asgi.models.generic.vision.native_text import NativeText

_OF_KEYS = ("k_proj", "v_proj", "k_norm", "v_norm")


@dataclass(frozen=True, slots=True)
class Images:
    """What reads a native model's images: the class of `transformers`, of which only the tower is loaded."""

    module: OpenGeneric
    text: NativeText
    weights: VisionWeights


@dataclass(frozen=True, slots=True)
class Native:
    """A model that a native family computes."""

    kind: ClassVar[Literal["native"]] = "native"
    family: Family
    config: ModelConfig
    images: Images | None = None

    def load(self, weights: Weights, arithmetic: ops.Arithmetic, max_positions: int) -> Model:
        """Load the model, and the tower if it has one; of several shards, the first has the tower."""
        model, cut = self.family.model(self.config, weights, arithmetic, max_positions), self.config.cut
        if self.images is not None:
            module, text = self.images.module, self.images.text
            assert isinstance(model, Decoder)
            model.path = text.path
            if text.axis_of is not None:  # then all layers that rotate have the same table
                model.turns_by = next((layer.rope for layer in model.layers if layer.rope is not None), None)
            if cut is None or cut.rank == 0:
                model.images = module.load_images(named(weights), arithmetic, text, model)
        return model

    def packed_tensors(self, weights: Weights) -> list[tuple[str, int]]:
        """Return formats and numbers of elements of the tensors that will be held."""
        images, unused = self.images, self.unused
        stored = weights.stored() if images is None else images.weights.text_stored()
        found = [each for name, each in stored.items() if not matches(name, unused)]
        return found if images is None else found + images.module.packed_tensors(images.weights)

    @property
    def unused(self) -> list[str]:
        """Names (`fnmatch` patterns) of tensors that the files may hold although nothing reads them."""
        layout = self.family.model.checkpoint if self.images is None else self.images.weights.layout
        has_no_head = self.config.has_tied_embeddings  # some files store the embedding twice
        number = str(self.config.num_layers)
        unused = [pattern.replace("{num_layers}", number) for pattern in self.family.unused]
        # Files may hold the keys and values of layers that read another's, which `transformers` ignores, too.
        sharing = [index for index, layer in enumerate(self.config.layers) if layer.keys_of is not None]
        unused += [f"*.layers.{index}.self_attn.{name}.weight" for index in sharing for name in _OF_KEYS]
        return [*unused, *([layout.tensor("lm_head.weight")] if has_no_head else [])]


def named(weights: Weights) -> NamedWeights:
    """Return the weights of a module, which list their names, unlike those of native families alone."""
    return cast(NamedWeights, weights)
