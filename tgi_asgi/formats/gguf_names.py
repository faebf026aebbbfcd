"""Parse the names of GGUF files: which files are parts of one model, and how its weights are quantised.

    models = models_of(["a/m-Q4_K_M-00001-of-00002.gguf", "a/m-Q4_K_M-00002-of-00002.gguf", "m-Q8_0.gguf"])
    choose(models, "q8_0", "org/repo-GGUF").files         # ("m-Q8_0.gguf",)
    projector_of("m-Q8_0.gguf", ["m-Q8_0.gguf", "mmproj-m-f16.gguf"])     # "mmproj-m-f16.gguf"

`sources.py` passes the files of a repository or a directory; `gguf.py` looks up the parts of one model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tgi_asgi.errors import ModelLoadError

logger = logging.getLogger(__name__)

PREFERRED = ("Q4_K_M", "Q8_0")  # if the user names none
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
# Files that accompany a model: vision and audio encoders, quantisation statistics, draft models.
_NO_MODEL = re.compile(r"mmproj|imatrix|^mtp-", re.IGNORECASE)
_QUANT = re.compile(
    r"(?<![a-z0-9])(?:ud-)?(?:i?q\d+(?:_\w+)*|t?q\d+_\d+|mxfp4(?:_moe)?|nvfp4|b?f16|f32|fp16|fp32)(?![a-z0-9_])",
    re.IGNORECASE,
)
_PROJECTOR = re.compile(r"mmproj", re.IGNORECASE)
_WORDS = re.compile(r"[a-z0-9]+")
_NO_NAMES = frozenset({"model", "ggml", "gguf"})  # words of names that are of no model in particular
# Of the same projector: bfloat16 is what most models are published in; float32 is twice as large.
_PRECISIONS = ("BF16", "F16", "FP16", "Q8_0", "F32", "FP32")
_MAX_LISTED = 40


@dataclass(frozen=True, slots=True)
class Part:
    """The parts of the name of one file of several: `m-00002-of-00003.gguf`."""

    stem: str
    number: int  # from 1
    count: int
    suffix: str

    @classmethod
    def of(cls, name: str) -> Part | None:
        """Parse a name; return None if it is not the name of a part."""
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
        files: Its parts in order, or the single file; paths inside the repository.
        num_missing: Number of parts that other parts' names imply but that are not there.
        quant: Quantisation as written in the name, `Q4_K_M`; empty if the name has none.
    """

    files: tuple[str, ...]
    num_missing: int
    quant: str

    @property
    def label(self) -> str:
        """The model's name after the colon of an id."""
        return self.quant or self.files[0]


def models_of(names: Iterable[str]) -> list[GgufModel]:
    """Return the models among a repository's files, sorted by name; skip vision encoders and the like."""
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


def projector_of(model: str, names: Iterable[str]) -> str | None:
    """Return the file of a model's vision tower and projector (`mmproj`); None if there is none.

    It lies in the model's folder, or in one above it; the nearest is used, as in llama.cpp. Every word of its
    name must be in the model's, apart from its quantisation: sizes of tensors cannot show that it belongs to
    another model of the same width. Of several in a folder, the one with the most words is used, hence one
    that names no model last; of the same projector, the order is BF16, F16, Q8_0.

    Args:
        model: Path of one of the model's files.
        names: Paths of all files.
    """
    folder, wanted = _folder(model), _words_of(model)

    def rank(name: str) -> tuple[int, int, int, str]:
        quant = quant_of(name.rpartition("/")[2])
        precision = _PRECISIONS.index(quant) if quant in _PRECISIONS else len(_PRECISIONS)
        return -len(_folder(name)), -len(_words_of(name)), precision, name

    near = [
        name
        for name in names
        if name.lower().endswith(".gguf")
        and _PROJECTOR.search(_base(name))
        and folder[: len(_folder(name))] == _folder(name)
        and name != model
    ]
    found = min((name for name in near if _words_of(name) <= wanted), key=rank, default=None)
    if near and found is None:
        logger.warning(
            "%s is not used for images, as its name is not that of %s: --mmproj names the file of a model's "
            "vision tower",
            min(near, key=rank), model,
        )  # fmt: skip
    return found


def shares_name(model: str, projector: str) -> bool:
    """Return whether both files' names have a word, and not only numbers and sizes such as 7b."""
    return any(word[0].isalpha() for word in _words_of(model) & _words_of(projector))


def _folder(path: str) -> list[str]:
    return path.split("/")[:-1]


def _words_of(path: str) -> frozenset[str]:
    """Return the words of a file's name that name a model, not its quantisation or part."""
    name = _base(path).rpartition(".")[0]
    part = Part.of(_base(path))
    text = _QUANT.sub(" ", part.stem if part is not None else name)
    return frozenset(_WORDS.findall(_PROJECTOR.sub(" ", text.casefold()))) - _NO_NAMES


def quant_of(path: str) -> str:
    """Return the quantisation in a path, in upper case: the file name's, or else the folder's."""
    folder, _, name = path.rpartition("/")
    for text in (name.rpartition(".")[0], folder):
        # Names join words with any of `-._`, and quantisation names contain underscores themselves.
        found = [match.group() for match in _QUANT.finditer(text)]
        if found:
            return found[-1].upper()
    return ""


def choose(models: Collection[GgufModel], quant: str | None, where: str) -> GgufModel:
    """Return the named model, or by default the most popular quantisation: Q4_K_M, else Q8_0, else the first.

    Args:
        quant: Quantisation in any case, or the path or name of one of a model's files.
        where: Repository, for messages.

    Raises:
        ModelLoadError: if no model or several models match; the message lists the choices.
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
    """Return whether a path has a word: UD-Q4_K_XL has Q4_K_XL, but Q4_K_M does not have Q4_K."""
    return re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9_])", path.casefold()) is not None


def _listed(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return ", ".join(found[:_MAX_LISTED]) + more
