"""Opens a checkpoint directory: for its native family if that computes the model, else as a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.formats.weight_files import Checkpoint
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import Family
from tgi_asgi.models.loading.checkpoint import CheckpointWeights, with_its_head
from tgi_asgi.models.loading.merged import MergedCheckpoint
from tgi_asgi.models.loading.modules import Module, open_module
from tgi_asgi.models.loading.native import Fallback, Native, no_fallback
from tgi_asgi.models.loading.native_text import with_native_text
from tgi_asgi.models.loading.options import NotNative, OpenOptions
from tgi_asgi.models.loading.recognise import as_in_transformers, with_architecture
from tgi_asgi.models.loading.safetensors import SafetensorsWeights
from tgi_asgi.models.loading.vision import open_checkpoint_text


def open_checkpoint(files: ModelFiles, options: OpenOptions) -> Native | Module:
    """Open a checkpoint, with the adapter that is merged into it, if any.

    Raises:
        ModelLoadError: if a file is missing or damaged, or describes something unsupported.
    """
    directory = files.path
    config = with_architecture(read_config_file(directory))
    checkpoint, vocab_size = Checkpoint.open(directory), None
    if files.adapter is not None:
        names = partial(_file_names, directory, config, options.trusts_code)
        checkpoint = merged = MergedCheckpoint(checkpoint, config, files.adapter, names)
        config, vocab_size = merged.fitted_config(), merged.vocab_size
    weights = SafetensorsWeights(directory, Quantisation.from_json(config), checkpoint)

    def as_module(why: str) -> Module:
        named = as_in_transformers(config)
        return open_module(directory, named, weights, options, why, vocab_size=vocab_size)

    found = options.read_native(config)
    if not isinstance(found, NotNative):
        return _open_native(*found, weights, options, as_module)
    module = as_module(found.why)
    if module.kind == "generic" and options.model_impl == "auto":
        return with_native_text(module, partial(open_checkpoint_text, weights, module.module), options)
    return module


def _open_native(
    family: Family,
    read: ModelConfig,
    files: SafetensorsWeights,
    options: OpenOptions,
    as_module: Fallback,
) -> Native:
    weights = CheckpointWeights(files, family.model.checkpoint, read)
    config = options.stretched(with_its_head(read, weights, files))
    may_leave = options.model_impl == "auto"
    return Native(family, config, weights, as_module if may_leave else no_fallback("use --model-impl auto"))


def _file_names(
    directory: Path, config: dict[str, Any], trusts_code: bool, names: Iterable[str]
) -> Mapping[str, str]:
    """Return `weights.file_names` of the module that `transformers` makes; none if it makes none."""
    from tgi_asgi.models.generic.build import build
    from tgi_asgi.models.generic.weights import file_names

    try:
        return file_names(build(directory, as_in_transformers(config), trusts_code=trusts_code), names)
    except ModelLoadError:
        return {}
