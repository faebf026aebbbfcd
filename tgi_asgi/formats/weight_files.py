"""The safetensors files of a model directory: which they are, and all their tensors as one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.files import read_json
from tgi_asgi.formats.safetensors import SafeTensor, SafetensorsFile

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_NO_WEIGHTS = ("adapter_", "consolidated", "pytorch_lora_weights", "ip-adapter")  # beginnings of names


class Checkpoint:
    """The tensors of a model directory, in one safetensors file or several.

        checkpoint = Checkpoint.open("/models/llama")
        checkpoint.tensor("model.norm.weight").shape     # (576,)
        checkpoint.raw("model.norm.weight")              # uint8 view

    `choose_files` selects the files of a directory.
    """

    def __init__(self, files: dict[str, SafetensorsFile]) -> None:
        self._files = files  # by tensor name

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Open all shards, with the tensors of the index and any that the index omits.

        Raises:
            ModelLoadError: if there are no safetensors (pickled checkpoints are never read), if the index
                names a file outside the directory or a tensor that no file has, if two files have the same
                tensor, or if a file is damaged.
        """
        directory = Path(directory)
        try:
            names = {entry.name for entry in directory.iterdir()}
        except OSError as error:
            raise ModelLoadError(f"cannot read {directory}: {error.strerror or error}") from None
        weight_map = read_index(directory / INDEX_NAME) if INDEX_NAME in names else None
        chosen = choose_files(str(directory), names, weight_map)
        shards = {name: SafetensorsFile.open(directory / name) for name in chosen}
        files: dict[str, SafetensorsFile] = {}
        for shard in shards.values():
            for tensor in shard.tensors:
                named = shards.get((weight_map or {}).get(tensor, ""))
                if tensor in files and named is None:
                    raise ModelLoadError(
                        f"tensor {tensor!r} is both in {files[tensor].path} and {shard.path}"
                    )
                if tensor not in files or shard is named:
                    files[tensor] = shard
        if weight_map is not None and set(chosen) == set(weight_map.values()):
            lost = next((tensor for tensor in weight_map if tensor not in files), None)
            if lost is not None:
                raise ModelLoadError(
                    f"{directory}: no file has the tensor {lost!r}, which {INDEX_NAME} names"
                )
        return cls(files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def tensor(self, name: str) -> SafeTensor:
        """Return a tensor's location; raise `ModelLoadError` if there is none of that name."""
        return self._file(name).tensors[name]

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes, or some of them, as `SafetensorsFile.raw`."""
        return self._file(name).raw(name, start, stop)

    def close(self) -> None:
        """Release the mappings."""
        for file in self._files.values():
            file.close()

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._files[name]
        except KeyError:
            raise ModelLoadError(f"the checkpoint has no tensor {name!r}") from None


def read_index(path: Path) -> dict[str, str]:
    """Read the file of each tensor; all files are in the index's own directory.

    Raises:
        ModelLoadError: if the index is damaged, or names other locations.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{path}: `weight_map` must be an object that names each tensor's file")
    for tensor, name in weight_map.items():
        # The index is untrusted: it may name only files of this directory.
        if (
            not isinstance(name, str)
            or not name.endswith(".safetensors")
            or name.startswith(".")
            or any(character in name for character in "/\\\0")
        ):
            raise ModelLoadError(f"{path}: {tensor!r} lies in {name!r}, not a plain .safetensors name")
    return weight_map


def weight_names(names: Iterable[str]) -> list[str]:
    """Return the top-level safetensors files that may be a model's: no adapters, no second copies."""
    found = [name for name in sorted(names) if name.endswith(".safetensors") and "/" not in name]
    return [name for name in found if not name.startswith(_NO_WEIGHTS)]


def choose_files(where: str, names: Collection[str], weight_map: Mapping[str, str] | None) -> list[str]:
    """Return the files of a checkpoint: the single one, those of its index, or its only ones.

    If there are both a single file and an index of others, the single file is used, as by `transformers`.

    Args:
        where: Directory or repository, for messages.
        names: Names of all its files.
        weight_map: Map of its index; it may name files that are not there.

    Raises:
        ModelLoadError: if it is unclear which of several files belong together.
    """
    listed = sorted(set(() if weight_map is None else weight_map.values()))
    if SINGLE_NAME in names and SINGLE_NAME not in listed:
        return [SINGLE_NAME]
    if listed:
        return listed
    found = weight_names(names)
    parts = [_SHARD.fullmatch(name) for name in found]
    stems = {(part["stem"], part["count"]) for part in parts if part is not None}
    is_whole = None not in parts and len(stems) == 1 and len(found) == int(next(iter(stems))[1])
    if len(found) == 1 or is_whole:
        return found
    what = f"{len(found)} .safetensors files and no {INDEX_NAME}" if found else "no .safetensors file"
    raise ModelLoadError(f"{where} has {what}; pickled checkpoints (.bin, .pt) are never read")
