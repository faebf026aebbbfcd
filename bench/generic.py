"""Compare a model's two implementations, native and `transformers`, interleaved in one process.

    python -m bench.generic --model-id DIRECTORY --quantize Q8_0 [--unrecognised]

With `--unrecognised` the module's own code runs even if it has the common shape.

Prints for every row the ratio of speeds, generic over native: the median of the pairs, and their
interquartile range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.generic.common import CommonDecoder
from tgi_asgi.models.generic.encoder import EncoderModel
from tgi_asgi.models.loading.open import OpenModel
from tgi_asgi.runner.groups import BlockNeeds, CacheGroups
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.programs import Program, make_pool, make_program

_BLOCK = 16
_CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-id", type=Path, required=True)
    parser.add_argument("--quantize")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--unrecognised", action="store_true")
    arguments = parser.parse_args()
    if arguments.unrecognised:
        CommonDecoder.find = classmethod(lambda cls, *_: None)  # type: ignore[assignment]
    ops.configure_threads(None)
    torch.set_num_threads(1)  # its threads would compete with the team
    ops.join_threads()
    programs = {
        name: _load(arguments.model_id, name, arguments.quantize) for name in ("native", "transformers")
    }
    rows = {"decode x1": _decode(1), "decode x8": _decode(8), "prompt of 512": _prompt(512)}
    for name, batch in rows.items():
        _report(name, programs, batch, arguments.pairs)


def _load(path: Path, implementation: str, quantise: str | None) -> Program:
    with OpenModel(ModelFiles("bench", None, "directory", path), model_impl=implementation) as opened:
        model = opened.load(ops.Packing(False, quantise), _CONTEXT)
        config = opened.config
    assert not isinstance(model, EncoderModel)
    size = KvSize(16 * _CONTEXT // _BLOCK, BlockNeeds((None,), _BLOCK, _CONTEXT), 1, "bfloat16")
    pool = make_pool(model, size, CacheGroups((None,), (0,) * len(config.caches), 0))
    caches = [] if pool is None else pool.layers
    limits = ops.StepLimits(max_tokens=_CONTEXT, max_sequences=16, max_rows=16, max_context=_CONTEXT)
    return make_program(model, caches, limits)


def _decode(num_sequences: int, context: int = 300) -> ops.FlatRows:
    return _batch([1] * num_sequences, [context] * num_sequences)


def _prompt(length: int) -> ops.FlatRows:
    return _batch([length], [length])


def _batch(lengths: list[int], contexts: list[int]) -> ops.FlatRows:
    width = _CONTEXT // _BLOCK
    tables = np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)
    positions = [np.arange(end - length, end) for length, end in zip(lengths, contexts, strict=True)]
    slots = [table[at // _BLOCK] * _BLOCK + at % _BLOCK for table, at in zip(tables, positions, strict=True)]
    ids = np.random.default_rng(0).integers(5, 300, sum(lengths))
    return ops.FlatRows(
        ids=ids, positions=np.concatenate(positions), slots=np.concatenate(slots),
        query_start=np.cumsum([0, *lengths]), context_len=np.array(contexts), block_table=tables,
        row_slots=np.arange(len(lengths)),
    )  # fmt: skip


def _report(name: str, programs: dict[str, Program], batch: ops.FlatRows, num_pairs: int) -> None:
    last = (batch.query_start[1:] - 1).tolist()
    times: dict[str, list[float]] = {each: [] for each in programs}
    for _ in range(num_pairs + 1):
        for each, program in programs.items():
            times[each].append(seconds(partial(program.run, batch, last)))
    ratios = sorted(a / b for a, b in zip(times["native"][1:], times["transformers"][1:], strict=True))
    middle = (ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4])
    each = "  ".join(f"{key} {1e3 * statistics.median(found[1:]):8.2f} ms" for key, found in times.items())
    print(f"{name:<15} {each}  ratio {statistics.median(ratios):.3f} ({middle[0]:.3f}..{middle[1]:.3f})")


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes, from awake threads on."""
    ops.wake_threads()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
