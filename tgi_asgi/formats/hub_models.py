"""Choose the files of a Hub repository that make up a model, and fetch them: configuration before weights.

A model that cannot be served is thereby refused before gigabytes of it are downloaded.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats import hub
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.gguf_names import choose, models_of, projector_of
from tgi_asgi.formats.kinds import is_adapter, is_draft_heads, servable_config
from tgi_asgi.formats.peft_config import ADAPTER_FILES, ADAPTER_WEIGHTS
from tgi_asgi.formats.quantised import Quantisation
from tgi_asgi.formats.weight_files import INDEX_NAME, choose_files, read_index, weight_names
from tgi_asgi.types import Progress

logger = logging.getLogger(__name__)

_CONFIGURATION = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_CODE = ("*.py",)  # code that a model brings, for administrators who trust it
_OTHER_KINDS = ("original/*", "onnx/*", "openvino/*", "metal/*")  # folders with copies of the model
_DENSE = "*_Dense/model.safetensors"  # of sentence-transformers


class Fetched(NamedTuple):
    """A Hub model on the local disk."""

    kind: Literal["gguf", "directory", "adapter", "draft heads"]
    path: Path  # the .gguf file, or the first of several, or the snapshot's directory (an adapter's own)
    commit: str
    projector: Path | None = None  # vision tower of a GGUF model


def fetch_model(
    repo_id: str, revision: str | None, quant: str | None, progress: Progress, *, with_code: bool = False,
    with_projector: bool = False,
) -> Fetched:  # fmt: skip
    """Choose a model among a repository's files, and fetch it: safetensors if there are any, otherwise GGUF.

    An adapter is fetched alone, and of draft heads only the configuration: it names the base model.

    Args:
        quant: Text after the colon of an id, which selects a GGUF model.
        with_code: Whether to fetch the model's own code, too.
        with_projector: Whether to fetch the vision tower beside a GGUF model, if there is one.

    Raises:
        ModelLoadError: if there is no such repository or no model in it, or it cannot be served or fetched.
    """
    listing = hub.list_files(repo_id, revision)
    where = f"the Hub's cache of {repo_id}" if listing.is_cached else repo_id
    ggufs = models_of(listing.names)
    if quant is not None and not ggufs:
        raise ModelLoadError(f"{where} has no GGUF file that {quant!r} could name")
    if ggufs and (quant is not None or not _has_checkpoint(listing)):
        model = choose(ggufs, quant, where)
        if quant is None:
            logger.info("%s: using %s; name REPOSITORY:NAME to use another", where, model.label)
        if model.num_missing:
            raise ModelLoadError(f"{where} lacks {model.num_missing} of the parts of {model.files[0]}")
        projector = projector_of(model.files[0], listing.names) if with_projector else None
        wanted = [*model.files, *([] if projector is None else [projector])]
        folder, commit = hub.fetch(
            repo_id, revision, progress, patterns=_exactly(wanted), is_cached=listing.is_cached
        )
        tower = None if projector is None else folder / projector
        return Fetched("gguf", folder / model.files[0], commit, tower)
    small = _matching(listing, (*_CONFIGURATION, *(_CODE if with_code else ())))
    folder, commit = Path(), ""
    if is_adapter(listing.names):
        if not set(ADAPTER_FILES) <= listing.names:
            pickled = "; pickles are never read" if "adapter_model.bin" in listing.names else ""
            raise ModelLoadError(f"{where} is an adapter without {ADAPTER_WEIGHTS}{pickled}")
        small += ADAPTER_FILES
    if small:
        folder, commit = hub.fetch(
            repo_id, revision, progress, patterns=_exactly(small), is_cached=listing.is_cached
        )
    if is_adapter(listing.names):
        return Fetched("adapter", folder, commit)
    if "config.json" in small and is_draft_heads(read_config_file(folder)):
        return Fetched("draft heads", folder, commit)
    Quantisation.from_json(servable_config(repo_id, listing.names, folder))
    weights = [*_weights(where, listing, folder), *_matching(listing, (_DENSE,))]
    folder, commit = hub.fetch(
        repo_id, revision, progress, patterns=_exactly([*small, *weights]), is_cached=listing.is_cached
    )
    return Fetched("directory", folder, commit)


def _matching(listing: hub.Listing, patterns: Sequence[str]) -> list[str]:
    """Return the files that match these patterns and belong to the model itself."""
    return [
        name
        for name in sorted(listing.names)
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatchcase(name, pattern) for pattern in _OTHER_KINDS)
    ]


def _has_checkpoint(listing: hub.Listing) -> bool:
    return "config.json" in listing.names and bool(weight_names(listing.names))


def _weights(where: str, listing: hub.Listing, folder: Path) -> list[str]:
    """Return the files of a checkpoint, as `Checkpoint.open` chooses them."""
    weight_map = read_index(folder / INDEX_NAME) if INDEX_NAME in listing.names else None
    names = choose_files(where, listing.names, weight_map)
    missing = [name for name in names if name not in listing.names]
    if missing:
        raise ModelLoadError(f"{where} has no {missing[0]}, which its {INDEX_NAME} names")
    return names


def _exactly(names: Sequence[str]) -> list[str]:
    return [glob.escape(name) for name in names]
