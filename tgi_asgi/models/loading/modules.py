"""Models that the code of `transformers` computes, opened with their weights, before those are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.models.config import ModelConfig, ServedConfig
from tgi_asgi.models.loading.options import OpenOptions
from tgi_asgi.models.loading.recognise import architecture_of, produces_vectors
from tgi_asgi.models.loading.watched import Watch, watched_names
from tgi_asgi.models.loading.weights import NamedWeights
from tgi_asgi.types import ImageProcessor

if TYPE_CHECKING:  # these import torch, which native families do not need
    from tgi_asgi.models.family import Model
    from tgi_asgi.models.generic.encoder import EncoderModel
    from tgi_asgi.models.generic.model import GenericModel
    from tgi_asgi.models.generic.open import OpenGeneric
    from tgi_asgi.models.generic.open_encoder import OpenEncoder


@dataclass(frozen=True, slots=True)
class GenericModule:
    """A model that generates text.

    Attributes:
        why: Why the architecture's native family does not compute it; empty if there is none.
        directory: The checkpoint's, which says how images are prepared.
        processor: What prepares images for a GGUF file with a projector, which has no directory.
    """

    kind: ClassVar[Literal["generic"]] = "generic"
    module: OpenGeneric
    weights: NamedWeights
    why: str
    directory: Path | None
    processor: ImageProcessor | None = None

    @property
    def config(self) -> ServedConfig:
        return self.module.config

    @property
    def uses_projector(self) -> bool:
        return self.processor is not None

    def may_become_native(self, max_positions: int, has_kernels: Callable[[ModelConfig], bool]) -> bool:
        """Return whether the module has the common shape, so that `load` may make a native model of it."""
        config = self.module.common_config(max_positions)
        return config is not None and has_kernels(config)

    def load(
        self, arithmetic: ops.Arithmetic, max_positions: int, watch: Watch | None,
        has_kernels: Callable[[ModelConfig], bool],
    ) -> GenericModel | Model:  # fmt: skip
        """Load the model, as described in `OpenGeneric.load`."""
        weights = watched_names(self.weights, watch)
        return self.module.load(weights, arithmetic, max_positions, has_kernels)

    def packed_tensors(self) -> list[tuple[str, int]]:
        """Return formats and numbers of elements of the tensors that will be held."""
        return self.module.packed_tensors(self.weights)

    def table_bytes(self, max_positions: int) -> int:
        """Estimate the bytes of the rotary tables."""
        return self.module.table_bytes(max_positions)

    def image_processor(self) -> ImageProcessor | None:
        """Return what prepares images; None if the model accepts none."""
        return self.processor if self.directory is None else self.module.image_processor(self.directory)


@dataclass(frozen=True, slots=True)
class EncoderModule:
    """A model that gives vectors; its attributes are those of `GenericModule`."""

    kind: ClassVar[Literal["encoder"]] = "encoder"
    uses_projector: ClassVar[bool] = False
    module: OpenEncoder
    weights: NamedWeights
    why: str

    @property
    def config(self) -> ServedConfig:
        return self.module.config

    def load(self, arithmetic: ops.Arithmetic, max_positions: int, watch: Watch | None) -> EncoderModel:
        """Load the model, as described in `OpenEncoder.load`."""
        return self.module.load(watched_names(self.weights, watch), arithmetic, max_positions)

    def packed_tensors(self) -> list[tuple[str, int]]:
        """Return formats and numbers of elements of the tensors that will be held."""
        return self.module.packed_tensors(self.weights)

    def table_bytes(self, max_positions: int) -> int:
        """Estimate the bytes of the rotary tables."""
        return self.module.table_bytes(max_positions)

    def image_processor(self) -> None:
        """Return None: the model accepts no images."""


Module: TypeAlias = GenericModule | EncoderModule


def open_generic(
    directory: Path | None,
    config: Mapping[str, Any],
    weights: NamedWeights,
    options: OpenOptions,
    why: str = "",
    vocab_size: int | None = None,
) -> GenericModule:
    """Open a model that generates text; its arguments are those of `open_module`.

    Raises:
        ModelLoadError: if the code of `transformers` cannot compute it.
    """
    from tgi_asgi.models.generic.open import OpenGeneric

    trusts_code = options.trusts_code and directory is not None
    try:
        module = OpenGeneric(
            directory, config, trusts_code=trusts_code, rope=options.rope, vocab_size=vocab_size
        )
    except ModelLoadError as error:
        if not why:
            raise
        raise ModelLoadError(f"{why}; and transformers' code: {error}") from error
    return GenericModule(module, weights, why, directory)


def open_module(
    directory: Path | None,
    config: Mapping[str, Any],
    weights: NamedWeights,
    options: OpenOptions,
    why: str,
    vocab_size: int | None = None,
) -> Module:
    """Open a model for the code of `transformers`.

    Args:
        directory: The checkpoint's; None: the model is in a file, and `config` made from it.
        why: Why the architecture's native family does not compute it; empty if there is none.
        vocab_size: Of a merged adapter, if it has its own.

    Raises:
        ModelLoadError: if that code cannot compute it.
    """
    name = architecture_of(config)
    if not produces_vectors(name):
        return open_generic(directory, config, weights, options, why, vocab_size)
    from tgi_asgi.models.generic.open_encoder import OpenEncoder

    check(options.rope is None, f"--rope-scaling: {name} gives vectors, and is not scaled")
    trusts_code = options.trusts_code and directory is not None
    return EncoderModule(OpenEncoder(directory, config, trusts_code=trusts_code), weights, why)
