"""The files of a `FamilyCase`: a checkpoint, `transformers`' scores, GGUF files, checkpoints with a fault.

All are made on first use, by `family_maker` and llama.cpp's converter, and kept in build/families.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support.family_case import FamilyCase, Fault
from tests.support.forked import Parent, run_forked
from tests.support.llama_cpp import RELEASE, llama_cpp_source
from tgi_asgi.formats.sources import ModelFiles

STORE = Path(__file__).parents[2] / "build" / "families"
_CONVERTER = Path(__file__).with_name("convert_gguf.py")
_CONVERTER_IMPORTS = (
    "convert_hf_to_gguf", "torch._dynamo", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)  # fmt: skip
_KEPT_S = 30 * 24 * 3600.0
_MIN_EFFECT = 0.03  # least effect of a fault, in `transformers`, on one token's log-probability


@dataclass(frozen=True, slots=True)
class Reference:
    """Results of `transformers` in float32."""

    prompt_ids: list[int]
    token_ids: list[int]  # greedy
    logprobs: np.ndarray  # [n_prompt + n_tokens, vocab] float32, after each token
    rounding: np.ndarray | None = None  # [n_prompt + n_tokens - 1], error of `transformers` in bfloat16

    @property
    def all_ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids


def checkpoint(case: FamilyCase) -> ModelFiles:
    """Return the case's checkpoint."""
    return ModelFiles(case.name, None, "directory", _home(case) / "checkpoint")


def reference(case: FamilyCase) -> Reference:
    """Return the results of `transformers` for the case's checkpoint."""
    with np.load(_home(case) / "reference.npz") as stored:
        return Reference(
            stored["prompt_ids"].tolist(),
            stored["token_ids"].tolist(),
            stored["logprobs"],
            stored["rounding"],
        )


def gguf_file(case: FamilyCase, kind: str) -> ModelFiles:
    """Return the case's checkpoint as llama.cpp's converter writes it, in a type that the case lists."""
    folder = _home(case) / f"gguf-{_key(RELEASE, _CONVERTER.read_text('utf-8'))}"
    if not folder.exists():
        with _made_at(folder) as partial:
            _run_converter(checkpoint(case).path, (*case.gguf, *case.rounded), partial)
    return ModelFiles(case.name, None, "gguf", folder / f"{kind}.gguf")


def faulty_checkpoint(case: FamilyCase, fault: Fault) -> ModelFiles:
    """Return the case's checkpoint with a fault whose effect is confirmed with `transformers`."""
    folder = _home(case) / f"fault-{_key(fault)}"
    if not folder.exists():
        from tests.support import family_maker

        good = reference(case)
        with _made_at(folder) as partial:
            shutil.copytree(checkpoint(case).path, partial, dirs_exist_ok=True)
            family_maker.plant(fault, partial)
            logprobs = family_maker.logprobs(case, partial, good.all_ids)
            rows, ids = np.arange(len(good.all_ids) - 1), good.all_ids[1:]
            effect = np.abs(logprobs[rows, ids] - good.logprobs[rows, ids]).max()
            assert effect > _MIN_EFFECT, f"{case.name}: {fault.name} moves log-probabilities by {effect:.1e}"
    return ModelFiles(f"{case.name}, {fault.name}", None, "directory", folder)


def _home(case: FamilyCase) -> Path:
    """Return the case's folder, which contains its checkpoint and reference."""
    maker = Path(__file__).with_name("family_maker.py").read_text("utf-8")
    versions = [importlib.metadata.version(name) for name in ("transformers", "torch")]
    folder = STORE / case.name / _key(dataclasses.replace(case, faults=()), maker, *versions)
    if not folder.exists():
        from tests.support import family_maker

        with _made_at(folder) as partial:
            arrays = family_maker.make(case, partial / "checkpoint")
            np.savez(partial / "reference.npz", **arrays)  # type: ignore[arg-type]
        for other in folder.parent.glob("[!.]*"):
            if other != folder:  # from an obsolete case, maker or version
                shutil.rmtree(other, ignore_errors=True)
    return folder


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


@contextmanager
def _made_at(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, then rename it into place; of two processes, the second discards its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", ignore_cleanup_errors=True) as scratch:
        partial = Path(scratch) / "made"
        partial.mkdir()
        yield partial
        try:
            partial.rename(folder)
        except OSError:  # a folder that has files is not replaced
            if not folder.exists():
                raise


def convert(model: Path, kinds: tuple[str, ...], folder: Path) -> None:
    """Write `folder`/<kind>.gguf for each kind; what was written for the same files before is copied.

    A kind is a type of weights, or that of a vision tower: mmproj-f32.

    The converter runs in a fork, because it takes 5 s to import llama.cpp's own gguf, torch and transformers.
    """
    kept = converted(model, (_CONVERTER, kinds), lambda partial: _run_converter(model, kinds, partial))
    for kind in kinds:
        shutil.copyfile(kept / f"{kind}.gguf", folder / f"{kind}.gguf")


def converted(model: Path, how: Sequence[object], make: Callable[[Path], None]) -> Path:
    """Return the folder that `make` filled for a model with the same files; it is to be read only.

    Args:
        how: What else decides the result; files count by their text.
    """
    files = sorted(path for path in model.iterdir() if path.is_file())
    contents = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    parts = [each.read_text("utf-8") if isinstance(each, Path) else each for each in how]
    kept = STORE / "converted" / _key(RELEASE, *parts, *contents)
    if not kept.exists():
        with _made_at(kept) as partial:
            make(partial)
        _discard_old(kept.parent)
    os.utime(kept)
    return kept


def _discard_old(converted: Path) -> None:
    """Remove what no test has asked for in a month."""
    for folder in converted.glob("[!.]*"):
        if folder.stat().st_mtime < time.time() - _KEPT_S:
            shutil.rmtree(folder, ignore_errors=True)


def _run_converter(model: Path, kinds: tuple[str, ...], folder: Path) -> None:
    source = llama_cpp_source()
    outputs = [word for kind in kinds for word in (kind, str(folder / f"{kind}.gguf"))]
    parent = Parent(imported=_CONVERTER_IMPORTS, path=(str(source), str(source / "gguf-py")))
    done = run_forked(["tests.support.convert_gguf", str(model), *outputs], {}, parent)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stderr[-3000:]}")
