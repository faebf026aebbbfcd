"""Self-check of a loaded model: random tokens through its own eager forward and through the flat batch path.

Both run on the packed weights, with activations and cache in float32, so that they differ only by rounding.
The check catches faults that depend on the batch: states lost between chunks, positions that do not arrive,
masks that differ from what discovery found. It cannot detect an error that both sides share, such as a wrong
weight.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.caller import of_vocabulary
from tgi_asgi.models.generic.discover import implementation
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.models.generic.steps import BLOCK, flat_rows, make_pool
from tgi_asgi.models.generic.zeros import arguments

logger = logging.getLogger(__name__)

_LENGTHS = (27, 14)  # tokens of the two sequences
_CUT = 16  # split point of the first sequence
LARGEST = 2e-3  # allowed difference of logits, relative to the largest logit
_ROUNDING = 5e-5  # the same for recurrent layers, if running them token by token would make it smaller
_LARGEST_SERVED = 0.3  # the same with products and cache of 16 bits, beyond which a warning is logged
_LONGEST_WINDOW = 192  # longest window for which a longer sequence is affordable
_TRIES = 2  # a token whose experts nearly tie may be routed differently in one of the tries


def check(model: GenericModel) -> None:
    """Compare the logits of the two paths.

    Raises:
        ModelLoadError: if they differ; the message says by how much.
    """
    try:
        _check(model)
    except (ModelLoadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code raises on such a batch
        raise ModelLoadError(
            f"{model.config.architecture} does not run here: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _check(model: GenericModel) -> None:
    worst, where = _try_native(model) or _try_joined(model) or _smallest_difference(model)
    if worst > _ROUNDING and model.recurrent is not None and model.delta_nets is None:
        # Plain Mamba scans ignore the state given to them; others lose a part of it, and differ by less.
        model.recurrent.continues_by_token = True
        by_token = _smallest_difference(model)
        if by_token[0] < worst / 4:
            worst, where = by_token
            model.keeps_states = False
        else:
            model.recurrent.continues_by_token = False
    if worst <= LARGEST:
        _check_kept(model)
        _check_served(model)
        return
    raise ModelLoadError(
        f"{model.config.architecture} fails its self-check against its own code: logits differ by "
        f"{worst:.2g} of the largest ({where}); {LARGEST:g} is allowed"
    )


def _try_native(model: GenericModel) -> tuple[float, str] | None:
    """Return the difference if recurrent layers run on native kernels; None if it is too large."""
    if model.delta_nets is None:
        return None
    native = _smallest_difference(model)
    if native[0] <= LARGEST:
        return native
    model.delta_nets = None
    logger.warning(
        "the recurrent layers of %s run on the code of transformers, slowly: on native kernels, logits "
        "differ by %.2g of the largest",
        model.config.architecture, native[0],
    )  # fmt: skip
    return None


def _try_joined(model: GenericModel) -> tuple[float, str] | None:
    """Return the difference if sequences with one token are run together; None if they then differ more."""
    recurrent = model.recurrent
    if recurrent is None or not recurrent.joins_tokens:
        return None
    try:
        joined = _smallest_difference(model)
    except RuntimeError:  # states that cannot be joined
        joined = float("inf"), ""
    if joined[0] <= _ROUNDING:
        return joined
    recurrent.joins_tokens = False
    if _smallest_difference(model)[0] < joined[0] / 4:
        return None
    recurrent.joins_tokens = True
    return joined


def _check_kept(model: GenericModel) -> None:
    """Keep a state in the middle of a row and resume from it; clear `keeps_states` if the logits differ."""
    if not model.keeps_states:
        return
    length, position = _LENGTHS[0], _CUT - 1
    [ids] = _random_sequences(model, [length], seed=0)
    mode = model.replaced.mode
    with mode.exactly(), _first_of_equals():
        expected = _eager(model, ids)
        program, width = _program(model, [length], "float32")
        program.run(flat_rows([(0, ids, 0)], width, keeps=[(0, position, 0)]), [])
        rest = ids[position:]
        batch = flat_rows([(0, rest, position)], width, resumes=[0])
        found = torch.from_numpy(program.run(batch, range(len(rest))))
    worst = relative_difference(found, expected[position:], expected)
    if not worst <= LARGEST:
        model.keeps_states = False
        logger.warning(
            "%s has no prefix cache: after a kept state, logits differ by %.2g of the largest; %g is allowed",
            model.config.architecture, worst, LARGEST,
        )  # fmt: skip


def _check_served(model: GenericModel) -> None:
    """Run steps with the kernels that serve on a GPU, those of products and a cache of 16 bits.

    Rounding may send a token to other experts, so that a difference only shows in the log.
    """
    kv = model.backend.served_kv
    if kv is None:
        return
    worst, where = _difference(model, 0, kv_dtype=kv)
    if not np.isfinite(worst):
        raise ModelLoadError(
            f"{model.config.architecture} fails its self-check: logits are not finite in 16 bits ({where})"
        )
    if worst > _LARGEST_SERVED:
        logger.warning(
            "with products and cache of 16 bits, logits of random tokens of %s differ by %.2g of the largest "
            "from those in float32 (%s): compare answers with those of --dtype float32 on a CPU",
            model.config.architecture, worst, where,
        )  # fmt: skip


def _smallest_difference(model: GenericModel) -> tuple[float, str]:
    """Return the smallest difference of a few tries, and the step that it occurs in."""
    tried = []
    for seed in range(_TRIES):
        tried.append(_difference(model, seed))
        if tried[-1][0] <= LARGEST:
            break
    return min(tried)


def _difference(model: GenericModel, seed: int, kv_dtype: ops.KvDtype = "float32") -> tuple[float, str]:
    """Return the largest difference of logits, relative to the largest logit, and the step it occurs in.

    Args:
        kv_dtype: Type of keys and values; with 16 bits, products of the steps are rounded, too.
    """
    sequences = _random_sequences(model, [_longest(model), _LENGTHS[1]], seed)
    mode = model.replaced.mode
    with mode.exactly(), _first_of_equals():
        expected = [_eager(model, ids) for ids in sequences]
        mode.is_exact = kv_dtype == "float32"
        found = _flat(model, sequences, kv_dtype)
    worst, where = 0.0, ""
    for name, index, start, logits in found:
        wanted = expected[index][start : start + len(logits)]
        difference = relative_difference(logits, wanted, expected[index])
        if not difference <= worst:
            worst, where = difference, name
        if difference != difference:
            return float("inf"), name
    return worst, where


def _random_sequences(model: GenericModel, lengths: Sequence[int], seed: int) -> list[Any]:
    generator = np.random.default_rng(seed)
    sequences = [generator.integers(0, model.config.vocab_size, size=length) for length in lengths]
    if model.config.vision is not None:  # text only: no image belongs to such placeholders
        for ids in sequences:
            model.config.vision.remove_images(ids)
    return sequences


def relative_difference(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest of `scale`.

    Logits of tokens that a class rules out (Chameleon's of images) are the smallest number, beside which no
    other difference would be seen.
    """
    largest = scale[scale != torch.finfo(scale.dtype).min].abs().max()
    return float((found - wanted).abs().max() / largest)


