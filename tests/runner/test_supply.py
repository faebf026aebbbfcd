"""The KV cache's first memory is there before it is written, and holds what it held."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from tgi_asgi import ops
from tgi_asgi.runner.supply import SUPPLIED_BYTES, KvSupply

MIB = 1 << 20


def resident_bytes(pool: torch.Tensor) -> int:
    """Return how much of the storage that the pool lies in is in memory."""
    storage, page = pool.untyped_storage(), mmap.PAGESIZE
    first = -(-storage.data_ptr() // page) * page
    num_pages = (storage.data_ptr() + storage.nbytes() - first) // page
    flags = (ctypes.c_ubyte * num_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(num_pages * page), flags) == 0
    return sum(flag & 1 for flag in flags) * page


def make_kv(num_bytes: int) -> list[ops.KvLayer]:
    block_bytes = 2 * 2 * 64 * 16 * 2 * 4  # layers, keys and values, head, bfloat16
    return ops.allocate_kv(2, num_bytes // block_bytes, 4, 64, 16, torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="a hint to Linux")
def test_the_first_of_the_pool_is_supplied_and_no_more() -> None:
    kv = make_kv(SUPPLIED_BYTES + 128 * MIB)
    before = resident_bytes(kv[0].pool)
    supply = KvSupply(kv)
    supply.join(60)
    supply.close()
    assert before < 4 * MIB
    assert abs(resident_bytes(kv[0].pool) - SUPPLIED_BYTES) < 4 * MIB


def test_contents_stay() -> None:
    kv = make_kv(16 * MIB)
    for layer in kv:
        layer.pool.copy_(torch.arange(layer.pool.numel()).reshape(layer.pool.shape) % 251)
    expected = [layer.pool.clone() for layer in kv]
    ops.supply_kv(kv, 64 * MIB, lambda: True)
    assert all(torch.equal(layer.pool, before) for layer, before in zip(kv, expected, strict=True))


def test_a_supply_that_is_closed_ends_soon() -> None:
    calls: list[int] = []

    def wants_more() -> bool:
        calls.append(1)
        return len(calls) < 3

    ops.supply_kv(make_kv(64 * MIB), 64 * MIB, wants_more)
    assert len(calls) == 3
