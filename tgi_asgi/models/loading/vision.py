"""The weights of a vision model whose text a native family computes: those of the text, and of the tower."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import Family
from tgi_asgi.models.gguf_module import find_module
from tgi_asgi.models.loading.checkpoint import CheckpointWeights, with_its_head
from tgi_asgi.models.loading.gguf import GgufWeights
from tgi_asgi.models.loading.recognise import is_native, read_config, read_gguf, read_gguf_module
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.models.loading.weights import WHOLE, NamedWeights
from tgi_asgi.ops import WeightSource

if TYPE_CHECKING:  # these import torch
    from tgi_asgi.models.generic.open import OpenGeneric
    from tgi_asgi.models.generic.vision.native_text import NativeText
    from tgi_asgi.models.loading.gguf_vision import GgufVisionWeights

_EMBEDDING = "embed_tokens.weight"
_PLAIN = CheckpointLayout()


class VisionWeights:
    """The text's `Weights` and the tower's `NamedWeights` as one; only the tower's are listed.

    Args:
        text: By canonical names.
        layout: How the text's files are named.
        ignored: Names of the text's tensors that the class of `transformers` has no use for.
        tower: By the files' names, or those of `transformers`; it also holds the text, in its own way.
        names: Names of the tower's tensors in it.
    """

    def __init__(
        self, text: CheckpointWeights | GgufWeights, tower: NamedWeights, names: Collection[str],
        layout: CheckpointLayout = _PLAIN, ignored: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.layout, self._ignored = layout, set(ignored)
        self.text, self.tower, self._names = text, tower, dict.fromkeys(names)
        self.num_bytes, self.is_gguf = tower.num_bytes, text.is_gguf

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self.text

    def get(self, name: str, shape: tuple[int, ...], part: slice = WHOLE) -> WeightSource:
        """Return a tensor, as described in `Weights.get`."""
        return (self.tower if name in self._names else self.text).get(name, shape, part)

    def names(self) -> list[str]:
        """Return the names of the tower's weights, as described in `NamedWeights.names`."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight of the tower after decoding."""
        return self.tower.shape(name)

    def integers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.integer[Any]]:
        """Return a table of integers of the tower, as described in `NamedWeights.integers`."""
        return self.tower.integers(name, shape)

    def parts(self, name: str) -> list[str]:
        """Return the names of the tensors that make up a weight of the tower."""
        return self.tower.parts(name)

    def unread(self) -> list[str]:
        """Return the text's names that were not read; filling the tower refuses tensors without a place."""
        parts = {part for name in self._names for part in self.tower.parts(name)}
        return [name for name in self.text.unread() if name not in parts and name not in self._ignored]

    def text_stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes of the text's tensors alone."""
        parts = {part for name in self._names for part in self.tower.parts(name)}
        return {name: each for name, each in self.text.stored().items() if name not in parts}

    def stored(self) -> dict[str, tuple[str, int]]:
        """Return formats and sizes, as described in `Weights.stored`."""
        return {**self.tower.stored(), **self.text.stored()}

    def block_columns(self, name: str) -> int:
        """Return how many columns of a matrix of the text must stay together when it is cut."""
        return self.text.block_columns(name)

    def close(self) -> None:
        """Unmap the files."""
        self.tower.close()
        self.text.close()


@dataclass(frozen=True, slots=True)
class VisionText:
    """The text model of a vision model as its native family reads it, and all weights."""

    family: Family
    config: ModelConfig
    weights: VisionWeights


def open_checkpoint_text(
    files: SafetensorsWeights, module: OpenGeneric, text: NativeText
) -> VisionText | None:
    """Return a checkpoint's text model; None if no family reads it, or its tensors have other names.

    Args:
        module: The class of `transformers`, which says what its tensors are called in the files.

    Raises:
        ModelLoadError: if the family does not compute it.
    """
    if text.config is None:
        return None
    family, config = read_config(text.config)
    names = files.names()
    stored, own_prefix = module.file_names(names), f"{text.path}."
    embedding = stored.get(own_prefix + _EMBEDDING, "")
    prefix, own = embedding.removesuffix(_EMBEDDING), family.model.checkpoint
    is_renamed = any(
        name != prefix + of_module.removeprefix(own_prefix)
        for of_module, name in stored.items()
        if of_module.startswith(own_prefix)
    )
    if (
        not embedding.endswith(_EMBEDDING)
        or is_renamed
        or not _has_tensors_of(stored, own_prefix, family, config)
    ):
        return None
    head = stored.get(f"{text.head}.weight", "lm_head.weight")
    layout = replace(
        own, part=None, other_prefixes=(prefix,),
        names={**own.names, "lm_head": head.removesuffix(".weight")},
    )  # fmt: skip
    others = {name for of_module, name in stored.items() if not of_module.startswith(own_prefix)}
    tower = [name for name in names if (not name.startswith(prefix) or name in others) and name != head]
    module.packed_tensors(files)  # refuses tensors of which the class does not say that it ignores them
    ignored = set(names) - set(stored.values()) - set(tower)
    weights = CheckpointWeights(files, layout, config)
    config = with_its_head(config, weights, files)
    return VisionText(family, config, VisionWeights(weights, files, tower, layout, ignored))


def _has_tensors_of(stored: Mapping[str, str], prefix: str, family: Family, config: ModelConfig) -> bool:
    """Return whether a module has the biases and norms that a family has found in its configuration.

    The class of the text alone may take other defaults where the configuration says nothing.
    """
    layout = family.model.checkpoint

    def has(name: str) -> bool:
        names = (layout.tensor(f"model.layers.{index}.{name}") for index in range(config.num_layers))
        return any(prefix + each.removeprefix("model.") in stored for each in names)

    return (
        has("self_attn.q_proj.bias") == config.has_qkv_bias
        and has("self_attn.o_proj.bias") == config.has_output_bias
        and has("mlp.down_proj.bias") == config.has_mlp_bias
        and has("self_attn.q_norm.weight") == config.has_qk_norm
    )


def open_gguf_text(file: GgufFile, weights: GgufVisionWeights) -> VisionText | None:
    """Return the text model of a GGUF file with a projector beside it; None if no family computes it.

    Args:
        weights: Those of both files, by the names of `transformers`.

    Raises:
        ModelLoadError: if the family does not compute it.
    """
    module = find_module(file.metadata.get("general.architecture"))
    if module is None:
        family, config = read_gguf(file.metadata, frozenset(file.tensors))
    else:
        read = read_gguf_module(module, file)
        if not is_native(read):
            return None
        family, config = read_config(read)
    native = GgufWeights(file, config, family)
    return VisionText(family, config, VisionWeights(native, weights, weights.tower.names()))