@contextlib.contextmanager
def _first_of_equals() -> Iterator[None]:
    """Let `topk` choose the first of equal scores. Torch's choice depends on the length of a row.

    An index (DeepSeek V3.2) scores a token exactly zero if no head's product is above zero.
    """

    def topk(scores: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        values, indices = scores.sort(dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    torch_, tensor_ = cast(Any, torch), cast(Any, Tensor)
    before = torch_.topk, tensor_.topk
    torch_.topk, tensor_.topk = topk, topk
    try:
        yield
    finally:
        torch_.topk, tensor_.topk = before


def _longest(model: GenericModel) -> int:
    """Return the first sequence's length: beyond the smallest window or chunk, if that is affordable."""
    sizes = [layer.rule.window or layer.rule.chunk or 0 for layer in model.config.layers]
    windows = [size for size in sizes if 0 < size <= _LONGEST_WINDOW]
    longest = max(_LENGTHS[0], min(windows, default=0) + 11)
    return min(longest, model.config.context_length)


def _eager(model: GenericModel, ids: Any) -> Tensor:
    """Return the logits of one sequence, computed with the model's own attention."""
    # Positions are not passed: the model's own are the reference.
    return whole_logits(model, input_ids=torch.from_numpy(ids)[None].to(model.backend.device))


def whole_logits(model: GenericModel, **inputs: Any) -> Tensor:
    """Return the logits [n_tokens, vocab] of one sequence, by one call with the model's own attention.

    Inputs are on the model's device; the logits are not.
    """
    given = arguments(model.module, **inputs, use_cache=False)
    with implementation(model.module, "eager"), torch.inference_mode():
        logits: Tensor = model.module(**given).logits
        return of_vocabulary(logits[0].float(), model.config.vocab_size).cpu()


def _flat(
    model: GenericModel, sequences: list[Any], kv_dtype: ops.KvDtype
) -> list[tuple[str, int, int, Tensor]]:
    """Return logits from steps of several sequences: (step name, sequence, first position, logits).

    Clears the model's `is_batch_invariant` if a sequence's bits depend on the others of its step.
    """
    program, width = _program(model, [len(ids) for ids in sequences], kv_dtype)
    first, second = sequences
    if model.is_batch_invariant:
        model.is_batch_invariant = _has_same_bits(program, first, second, width)
    cut = min(_CUT, len(first) - 3)
    steps = [
        ("the beginning of a prompt", [(0, first[:cut], 0)]),
        ("the rest of a prompt next to another", [(0, first[cut:-2], cut), (1, second[:-1], 0)]),
        ("a single token", [(0, first[-2:-1], len(first) - 2)]),
        ("two tokens", [(0, first[-1:], len(first) - 1), (1, second[-1:], len(second) - 1)]),
    ]
    found = []
    for name, rows in steps:
        batch = flat_rows(rows, width)
        logits = torch.from_numpy(program.run(batch, range(len(batch.ids))))
        at = 0
        for index, ids, start in rows:
            found.append((name, index, start, logits[at : at + len(ids)].clone()))
            at += len(ids)
    return found


def _program(model: GenericModel, lengths: Sequence[int], dtype: ops.KvDtype) -> tuple[Any, int]:
    """Return a program for sequences of these lengths, and how many blocks each slot has."""
    longest = max(lengths)
    width = -(-longest // BLOCK)
    pool = make_pool(model, len(lengths) * width, dtype)
    return model.program([] if pool is None else pool.layers, longest), width


def _has_same_bits(program: Any, first: Any, second: Any, width: int) -> bool:
    """Return whether a sequence's logits at several offsets of a step have the bits that it has alone."""
    alone = program.run(flat_rows([(0, first, 0)], width), range(len(first))).copy()
    for before in (1, 2, 5):
        batch = flat_rows([(1, second[:before], 0), (0, first, 0)], width)
        if not np.array_equal(program.run(batch, range(before, before + len(first))), alone):
            return False
    return True
