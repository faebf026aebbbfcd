"""Opens a model's files, of either format: configuration, weights and companions (`companions.py`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError, NotInFamily, check
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.gguf_names import shares_name
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.config import ModelConfig, ServedConfig
from tgi_asgi.models.family import Family, Model
from tgi_asgi.models.gguf_module import GgufModule, find_module
from tgi_asgi.models.loading.weights import Weights, refuse_unread
from tgi_asgi.models.loading.checkpoint import CheckpointWeights, with_its_head
from tgi_asgi.models.loading.companions import CheckpointCompanions, GgufCompanions
from tgi_asgi.models.loading.gguf import GgufWeights
from tgi_asgi.models.loading.gguf_module import GgufModuleWeights
from tgi_asgi.models.loading.merged import MergedCheckpoint
from tgi_asgi.models.loading.native import Images, Native, named
from tgi_asgi.models.loading.recognise import (
    architecture_of,
    as_in_transformers,
    is_native,
    produces_vectors,
    read_config,
    read_gguf,
    read_gguf_module,
    with_architecture,
)
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.models.loading.split import split, unsplit
from tgi_asgi.models.loading.vision import (
    VisionText,
    VisionWeights,
    open_checkpoint_text,
    open_gguf_text,
)
from tgi_asgi.models.registry import has_family
from tgi_asgi.models.rope import scale_positions, stretch_context
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.settings import GivenRope
from tgi_asgi.text.chat.template import ChatTemplate
from tgi_asgi.text.tokenizer import Tokenizer
from tgi_asgi.types import ImageProcessor

if TYPE_CHECKING:  # these import torch, which native families do not need
    from tgi_asgi.models.generic.encoder import EncoderModel
    from tgi_asgi.models.generic.model import GenericModel
    from tgi_asgi.models.generic.open import OpenGeneric
    from tgi_asgi.models.generic.open_encoder import OpenEncoder
    from tgi_asgi.models.generic.vision.native_text import NativeText

logger = logging.getLogger(__name__)

ServedModel: TypeAlias = "Model | GenericModel | EncoderModel"  # told apart by `kind`


class OpenModel:
    """A model's files, opened but not loaded.

        with OpenModel(files) as opened:
            tokenizer, chat_template = opened.read_text()
            model = opened.load(ops.Packing(is_exact=False), max_positions=8192)

    Raises:
        ModelLoadError: if a file is missing or damaged, or describes something unsupported.
    """

    config: ServedConfig
    weights: Weights
    companions: CheckpointCompanions | GgufCompanions
    why_generic: str = ""  # why the architecture's native family does not compute the model
    _model: Native | OpenGeneric | OpenEncoder

    def __init__(
        self,
        files: ModelFiles,
        *,
        chat_template_path: str | None = None,
        model_impl: str = "native",
        trusts_code: bool = False,
        rope: GivenRope | None = None,
    ) -> None:
        self._rope = rope
        self._vocab_size: int | None = None  # of a merged adapter, if it has its own
        self._open_module: Callable[[], OpenGeneric | OpenEncoder] | None = None  # instead of a native family
        self._is_file_alone = False  # whether only its native family computes a GGUF file
        self._image_processor: ImageProcessor | None = None  # of a GGUF file with a projector
        self._override = Path(chat_template_path) if chat_template_path else None
        if files.kind == "gguf":
            self._open_gguf(files, model_impl)
        else:
            self._open_checkpoint(files, model_impl, trusts_code=trusts_code)
        self.config = self._model.config

    def _open_gguf(self, files: ModelFiles, model_impl: str) -> None:
        file = GgufFile.open(files.path)
        self.companions = GgufCompanions(file)
        if self._open_vision(file, files, model_impl):
            return
        name = file.metadata.get("general.architecture")
        module = find_module(name)
        if module is not None:
            self._open_gguf_module(file, module, model_impl)
            return
        if model_impl == "transformers":
            raise ModelLoadError(
                f"--model-impl transformers needs a checkpoint directory, not a GGUF file of {str(name)[:99]}"
            )
        family, read = read_gguf(file.metadata, frozenset(file.tensors))
        self._is_file_alone = True
        self._model = native = Native(family, self._scaled(read))
        self.weights = GgufWeights(file, native.config, native.family)

    def _open_gguf_module(self, file: GgufFile, module: GgufModule, model_impl: str) -> None:
        """Open a file whose keys become a config.json, which a native family may compute, too."""
        config = read_gguf_module(module, file)

        def open_module() -> OpenGeneric | OpenEncoder:
            self.weights = GgufModuleWeights(file, module, config["num_hidden_layers"])
            if not produces_vectors(architecture_of(config)):
                return self._open_generic(None, config, trusts_code=False)
            check(self._rope is None, f"--rope-scaling: {module.gguf_name} gives vectors, and is not scaled")
            return _open_encoder(None, config, trusts_code=False)

        is_native_only = model_impl == "native"
        check(
            not is_native_only or has_family(architecture_of(config)),
            f"--model-impl native: no native family has GGUF files of {module.gguf_name}",
        )
        if (found := self._read_native(config, model_impl)) is None:
            self._model = open_module()
            return
        family, read = found
        self._open_module = None if is_native_only else open_module
        self._model = native = Native(family, self._scaled(read))
        self.weights = GgufWeights(file, native.config, family)

    def _open_vision(self, file: GgufFile, files: ModelFiles, model_impl: str) -> bool:
        """Open the projector beside a text model; return whether the model accepts images.

        Raises:
            ModelLoadError: if the administrator named one that cannot be used. Any other is left out.
        """
        if files.projector is None:
            return False
        if model_impl == "native":
            check(
                not files.is_projector_named,
                "--model-impl native reads no images, and --mmproj is for them: leave one out",
            )
            return False
        from tgi_asgi.models.loading.gguf_vision import check_fits, open_vision, processor_of

        is_certain = files.is_projector_named or shares_name(files.path.name, files.projector.name)
        try:
            vision, weights = open_vision(file, files.projector, is_certain=is_certain)
            try:
                model = self._open_generic(None, vision.config, trusts_code=False)
                check_fits(weights, model.shapes())
                model.packed_tensors(weights)  # refuses tensors without a place
                self._image_processor = model.image_processor(processor_of(vision, file.metadata))
            except Exception:
                weights.close_tower()
                raise
        except ModelLoadError as error:
            if files.is_projector_named:
                raise ModelLoadError(f"--mmproj {files.projector}: {error}") from error
            logger.warning("for text only, as %s cannot be used: %s", files.projector, error)
            return False
        except Exception as error:  # a damaged file may make the code of `transformers` raise anything
            if files.is_projector_named:
                raise
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            logger.warning("for text only, as %s cannot be used: %s", files.projector, reason, exc_info=True)
            return False
        logger.info("images are read by %s", files.projector)
        self.weights, self._model = weights, model
        self.companions = GgufCompanions(file, vision.tokens)
        if model_impl == "auto":
            self._use_native_text(model, partial(open_gguf_text, file, weights))
        return True

    def _open_checkpoint(self, files: ModelFiles, model_impl: str, *, trusts_code: bool) -> None:
        directory = files.path
        self.companions = CheckpointCompanions(directory, files.adapter)
        config = with_architecture(read_config_file(directory))
        checkpoint = Checkpoint.open(directory)
        if files.adapter is not None:

            def file_names(names: Iterable[str]) -> Mapping[str, str]:
                return _file_names(directory, as_in_transformers(config), names, trusts_code)

            checkpoint = merged = MergedCheckpoint(checkpoint, config, files.adapter, file_names)
            config, self._vocab_size = merged.fitted_config(), merged.vocab_size
        architecture = architecture_of(config)
        self.weights = SafetensorsWeights(directory, Quantisation.from_json(config), checkpoint)

        def open_module() -> OpenGeneric | OpenEncoder:
            if not produces_vectors(architecture):
                return self._open_generic(directory, as_in_transformers(config), trusts_code)
            check(self._rope is None, f"--rope-scaling: {architecture} gives vectors, and is not scaled")
            return _open_encoder(directory, config, trusts_code)

        if (found := self._read_native(config, model_impl)) is not None:
            self._open_module = open_module if model_impl == "auto" else None
            self._model = self._open_native(*found)
            return
        self._model = module = open_module()
        if model_impl == "auto" and module.kind == "generic":
            self._use_native_text(module, partial(open_checkpoint_text, self.weights, module))

    def _use_native_text(
        self, module: OpenGeneric, open_text: Callable[[NativeText], VisionText | None]
    ) -> None:
        """Let a native family compute the text of a vision model, and the module only images, if it can."""
        text = module.native_text()
        try:
            if text is None or (found := open_text(text)) is None:
                return
            config = text.with_images(self._stretched(found.config))
            check(
                config.vocab_size == module.config.vocab_size, "its head has other tokens than its embedding"
            )
        except ModelLoadError as error:
            self.why_generic = str(error)
            return
        whole, self.weights = self.weights, found.weights

        def open_module() -> OpenGeneric:
            self.weights = whole
            return module

        self._open_module = open_module
        config = replace(config, architecture=module.config.architecture)
        self._model = Native(found.family, config, Images(module, text, found.weights))

    def leave_to_module(self, reason: str) -> None:
        """Let the code of `transformers` compute the model on a GPU, not its native family, for this reason.

        Raises:
            ModelLoadError: if it cannot, or must not: for most GGUF files, or with `--model-impl native`.
        """
        if self._open_module is None:
            other = "load a safetensors checkpoint" if self._is_file_alone else "use --model-impl auto"
            raise ModelLoadError(f"{reason}: {other}, or hide the GPU with CUDA_VISIBLE_DEVICES=")
        self.why_generic = reason
        if isinstance(self.weights, CheckpointWeights):
            self.weights = self.weights.files
        self._model = self._open_module()
        self.config = self._model.config

    def _read_native(self, config: Mapping[str, Any], model_impl: str) -> tuple[Family, ModelConfig] | None:
        """Return the native family that computes the model, and its configuration; None if none does."""
        if model_impl == "native":
            name = architecture_of(config)
            check(
                not config.get("vision_config") or has_family(name),
                f"--model-impl native: {name} accepts images, so that it needs transformers' code for them; "
                "--model-impl auto computes its text natively if it can",
            )
            return read_config(config)
        if model_impl == "auto" and is_native(config):
            try:
                return read_config(config)
            except NotInFamily as error:
                self.why_generic = str(error)
        return None

    def _open_generic(
        self, directory: Path | None, config: Mapping[str, Any], trusts_code: bool
    ) -> OpenGeneric:
        from tgi_asgi.models.generic.open import OpenGeneric

        try:
            return OpenGeneric(
                directory, config, trusts_code=trusts_code, rope=self._rope, vocab_size=self._vocab_size
            )
        except ModelLoadError as error:
            if not self.why_generic:
                raise
            raise ModelLoadError(f"{self.why_generic}; and transformers' code: {error}") from error

    def _open_native(self, family: Family, read: ModelConfig) -> Native:
        assert isinstance(self.weights, SafetensorsWeights)
        self.weights = weights = CheckpointWeights(self.weights, family.model.checkpoint, read)
        read = with_its_head(read, weights, self.weights)
        return Native(family, self._stretched(read))

    def _stretched(self, config: ModelConfig) -> ModelConfig:
        """Return a checkpoint's configuration with the context to which its rotary embedding stretches it."""
        return stretch_context(config) if self._rope is None else self._scaled(config)

    def _scaled(self, config: ModelConfig) -> ModelConfig:
        return config if self._rope is None else scale_positions(config, self._rope)

    @property
    def kind(self) -> Literal["native", "generic", "encoder"]:
        """Who computes the model: a native family, or the code of `transformers`, of a decoder or encoder."""
        return self._model.kind

    @property
    def is_generic(self) -> bool:
        """Whether the code of `transformers` computes the model."""
        return self.kind != "native"

    @property
    def uses_projector(self) -> bool:
        """Whether a GGUF model accepts images, by a second file that `--mmproj none` leaves out."""
        return self._image_processor is not None

    def may_become_native(self, max_positions: int, has_kernels: Callable[[ModelConfig], bool]) -> bool:
        """Return whether a module has the common shape, so that `load` may make a native model of it."""
        if self._model.kind != "generic":
            return False
        config = self._model.common_config(max_positions)
        return config is not None and has_kernels(config)

    def load(
        self, arithmetic: ops.Arithmetic, max_positions: int, weights: Weights | None = None,
        has_kernels: Callable[[ModelConfig], bool] = lambda config: True,
    ) -> ServedModel:  # fmt: skip
        """Load the model; `weights` may replace the files' own, for example to track reading.

        Args:
            has_kernels: Whether the device computes this configuration natively; asked before a module
                becomes a native model.

        Raises:
            ModelLoadError: if a tensor is missing, does not fit or is unknown.
        """
        weights = self.weights if weights is None else weights
        try:
            if self._model.kind == "generic":
                return self._model.load(named(weights), arithmetic, max_positions, has_kernels)
            if self._model.kind == "encoder":
                return self._model.load(named(weights), arithmetic, max_positions)
            model = self._model.load(weights, arithmetic, max_positions)
        except ValueError as error:  # packing refuses values that no header shows
            alone = "; --mmproj none serves it for text only" if self.uses_projector else ""
            raise ModelLoadError(f"a weight of the model cannot be used: {error}{alone}") from error
        refuse_unread(weights.unread(), self._model.unused)
        return model

    def cuts(self, count: int, *, reads_images: bool = False) -> list[ModelCut]:
        """Return each of `count` shards' part of the model, before any of it is read.

        Args:
            reads_images: Whether the shards can have images' rows from the first one.

        Raises:
            ModelLoadError: if several shards cannot compute it, or it has too few parts.
        """
        config, alone = self.config, ", or add --mmproj none" if self.uses_projector else ""
        if not isinstance(self._model, Native) or not isinstance(config, ModelConfig):
            why = f" ({self.why_generic})" if self.why_generic else ""
            raise ModelLoadError(
                f"--num-shard {count}: {config.architecture} is computed by transformers' code{why}, which "
                f"is not split: leave --num-shard out{alone}"
            )
        found = unsplit(config, self._model.family, reads_images=reads_images)
        check(
            found is None,
            f"--num-shard {count}: {config.architecture} has {found}, which several shards do not compute: "
            f"leave --num-shard out{alone}",
        )
        assert isinstance(self.weights, GgufWeights | CheckpointWeights | VisionWeights)
        return split(config, self._model.family, self.weights, count)

    def use_cut(self, cut: ModelCut) -> None:
        """Load only this part of the model; `config` reflects it from now on."""
        assert isinstance(self._model, Native)
        self._model = replace(self._model, config=replace(self._model.config, cut=cut))
        self.config = self._model.config

    def packed_tensors(self) -> list[tuple[str, int]]:
        """Return the format and number of elements of each tensor that will be held. Call before `load`.

        Raises:
            ModelLoadError: if the code of `transformers` has no place for a tensor.
        """
        if isinstance(self._model, Native):
            return self._model.packed_tensors(self.weights)
        return self._model.packed_tensors(named(self.weights))

    def kv_scales(self) -> list[tuple[float, float]] | None:
        """Return each layer's scales of keys and of values from a checkpoint; None for a GGUF file.

        Raises:
            ModelLoadError: if they contradict each other, or are not one per layer.
        """
        return self.weights.kv_scales() if isinstance(self.weights, CheckpointWeights) else None

    def table_bytes(self, max_positions: int) -> int:
        """Estimate the bytes of `transformers`' rotary tables; 0 for native families (see `rotary_dims`)."""
        return 0 if isinstance(self._model, Native) else self._model.table_bytes(max_positions)

    def read_text(self) -> tuple[Tokenizer, ChatTemplate | None]:
        """Build the tokenizer and compile the chat template; may run while weights are loaded."""
        return self.companions.text(self._override)

    def read_image_processor(self) -> ImageProcessor | None:
        """Build the image processor of a model that accepts images; may precede loading its weights."""
        model = self._model
        module = model.images.module if isinstance(model, Native) and model.images is not None else model
        if isinstance(module, Native) or module.kind != "generic":
            return None
        if isinstance(self.companions, CheckpointCompanions):
            return module.image_processor(self.companions.directory)
        return self._image_processor

    def close(self) -> None:
        """Unmap the weights."""
        self.weights.close()

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open_encoder(directory: Path | None, config: Mapping[str, Any], trusts_code: bool) -> OpenEncoder:
    from tgi_asgi.models.generic.open_encoder import OpenEncoder

    return OpenEncoder(directory, config, trusts_code=trusts_code)


def _file_names(
    directory: Path, config: Mapping[str, Any], names: Iterable[str], trusts_code: bool
) -> Mapping[str, str]:
    """Return `weights.file_names` of the module that `transformers` makes; none if it makes none."""
    from tgi_asgi.models.generic.build import build
    from tgi_asgi.models.generic.weights import file_names

    try:
        return file_names(build(directory, config, trusts_code=trusts_code), names)
    except ModelLoadError:
        return {}
