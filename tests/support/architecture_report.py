"""Make the tiny checkpoint of every architecture and report what transformers itself computes with it.

    python -m tests.support.architecture_report [type ...]

Run it with both ends of the supported range of transformers, then update `architecture_table`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.architecture_table import TYPES
from tests.support.architectures import VOCAB_SIZE, make, piecewise, random_ids, reference


@dataclass(slots=True)
class Row:
    """Properties of one architecture; differences are to `reference`, divided by the largest logit."""

    model_type: str
    class_name: str
    problem: str = ""
    std: float = 0.0
    gap: float = 0.0  # smallest gap between the two largest logits
    prefix: float = 0.0  # difference for a shorter sequence: not 0 if a token depends on later ones
    by_token: float | str = (
        ""  # difference with its own cache, a prompt and then token by token; or the error raised
    )
    by_chunk: float | str = ""  # the same in three chunks
    seconds: float = 0.0

    def __str__(self) -> str:
        head = f"{self.model_type:25} {self.class_name:40}"
        if self.problem:
            return f"{head} {self.problem}"
        caches = (f"{it:.0e}" if isinstance(it, float) else it for it in (self.by_token, self.by_chunk))
        return (
            f"{head} std {self.std:4.2f}  gap {self.gap:.0e}  prefix {self.prefix:.0e}"
            f"  by token {next(caches)}  by chunk {next(caches)}  {self.seconds:.1f} s"
        )


def examine(model_type: str) -> Row:
    """Make a checkpoint and compare what transformers computes with it in several ways."""
    row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "-"))
    ids = random_ids(40, 7)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        try:
            make(model_type, folder)
            found = reference(folder, ids)
            shorter = reference(folder, ids[:27])
        except Exception as error:
            row.problem = _short(error)
            return row
        row.seconds = time.perf_counter() - began
        if found.shape != (len(ids), VOCAB_SIZE) or not np.isfinite(found).all():
            row.problem = f"logits {found.shape}, finite: {np.isfinite(found).all()}"
            return row
        row.std = float(found.std())
        row.gap = float(np.diff(np.sort(found)[:, -2:]).min())
        row.prefix = _difference(shorter, found[:27])
        row.by_token, row.by_chunk = (
            _cached(folder, ids, found, cut) for cut in ([20] + [1] * 20, [9, 17, 14])
        )
    return row


def _cached(folder: Path, ids: list[int], found: np.ndarray, lengths: list[int]) -> float | str:
    try:
        return _difference(piecewise(folder, ids, lengths), found)
    except Exception as error:
        return _short(error)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def main(arguments: Iterable[str] | None = None) -> None:
    """Examine the named types, or all types, and print one line for each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("types", nargs="*", default=TYPES)
    types = parser.parse_args(arguments).types
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for model_type in types:
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            print(examine(model_type), flush=True)


if __name__ == "__main__":
    main()
