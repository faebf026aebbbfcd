"""Leaves the projector of a GGUF model out if the settings are for models that accept no images."""

from __future__ import annotations

import logging
from dataclasses import replace

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)


def with_usable_projector(files: ModelFiles, settings: Settings, *, is_on_gpu: bool) -> ModelFiles:
    """Return a model's files, without a projector that only lies beside it if the settings exclude it.

    Such a file must not end a start that succeeds without it.

    Raises:
        ModelLoadError: if the administrator named the projector.
    """
    if files.projector is None or settings.model_impl != "auto":  # with others, the code is named already
        return files
    found = _setting_for_texts(settings, is_on_gpu)
    if found is None:
        return files
    why = "it is not for models that accept images"
    if files.is_projector_named:
        raise ModelLoadError(
            f"{found} cannot be combined with --mmproj: {why}. Leave one out, or use --mmproj none"
        )
    logger.warning(
        "for text only: %s excludes %s, as %s. To accept images, leave the setting out; --mmproj none says "
        "that the file is not meant",
        found, files.projector, why,
    )  # fmt: skip
    return replace(files, projector=None)


def _setting_for_texts(settings: Settings, is_on_gpu: bool) -> str | None:
    """Return a setting that is not for models that accept images; None if there is none.

    On a GPU, some of them are computed by the code of `transformers`, which no file name says.
    """
    found = {f"--num-shard {settings.num_shard}": settings.num_shard > 1}
    if is_on_gpu:
        found |= {
            "--batch-invariant": settings.batch_invariant,
            "serving LoRA adapters on a GPU": settings.serves_adapters,
            f"--kv-cache-dtype {settings.kv_cache_dtype}": settings.kv_cache_dtype != "auto",
        }
    return next((name for name, is_given in found.items() if is_given), None)
