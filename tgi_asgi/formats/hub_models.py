"""Choose the files of a Hub repository that make up a model, and fetch them: configuration before weights.

A model that cannot be served is thereby refused before gigabytes of it are downloaded.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats import hub
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.gguf_names import GgufModel, choose, models_of, projector_of
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
    repository = _Repository(repo_id, revision, progress, hub.list_files(repo_id, revision))
    names = repository.listing.names
    ggufs = models_of(names)
    if quant is not None and not ggufs:
        raise ModelLoadError(f"{repository.where} has no GGUF file that {quant!r} could name")
    if ggufs and (quant is not None or not _has_checkpoint(repository.listing)):
        return _fetch_gguf(repository, ggufs, quant, with_projector=with_projector)
    small = _matching(repository.listing, (*_CONFIGURATION, *(_CODE if with_code else ())))
    if is_adapter(names):
        return _fetch_adapter(repository, small)
    folder, commit = repository.fetch(small) if small else (Path(), "")
    if "config.json" in small and is_draft_heads(read_config_file(folder)):
        return Fetched("draft heads", folder, commit)
    Quantisation.from_json(servable_config(repo_id, names, folder))
    weights = [*_weights(repository, folder), *_matching(repository.listing, (_DENSE,))]
    return Fetched("directory", *repository.fetch([*small, *weights]))


class _Repository(NamedTuple):
    """A repository at a revision, and its files."""

    repo_id: str
    revision: str | None
    progress: Progress
    listing: hub.Listing

    @property
    def where(self) -> str:
        """Where its files are, for messages."""
        return f"the Hub's cache of {self.repo_id}" if self.listing.is_cached else self.repo_id

    def fetch(self, names: Sequence[str]) -> tuple[Path, str]:
        """Fetch these files; return the snapshot's directory, and its commit."""
        exactly = [glob.escape(name) for name in names]
        return hub.fetch(
            self.repo_id, self.revision, self.progress, patterns=exactly, is_cached=self.listing.is_cached
        )


def _fetch_gguf(
    repository: _Repository, ggufs: Collection[GgufModel], quant: str | None, *, with_projector: bool
) -> Fetched:
    where = repository.where
    model = choose(ggufs, quant, where)
    if quant is None:
        logger.info("%s: using %s; name REPOSITORY:NAME to use another", where, model.label)
    if model.num_missing:
        raise ModelLoadError(f"{where} lacks {model.num_missing} of the parts of {model.files[0]}")
    projector = projector_of(model.files[0], repository.listing.names) if with_projector else None
    folder, commit = repository.fetch([*model.files, *([] if projector is None else [projector])])
    tower = None if projector is None else folder / projector
    return Fetched("gguf", folder / model.files[0], commit, tower)


def _fetch_adapter(repository: _Repository, configuration: Sequence[str]) -> Fetched:
    names = repository.listing.names
    if not set(ADAPTER_FILES) <= names:
        pickled = "; pickles are never read" if "adapter_model.bin" in names else ""
        raise ModelLoadError(f"{repository.where} is an adapter without {ADAPTER_WEIGHTS}{pickled}")
    return Fetched("adapter", *repository.fetch([*configuration, *ADAPTER_FILES]))


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


def _weights(repository: _Repository, folder: Path) -> list[str]:
    """Return the files of a checkpoint, as `Checkpoint.open` chooses them."""
    listed = repository.listing.names
    weight_map = read_index(folder / INDEX_NAME) if INDEX_NAME in listed else None
    names = choose_files(repository.where, listed, weight_map)
    missing = [name for name in names if name not in listed]
    if missing:
        raise ModelLoadError(f"{repository.where} has no {missing[0]}, which its {INDEX_NAME} names")
    return names
