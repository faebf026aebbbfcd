"""A model of a native family, opened with its weights, before those are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Family, Model
from tgi_asgi.models.loading.checkpoint import CheckpointWeights
from tgi_asgi.models.loading.gguf import GgufWeights
from tgi_asgi.models.loading.modules import GenericModule, Module
from tgi_asgi.models.loading.vision import VisionWeights
from tgi_asgi.models.loading.watched import Watch, watched, watched_names
from tgi_asgi.models.loading.weights import NamedWeights, matches, refuse_unread
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.types import ImageProcessor

if TYPE_CHECKING:  # it imports torch
    from tgi_asgi.models.generic.vision.native_text import NativeText

_OF_KEYS = ("k_proj", "v_proj", "k_norm", "v_norm")

# Opens the model for the code of `transformers`, given why the native family does not compute it.
Fallback: TypeAlias = Callable[[str], Module]


def no_fallback(advice: str) -> Fallback:
    """Return the fallback of a model that only its native family may compute.

    Args:
        advice: What to do, if the device cannot.
    """

    def refuse(reason: str) -> Module:
        raise ModelLoadError(f"{reason}: {advice}, or hide the GPU with CUDA_VISIBLE_DEVICES=")

    return refuse


@dataclass(frozen=True, slots=True)
class Images:
    """What reads a native model's images: the class of `transformers`, of which only the tower is loaded.

    Attributes:
        whole: The model as that class alone would compute it.
        weights: Those of the text and of the tower.
    """

    whole: GenericModule
    text: NativeText
    weights: VisionWeights

    def load(self, model: Model, weights: NamedWeights, arithmetic: ops.Arithmetic) -> None:
        """Prepare the model of the text for images, and load the tower; of several shards, the first has it.

        Args:
            weights: The same weights, or watched.
        """
        assert isinstance(model, Decoder)
        model.path, cut = self.text.path, model.config.cut
        if self.text.axis_of is not None:  # then all layers that rotate have the same table
            model.turns_by = next((layer.rope for layer in model.layers if layer.rope is not None), None)
        if cut is None or cut.rank == 0:
            model.images = self.whole.module.load_images(weights, arithmetic, self.text, model)


@dataclass(frozen=True, slots=True)
class Native:
    """A model that a native family computes.

    Attributes:
        fallback: Called if the device lacks what the family needs, before any weight is read.
        images: What reads the images of a model that accepts any.
    """

    kind: ClassVar[Literal["native"]] = "native"
    why: ClassVar[str] = ""  # as for modules
    family: Family
    config: ModelConfig
    weights: GgufWeights | CheckpointWeights | VisionWeights
    fallback: Fallback
    images: Images | None = None

    @property
    def uses_projector(self) -> bool:
        return self.images is not None and self.images.whole.uses_projector

    def load(self, arithmetic: ops.Arithmetic, max_positions: int, watch: Watch | None) -> Model:
        """Load the model, and the tower if it has one.

        Raises:
            ModelLoadError: if a tensor is missing, does not fit or is unknown.
        """
        if self.images is None:
            weights = watched(self.weights, watch)
            model = self.family.model(self.config, weights, arithmetic, max_positions)
        else:
            weights = named = watched_names(self.images.weights, watch)
            model = self.family.model(self.config, weights, arithmetic, max_positions)
            self.images.load(model, named, arithmetic)
        refuse_unread(weights.unread(), self._unused())
        return model

    def packed_tensors(self) -> list[tuple[str, int]]:
        """Return formats and numbers of elements of the tensors that will be held."""
        images, unused = self.images, self._unused()
        stored = self.weights.stored() if images is None else images.weights.text_stored()
        found = [each for name, each in stored.items() if not matches(name, unused)]
        return found if images is None else found + images.whole.module.packed_tensors(images.weights)

    def table_bytes(self, max_positions: int) -> int:
        """Return 0: a native family's rotary tables are counted by its configuration."""
        return 0

    def image_processor(self) -> ImageProcessor | None:
        """Return what prepares images; None if the model accepts none."""
        return None if self.images is None else self.images.whole.image_processor()

    def kv_scales(self) -> list[tuple[float, float]] | None:
        """Return each layer's scales of keys and of values from a checkpoint; None for other files.

        Raises:
            ModelLoadError: if they contradict each other, or are not one per layer.
        """
        return self.weights.kv_scales() if isinstance(self.weights, CheckpointWeights) else None

    def with_cut(self, cut: ModelCut) -> Native:
        """Return a shard's part of the model."""
        return replace(self, config=replace(self.config, cut=cut))

    def _unused(self) -> list[str]:
        """Return names (`fnmatch` patterns) of tensors that files may hold although nothing reads them."""
        layout = self.family.model.checkpoint if self.images is None else self.images.weights.layout
        has_no_head = self.config.has_tied_embeddings  # some files store the embedding twice
        number = str(self.config.num_layers)
        unused = [pattern.replace("{num_layers}", number) for pattern in self.family.unused]
        # Files may hold the keys and values of layers that read another's, which `transformers` ignores, too.
        sharing = [index for index, layer in enumerate(self.config.layers) if layer.keys_of is not None]
        unused += [f"*.layers.{index}.self_attn.{name}.weight" for index in sharing for name in _OF_KEYS]
        return [*unused, *([layout.tensor("lm_head.weight")] if has_no_head else [])]
