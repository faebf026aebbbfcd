"""Steps without an engine: rows and pools for the self-checks, and steps of random tokens for measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tgi_asgi import ops
from tgi_asgi.models.generic.adaptable import adaptable
from tgi_asgi.models.generic.backend import Pool
from tgi_asgi.models.generic.model import GenericModel

BLOCK = 16


def adapter_targets(model: GenericModel) -> dict[str, ops.Target]:
    """Return the products that adapters may change, by path; runs a few tokens to find them."""
    return adaptable(model.module, lambda count: step_of(model, count)())


def step_of(
    model: GenericModel, num_tokens: int, *, num_rows: int = 1, dtype: ops.KvDtype = "float32"
) -> Callable[[], None]:
    """Return a call that computes a step of random tokens, of at least two sequences that begin.

    Args:
        num_rows: Number of tokens with logits.
        dtype: Type of keys and values.
    """
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, size=num_tokens)
    if model.config.vision is not None:
        model.config.vision.remove_images(ids)
    longest = max(min(model.config.context_length, num_tokens - 1), 1)
    parts = [ids[first : first + longest] for first in range(0, num_tokens, longest)]
    width = -(-longest // BLOCK)
    pool = make_pool(model, len(parts) * width, dtype)
    program = model.program([] if pool is None else pool.layers, width * BLOCK, num_slots=len(parts))
    batch = flat_rows([(slot, part, 0) for slot, part in enumerate(parts)], width)

    def run() -> None:
        program.run(batch, range(min(num_rows, num_tokens)))

    return run


def make_pool(model: GenericModel, num_blocks: int, dtype: ops.KvDtype = "float32") -> Pool | None:
    """Return blocks of keys and values; None for a model with a cache of its own."""
    shapes = model.config.caches
    if not shapes:
        return None
    return model.backend.pool(shapes, num_blocks=num_blocks, block_size=BLOCK, dtype=dtype)


def decoding_step_of(
    model: GenericModel, num_sequences: int, context: int, dtype: ops.KvDtype
) -> Callable[[], None]:
    """Return a call that computes the next tokens of sequences with this many, all in the same blocks.

    Only for models that keep nothing but keys and values.
    """
    pool = make_pool(model, 1, dtype)
    program = model.program([] if pool is None else pool.layers, context)
    one = np.ones(num_sequences, np.int64)
    batch = ops.FlatRows(
        ids=0 * one, positions=(context - 1) * one, slots=0 * one,
        query_start=np.arange(num_sequences + 1), context_len=context * one,
        block_table=np.zeros((num_sequences, -(-context // BLOCK)), np.int32),
        row_slots=np.arange(num_sequences),
    )  # fmt: skip

    def run() -> None:
        program.run(batch, range(num_sequences))

    return run


def flat_rows(
    rows: list[tuple[int, Any, int]],
    width: int,
    *,
    resumes: Sequence[int] = (),
    keeps: Sequence[tuple[int, int, int]] = (),
) -> ops.FlatRows:
    """Build a batch from rows of (slot, ids, start); a slot's blocks are in descending order.

    `resumes` and `keeps` are those of `ops.FlatRows`.
    """
    tables = {slot: list(range((slot + 1) * width - 1, slot * width - 1, -1)) for slot, _, _ in rows}
    positions = [np.arange(start, start + len(ids)) for _, ids, start in rows]
    slots = [
        np.array(tables[slot])[at // BLOCK] * BLOCK + at % BLOCK
        for (slot, _, _), at in zip(rows, positions, strict=True)
    ]
    lengths = [len(ids) for _, ids, _ in rows]
    return ops.FlatRows(
        ids=np.concatenate([ids for _, ids, _ in rows]),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        query_start=np.cumsum([0, *lengths]),
        context_len=np.array([start + len(ids) for _, ids, start in rows]),
        block_table=np.array([tables[slot] for slot, _, _ in rows], np.int32),
        row_slots=np.array([slot for slot, _, _ in rows]),
        resumes=resumes,
        keeps=keeps,
    )
