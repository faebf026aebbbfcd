"""Run checkpoints on the generic path, in steps like an engine's, and compare with `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from tests.support import architectures
from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.family import Model, record
from tgi_asgi.models.generic.backend import CpuBackend
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.ops.adapters import NativeAdapter
from tgi_asgi.runner.programs import Program

BLOCK_SIZE, MAX_CONTEXT = 16, 64
# Two lengths beyond every window and chunk of the tiny models (12) and beyond a block, and one within a
# block.
LENGTHS = (37, 29, 11)

# (sequence, first position, tokens) of each row; sequences start in different steps and continue in any
# order.
STEPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, 0, 20),),
    ((0, 20, 13), (1, 0, 17)),
    ((1, 17, 12), (2, 0, 11), (0, 33, 1)),
    ((0, 34, 1),),
    ((0, 35, 1),),
    ((0, 36, 1),),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a checkpoint is served.

    Attributes:
        tier: "common" for a native decoder, "generic" for the model's own code with all sequences of a step
            batched, or "sequential" for one sequence at a time on the model's own cache.
        reason: Why the tier is "sequential".
        difference: Largest difference of a logit, relative to the largest logit of its sequence.
    """

    tier: str
    reason: str
    difference: float


def open_generic(folder: Path, *, trusts_code: bool = False) -> OpenModel:
    """Open a checkpoint as the server does with `--model-impl transformers`."""
    files = ModelFiles("tiny", None, "directory", folder)
    return OpenModel(files, model_impl="transformers", trusts_code=trusts_code)


def load_generic(
    folder: Path, *, max_context: int = MAX_CONTEXT, arithmetic: ops.Arithmetic | None = None
) -> Model | GenericModel:
    """Load a checkpoint, in float32 by default."""
    with open_generic(folder) as opened:
        model = opened.load(arithmetic or ops.Packing(is_exact=True), max_context)
    assert not isinstance(model, EncoderModel)
    return model


def measure(folder: Path) -> Outcome:
    """Load a checkpoint, run `STEPS`, and compare every token's logits with those of `transformers`."""
    model = load_generic(folder)
    ids = [architectures.random_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    difference = run_steps(model, ids, architectures.references(folder, ids))
    if not isinstance(model, GenericModel):
        return Outcome("common", "", difference)
    reason = model.config.sequential_reason
    return Outcome("sequential" if reason else "generic", reason, difference)


def run_steps(
    model: Model | GenericModel,
    ids: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray],
    steps: Sequence[Sequence[tuple[int, int, int]]] = STEPS,
    *,
    max_context: int = MAX_CONTEXT,
    layout: ops.AdapterLayout | None = None,
    adapters: Sequence[NativeAdapter | None] = (),
    kv_dtype: ops.KvDtype = "float32",
) -> float:
    """Run sequences in these steps, each with its adapter; return `Outcome.difference`, NaN made infinite."""
    with program_of(
        model, num_sequences=len(ids), max_context=max_context, layout=layout, kv_dtype=kv_dtype
    ) as program:
        worst = 0.0
        for step in steps:
            batch = batch_of(step, ids, max_context, adapters)
            logits, at = program.run(batch, range(len(batch.ids))), 0
            for sequence, start, count in step:
                wanted = expected[sequence]
                apart = np.abs(logits[at : at + count] - wanted[start : start + count]).max()
                worst = max(worst, float(np.nan_to_num(apart / np.abs(wanted).max(), nan=np.inf)))
                at += count
    return worst


@contextmanager
def program_of(
    model: Model | GenericModel,
    *,
    num_sequences: int,
    max_context: int = MAX_CONTEXT,
    layout: ops.AdapterLayout | None = None,
    kv_dtype: ops.KvDtype = "float32",
) -> Iterator[Program]:
    """Make a model's program over pools that hold `max_context` tokens of each sequence."""
    shapes, num_blocks = model.config.caches, num_sequences * _width(max_context)
    backend = model.backend if isinstance(model, GenericModel) else CpuBackend()
    caches: Sequence[Any] = []
    if shapes:
        pool = backend.pool(shapes, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=kv_dtype)
        caches = pool.layers
    if isinstance(model, GenericModel):
        yield cast(Program, model.program(caches, max_context, adapters=layout))
        return
    num_tokens = num_sequences * max_context
    limits = ops.StepLimits(
        max_tokens=num_tokens, max_sequences=num_sequences, max_rows=num_tokens, max_context=max_context
    )
    yield ops.CpuProgram(record(model, caches), limits, adapters=layout)


def batch_of(
    step: Sequence[tuple[int, int, int]],
    ids: Sequence[Sequence[int]],
    max_context: int = MAX_CONTEXT,
    adapters: Sequence[NativeAdapter | None] = (),
    *,
    resumes: Sequence[int] = (),
    keeps: Sequence[tuple[int, int, int]] = (),
) -> ops.FlatRows:
    """Return a step's rows; a sequence's slot is its number, and its blocks are in descending order.

    `resumes` and `keeps` are those of `ops.FlatRows`.
    """
    width = _width(max_context)
    tables = {row[0]: np.arange((row[0] + 1) * width - 1, row[0] * width - 1, -1) for row in step}
    positions = [np.arange(start, start + count) for _, start, count in step]
    slots = [
        tables[sequence][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for (sequence, _, _), at in zip(step, positions, strict=True)
    ]
    return ops.FlatRows(
        ids=np.concatenate([ids[sequence][start : start + count] for sequence, start, count in step]),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        query_start=np.cumsum([0, *(count for _, _, count in step)]),
        context_len=np.array([start + count for _, start, count in step]),
        block_table=np.array([tables[sequence] for sequence, _, _ in step], np.int32),
        row_slots=np.array([sequence for sequence, _, _ in step]),
        adapters=[adapters[sequence] for sequence, _, _ in step] if adapters else [],
        resumes=resumes,
        keeps=keeps,
    )


def _width(max_context: int) -> int:
    return -(-max_context // BLOCK_SIZE)
