"""What the names of GGUF files say: which files are parts of one model, and how its weights are quantised.

    models = models_of(["a/m-Q4_K_M-00001-of-00002.gguf", "a/m-Q4_K_M-00002-of-00002.gguf", "m-Q8_0.gguf"])
    choose(models, "q8_0", "org/repo-GGUF").files         # ("m-Q8_0.gguf",)

`sources.py` asks for a repository's or a directory's files, `gguf.py` for the parts of one model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tgi_asgi.errors import ModelLoadError

PREFERRED = ("Q4_K_M", "Q8_0")  # where nobody says which
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
# Files beside a model: of what sees or hears, of statistics for quantising, of drafts.
_NO_MODEL = re.compile(r"mmproj|imatrix|^mtp-", re.IGNORECASE)
_QUANT = re.compile(
    r"(?<![a-z0-9])(?:ud-)?(?:i?q\d+(?:_\w+)*|t?q\d+_\d+|mxfp4(?:_moe)?|nvfp4|b?f16|f32|fp16|fp32)(?![a-z0-9_])",
    re.IGNORECASE,
)
_MOST_LISTED = 40


@dataclass(frozen=True, slots=True)
class Part:
    """What a name says of a file that is one of several: `m-00002-of-00003.gguf`."""

    stem: str
    number: int  # from 1
    count: int
    suffix: str

    @classmethod
    def of(cls, name: str) -> Part | None:
        """Read a name; None: it is not of a part."""
        found = _PART.fullmatch(name)
        if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
            return None
        return cls(found["stem"], int(found["number"]), int(found["count"]), found["suffix"])

    def name_of(self, number: int) -> str:
        """Return the name of another part of the same model."""
        return f"{self.stem}-{number:05}-of-{self.count:05}{self.suffix}"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """One model of a repository.

    Attributes:
        files: its parts in their order, or the one file; paths inside the repository.
        num_missing: parts that are named by others, and not there.
        quant: as the name has it, `Q4_K_M`; empty where it says nothing.
    """

    files: tuple[str, ...]
    num_missing: int
    quant: str

    @property
    def label(self) -> str:
        """What names it behind the colon of an id."""
        return self.quant or self.files[0]


def models_of(names: Iterable[str]) -> list[GgufModel]:
    """Return the models among a repository's files, by name; those of images and the like are left out."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        if not name.lower().endswith(".gguf") or _NO_MODEL.search(name.rpartition("/")[2]):
            continue
        part = Part.of(name)
        groups.setdefault((name, 1) if part is None else (part.stem, part.count), []).append(name)
    return [
        GgufModel(tuple(files), count - len(files), quant_of(files[0]))
        for (_, count), files in groups.items()
    ]


def quant_of(path: str) -> str:
    """Return the quantisation that a path names, in upper case: the file's, else the folder's."""
    folder, _, name = path.rpartition("/")
    for text in (name.rpartition(".")[0], folder):
        # Names join words by any of `-._`, and quantisations have underscores of their own.
        found = [match.group() for match in _QUANT.finditer(text)]
        if found:
            return found[-1].upper()
    return ""


def choose(models: Collection[GgufModel], quant: str | None, where: str) -> GgufModel:
    """Return the model that is named, or that most people take: Q4_K_M, else Q8_0, else the first by name.

    Args:
        quant: a quantisation in any case, or the path or name of one of a model's files.
        where: the repository, for messages.

    Raises:
        ModelLoadError: none is named so, or several are; the message lists what there is.
    """
    if quant is None:
        whole = [model for model in models if not model.num_missing] or list(models)
        ranked = (model for wanted in PREFERRED for model in whole if model.quant == wanted)
        return next(ranked, whole[0])
    wanted = quant.casefold()
    for found in (
        [model for model in models if any(wanted == file.casefold() for file in model.files)],
        [model for model in models if any(wanted == _base(file) for file in model.files)],
        [model for model in models if wanted == model.quant.casefold()],
        [model for model in models if _has_word(model.files[0], wanted)],
    ):
        if len(found) > 1:
            listed = _listed(model.files[0] for model in found)
            raise ModelLoadError(f"{where} has several models that {quant!r} names; name a file: {listed}")
        if found:
            return found[0]
    listed = _listed(model.label for model in models)
    raise ModelLoadError(f"{where} has no {quant!r}; it has {listed}")


def _base(path: str) -> str:
    return path.rpartition("/")[2].casefold()


def _has_word(path: str, word: str) -> bool:
    """Say whether a path has a word: UD-Q4_K_XL has Q4_K_XL, but Q4_K_M has no Q4_K."""
    return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9_])", path.casefold()) is not None


def _listed(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    return ", ".join(found[:_MOST_LISTED]) + more
