"""Pack weights, multiply by them, and print which thread touched each page first (page_watch.cpp preloaded).

python -m tests.csrc.first_touch page_watch.so <threads>:<case>...
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

import torch

from tests.ops.helpers import rope_table
from tests.support import eager_ops
from tests.support.batches import flat_rows
from tests.support.kv import poisoned_pool
from tests.support.random_weights import random_weight
from tgi_asgi import _C, ops

COLUMNS = 1024
NUM_PAGES = (64 << 20) // 4096


class Watch:
    """The threads that first touched each page of the arena since the last call of `take`."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.begin_watch()

    def take(self) -> list[int]:
        """Return each page's thread, or 0 if it was not touched, and reset the record."""
        touches = (ctypes.c_int32 * NUM_PAGES)()
        self._library.take_touches(touches)
        return list(touches)


def linear(watch: Watch, packing: ops.Packing) -> list[int]:
    """Pack a plain weight and multiply by it."""
    weight = ops.linear_weight(random_weight("Q8_0", 2080, COLUMNS, seed=1), packing)
    packed = watch.take()
    eager_ops.linear(torch.randn(1, COLUMNS), weight)
    return packed


def gate_up(watch: Watch, packing: ops.Packing) -> list[int]:
    """Pack gate and up in one matrix and multiply by it."""
    sources = [random_weight("Q8_0", 992, COLUMNS, seed=seed) for seed in (1, 2)]
    weight = ops.gate_up_weight(sources[0], sources[1], packing)
    packed = watch.take()
    eager_ops.gate_up(torch.randn(1, COLUMNS), weight)
    return packed


def qkv(
    watch: Watch, packing: ops.Packing, formats: tuple[str, str, str] = ("Q8_0", "Q8_0", "Q8_0"),
    head_dim: int = 64, *, has_norms: bool = False,
) -> list[int]:  # fmt: skip
    """Pack the weights of queries, keys and values and decode one token."""
    heads, kv_heads = 9, 3
    sources = [
        random_weight(format, count * head_dim, COLUMNS, seed=count)
        for format, count in zip(formats, (heads, kv_heads, kv_heads), strict=True)
    ]
    one = eager_ops.norm_weight(torch.ones(head_dim), 1e-5)
    norms = ops.HeadNorms(one, one) if has_norms else None
    sizes = ops.QkvHeads(heads, kv_heads, head_dim, rotary_dim=head_dim)
    weight = ops.qkv_weight(sources, packing, sizes, norms=norms)
    packed = watch.take()
    layer = poisoned_pool(num_kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16").layers[0]
    eager_ops.qkv(
        torch.randn(1, COLUMNS), weight, layer, rope_table(head_dim, 64), flat_rows([(3, 4)], [[0]], 16)
    )
    return packed


CASES: dict[str, Callable[[Watch, ops.Packing], list[int]]] = {
    "linear": linear,
    "gate_up": gate_up,
    "qkv": qkv,
    "qkv of three formats": lambda watch, packing: qkv(watch, packing, ("Q4_1", "Q4_0", "Q8_0")),
    "qkv with norms": lambda watch, packing: qkv(watch, packing, head_dim=128, has_norms=True),
}


def main() -> None:
    """Print a line for each case: the pages' threads when packed and when read."""
    library, *cases = sys.argv[1:]
    watch = Watch(library)
    for threads, case in (each.split(":") for each in cases):
        _C.configure_team(int(threads), 0, False)
        packed = CASES[case](watch, ops.Packing(is_exact=False))
        print(json.dumps([packed, watch.take()]))


if __name__ == "__main__":
    main()
