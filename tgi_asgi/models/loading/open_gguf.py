"""Opens a GGUF file: for its native family if that computes the model, else as a module; with a projector."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from tgi_asgi.errors import ModelLoadError, check
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.gguf_names import shares_name
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.gguf_module import GgufModule, find_module
from tgi_asgi.models.loading.companions import GgufCompanions
from tgi_asgi.models.loading.gguf import GgufWeights
from tgi_asgi.models.loading.gguf_module import GgufModuleWeights
from tgi_asgi.models.loading.modules import GenericModule, Module, open_generic, open_module
from tgi_asgi.models.loading.native import Native, no_fallback
from tgi_asgi.models.loading.native_text import OpenText, with_native_text
from tgi_asgi.models.loading.options import NotNative, OpenOptions
from tgi_asgi.models.loading.recognise import architecture_of, read_gguf, read_gguf_module
from tgi_asgi.models.loading.vision import open_gguf_text
from tgi_asgi.models.registry import has_family

logger = logging.getLogger(__name__)


def open_gguf(files: ModelFiles, options: OpenOptions) -> tuple[Native | Module, GgufCompanions]:
    """Open a GGUF file, with the projector beside it, if any; return the model and what else the files have.

    Raises:
        ModelLoadError: if a file is damaged, or describes something unsupported.
    """
    file = GgufFile.open(files.path)
    seeing = _open_with_projector(file, files, options)
    if seeing is not None:
        return seeing
    companions, name = GgufCompanions(file), file.metadata.get("general.architecture")
    module = find_module(name)
    if module is not None:
        return _open_module_file(file, module, options), companions
    if options.model_impl == "transformers":
        raise ModelLoadError(
            f"--model-impl transformers needs a checkpoint directory, not a GGUF file of {str(name)[:99]}"
        )
    family, read = read_gguf(file.metadata, frozenset(file.tensors))
    config, fallback = options.scaled(read), no_fallback("load a safetensors checkpoint")
    return Native(family, config, GgufWeights(file, config, family), fallback), companions


def _open_module_file(file: GgufFile, module: GgufModule, options: OpenOptions) -> Native | Module:
    """Open a file whose keys become a config.json, which a native family may compute, too."""
    config = read_gguf_module(module, file)

    def as_module(why: str) -> Module:
        weights = GgufModuleWeights(file, module, config["num_hidden_layers"])
        return open_module(None, config, weights, options, why)

    is_native_only = options.model_impl == "native"
    check(
        not is_native_only or has_family(architecture_of(config)),
        f"--model-impl native: no native family has GGUF files of {module.gguf_name}",
    )
    found = options.read_native(config)
    if isinstance(found, NotNative):
        return as_module(found.why)
    family, read = found
    scaled = options.scaled(read)
    fallback = no_fallback("use --model-impl auto") if is_native_only else as_module
    return Native(family, scaled, GgufWeights(file, scaled, family), fallback)


def _open_with_projector(
    file: GgufFile, files: ModelFiles, options: OpenOptions
) -> tuple[Native | GenericModule, GgufCompanions] | None:
    """Open a text model with the projector beside it; None if there is none, or it cannot be used.

    Raises:
        ModelLoadError: if the administrator named one that cannot be used. Any other is left out.
    """
    if files.projector is None:
        return None
    if options.model_impl == "native":
        check(
            not files.is_projector_named,
            "--model-impl native reads no images, and --mmproj is for them: leave one out",
        )
        return None
    is_certain = files.is_projector_named or shares_name(files.path.name, files.projector.name)
    try:
        module, companions, open_text = _open_both(file, files.projector, options, is_certain=is_certain)
    except ModelLoadError as error:
        if files.is_projector_named:
            raise ModelLoadError(f"--mmproj {files.projector}: {error}") from error
        logger.warning("for text only, as %s cannot be used: %s", files.projector, error)
        return None
    except Exception as error:  # a damaged file may make the code of `transformers` raise anything
        if files.is_projector_named:
            raise
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        logger.warning("for text only, as %s cannot be used: %s", files.projector, reason, exc_info=True)
        return None
    logger.info("images are read by %s", files.projector)
    if options.model_impl == "auto":
        return with_native_text(module, open_text, options), companions
    return module, companions


def _open_both(
    file: GgufFile, projector: Path, options: OpenOptions, *, is_certain: bool
) -> tuple[GenericModule, GgufCompanions, OpenText]:
    """Open a text model's file with a projector; return also what opens the text for its native family.

    Args:
        is_certain: As for `open_vision`.
    """
    from tgi_asgi.models.loading.gguf_vision import check_fits, open_vision, processor_of

    vision, weights = open_vision(file, projector, is_certain=is_certain)
    try:
        opened = open_generic(None, vision.config, weights, options)
        check_fits(weights, opened.module.shapes())
        opened.packed_tensors()  # refuses tensors without a place
        processor = opened.module.image_processor(processor_of(vision, file.metadata))
    except Exception:
        weights.close_tower()
        raise
    companions = GgufCompanions(file, vision.tokens)
    return replace(opened, processor=processor), companions, lambda text: open_gguf_text(file, weights)
