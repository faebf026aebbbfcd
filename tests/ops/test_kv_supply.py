"""The KV cache's first memory is there before it is written, and holds what it held."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch

from tgi_asgi import ops

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


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is asked as Linux has it")
def test_the_first_of_the_pool_is_supplied_and_no_more() -> None:
    kv = make_kv(96 * MIB)
    before = resident_bytes(kv[0].pool)
    ops.supply_kv(kv, 33 * MIB).wait()
    assert before < 4 * MIB
    assert abs(resident_bytes(kv[0].pool) - 33 * MIB) < 4 * MIB


def test_contents_stay_and_a_small_pool_is_supplied_whole() -> None:
    kv = make_kv(16 * MIB)
    for layer in kv:
        layer.pool.copy_(torch.arange(layer.pool.numel()).reshape(layer.pool.shape) % 251)
    expected = [layer.pool.clone() for layer in kv]
    ops.supply_kv(kv, 64 * MIB).wait()
    assert all(torch.equal(layer.pool, before) for layer, before in zip(kv, expected, strict=True))


def test_a_supply_that_is_closed_ends_soon() -> None:
    kv = make_kv(4096 * MIB)
    supply = ops.supply_kv(kv, 4096 * MIB)
    supply.close()
    supply.close()
    assert resident_bytes(kv[0].pool) < 1024 * MIB
    ops.supply_kv(kv, 4096 * MIB)  # nobody closes it: its end does


def test_a_process_can_end_while_memory_is_supplied() -> None:
    code = (
        "from tgi_asgi import ops; import torch;"
        "kv = ops.allocate_kv(2, 16384, 4, 64, 16, torch.bfloat16); supply = ops.supply_kv(kv, 1 << 40)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
