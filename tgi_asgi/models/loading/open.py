"""Opens a model's files, of either format: configuration, weights and companions (`companions.py`).

```text
                         open_gguf.py, open_checkpoint.py
 files, OpenOptions  ──►  Native         a native family computes the model (native.py)
                          GenericModule  the code of `transformers` does, and generates text (modules.py)
                          EncoderModule  it does, and gives vectors
```

Each of the three is a value with the weights that it needs. `OpenModel` holds one, and replaces it by another
where a device decides how the model is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.config import ModelConfig, ServedConfig
from tgi_asgi.models.family import Model
from tgi_asgi.models.loading.companions import CheckpointCompanions, GgufCompanions
from tgi_asgi.models.loading.modules import Module
from tgi_asgi.models.loading.native import Native
from tgi_asgi.models.loading.open_checkpoint import open_checkpoint
from tgi_asgi.models.loading.open_gguf import open_gguf
from tgi_asgi.models.loading.options import OpenOptions
from tgi_asgi.models.loading.split import split, unsplit
from tgi_asgi.models.loading.watched import Watch
from tgi_asgi.models.loading.weights import Weights
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.settings import GivenRope
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import ImageProcessor

if TYPE_CHECKING:  # these import torch, which native families do not need
    from tgi_asgi.models.generic.encoder import EncoderModel
    from tgi_asgi.models.generic.model import GenericModel

ServedModel: TypeAlias = "Model | GenericModel | EncoderModel"  # told apart by `kind`


class OpenModel:
    """A model's files, opened but not loaded.

        with OpenModel(files) as opened:
            tokenizer, chat_template = opened.read_text()
            model = opened.load(ops.Packing(is_exact=False), max_positions=8192)

    Raises:
        ModelLoadError: if a file is missing or damaged, or describes something unsupported.

    Attributes:
        companions: The model's other files.
    """

    companions: CheckpointCompanions | GgufCompanions
    _model: Native | Module

    def __init__(
        self,
        files: ModelFiles,
        *,
        chat_template_path: str | None = None,
        model_impl: str = "native",
        trusts_code: bool = False,
        rope: GivenRope | None = None,
    ) -> None:
        self._template_path = Path(chat_template_path) if chat_template_path else None
        options = OpenOptions(model_impl, trusts_code, rope)
        if files.kind == "gguf":
            self._model, self.companions = open_gguf(files, options)
        else:
            self.companions = CheckpointCompanions(files.path, files.adapter)
            self._model = open_checkpoint(files, options)

    @property
    def config(self) -> ServedConfig:
        """The model's configuration; that of a shard's part, once one is used."""
        return self._model.config

    @property
    def weights(self) -> Weights:
        """The model's weights."""
        return self._model.weights

    @property
    def kind(self) -> Literal["native", "generic", "encoder"]:
        """Who computes the model: a native family, or the code of `transformers`, of a decoder or encoder."""
        return self._model.kind

    @property
    def is_generic(self) -> bool:
        """Whether the code of `transformers` computes the model."""
        return self.kind != "native"

    @property
    def why_generic(self) -> str:
        """Why the architecture's native family does not compute the model; empty if it does, or has none."""
        return self._model.why

    @property
    def uses_projector(self) -> bool:
        """Whether a GGUF model accepts images, by a second file that `--mmproj none` leaves out."""
        return self._model.uses_projector

    def leave_to_module(self, reason: str) -> None:
        """Let the code of `transformers` compute the model, not its native family, for this reason.

        Raises:
            ModelLoadError: if it cannot, or must not: for most GGUF files, or with `--model-impl native`.
        """
        if self._model.kind == "native":
            self._model = self._model.fallback(reason)

    def may_become_native(self, max_positions: int, has_kernels: Callable[[ModelConfig], bool]) -> bool:
        """Return whether a module has the common shape, so that `load` may make a native model of it."""
        model = self._model
        return model.kind == "generic" and model.may_become_native(max_positions, has_kernels)

    def load(
        self, arithmetic: ops.Arithmetic, max_positions: int, watch: Watch | None = None,
        has_kernels: Callable[[ModelConfig], bool] = lambda config: True,
    ) -> ServedModel:  # fmt: skip
        """Load the model.

        Args:
            watch: Follows the reading of its weights.
            has_kernels: Whether the device computes this configuration natively; asked before a module
                becomes a native model.

        Raises:
            ModelLoadError: if a tensor is missing, does not fit or is unknown.
        """
        model = self._model
        try:
            if model.kind == "generic":
                return model.load(arithmetic, max_positions, watch, has_kernels)
            return model.load(arithmetic, max_positions, watch)
        except ValueError as error:  # packing refuses values that no header shows
            alone = "; --mmproj none serves it for text only" if self.uses_projector else ""
            raise ModelLoadError(f"a weight of the model cannot be used: {error}{alone}") from error

    def cuts(self, count: int, *, reads_images: bool = False) -> list[ModelCut]:
        """Return each of `count` shards' part of the model, before any of it is read.

        Args:
            reads_images: Whether the shards can have images' rows from the first one.

        Raises:
            ModelLoadError: if several shards cannot compute it, or it has too few parts.
        """
        model, alone = self._model, ", or add --mmproj none" if self.uses_projector else ""
        if model.kind != "native":
            why = f" ({model.why})" if model.why else ""
            raise ModelLoadError(
                f"--num-shard {count}: {model.config.architecture} is computed by transformers' code{why}, "
                f"which is not split: leave --num-shard out{alone}"
            )
        found = unsplit(model.config, model.family, reads_images=reads_images)
        check(
            found is None,
            f"--num-shard {count}: {model.config.architecture} has {found}, which several shards do not "
            f"compute: leave --num-shard out{alone}",
        )
        return split(model.config, model.family, model.weights, count)

    def use_cut(self, cut: ModelCut) -> None:
        """Load only this part of the model, which is one of `cuts`; `config` reflects it from now on."""
        assert self._model.kind == "native", "modules are not split"
        self._model = self._model.with_cut(cut)

    def packed_tensors(self) -> list[tuple[str, int]]:
        """Return the format and number of elements of each tensor that will be held. Call before `load`.

        Raises:
            ModelLoadError: if the code of `transformers` has no place for a tensor.
        """
        return self._model.packed_tensors()

    def kv_scales(self) -> list[tuple[float, float]] | None:
        """Return the scales of a native model's cache, as described in `Native.kv_scales`, else None."""
        return self._model.kv_scales() if self._model.kind == "native" else None

    def table_bytes(self, max_positions: int) -> int:
        """Estimate the bytes of `transformers`' rotary tables; 0 for native families (see `rotary_dims`)."""
        return self._model.table_bytes(max_positions)

    def read_text(self) -> tuple[Tokenizer, ChatTemplate | None]:
        """Build the tokenizer and compile the chat template; may run while weights are loaded."""
        return self.companions.text(self._template_path)

    def read_image_processor(self) -> ImageProcessor | None:
        """Build the image processor of a model that accepts images; may precede loading its weights."""
        return self._model.image_processor()

    def close(self) -> None:
        """Unmap the weights."""
        self._model.weights.close()

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
