"""The KV cache's pool: what it refuses, what a copy moves, and memory supplied before it is written."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.kv import poisoned_pool, read_kv, write_kv
from tgi_asgi import _C, ops
from tgi_asgi.models.config import CacheShape

MIB = 1 << 20
DTYPES = ["float32", "bfloat16", "int8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 24}, "`block_size` must be 16, 32 or 64, got 24"),
        ({"head_dim": 15}, "`head_dim` must be even and at most 512, got 15"),
        ({"head_dim": 514}, "`head_dim` must be even and at most 512, got 514"),
        ({"value_dim": 7}, "`value_dim` must be even and at most 512, got 7"),
        ({"head_dim": 0}, "`head_dim` must be even"),
        ({"dtype": "float16"}, r"`dtype` must be float32, bfloat16 or int8, got float16"),
        ({"dtype": "int8"}, "an int8 cache would pad heads of 16 to 32: use bfloat16"),
        ({"num_layers": 0}, "`layers` must be 1 to 65536, got 0"),
        ({"num_kv_heads": 0}, "`num_kv_heads` must be positive, got 0"),
        ({"num_kv_heads": 1 << 50}, "`num_kv_heads` must be at most"),
        ({"num_blocks": 0}, "`num_blocks` must be positive"),
        ({"num_blocks": 1 << 28}, r"all slots below 2\^31"),
    ],
)
def test_a_pool_that_the_kernels_do_not_have_is_refused(change: dict[str, Any], message: str) -> None:
    sizes = {"num_layers": 1, "num_blocks": 2, "num_kv_heads": 1, "head_dim": 16, "block_size": 16, **change}
    shape = CacheShape(sizes["num_kv_heads"], sizes["head_dim"], sizes.get("value_dim", sizes["head_dim"]))
    with pytest.raises(ValueError, match=message):
        ops.KvPool(
            [shape] * sizes["num_layers"],
            num_blocks=sizes["num_blocks"],
            block_size=sizes["block_size"],
            dtype=change.get("dtype", "float32"),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_copied_blocks_hold_what_their_sources_held_in_every_layer(dtype: ops.KvDtype, head_dim: int) -> None:
    pool = poisoned_pool(num_layers=2, num_kv_heads=2, head_dim=head_dim, dtype=dtype, num_blocks=6)
    every = torch.arange(6 * 16)
    for layer in pool.layers:
        write_kv(layer, every, torch.randn(96, 2, head_dim), torch.randn(96, 2, head_dim))
    written = [read_kv(layer, every) for layer in pool.layers]
    before = pool.native.memory().copy()
    pool.copy([(1, 4), (1, 5), (3, 0)])
    np.testing.assert_array_equal(pool.native.memory(), before[[3, 1, 2, 3, 1, 1]])
    origin = torch.tensor([3, 1, 2, 3, 1, 1]).repeat_interleave(16) * 16 + torch.arange(16).repeat(6)
    for layer, (key, value) in zip(pool.layers, written, strict=True):
        found_key, found_value = read_kv(layer, every)
        assert torch.equal(found_key, key[origin])
        assert torch.equal(found_value, value[origin])


def test_blocks_that_are_not_there_are_refused_before_any_is_copied() -> None:
    pool = poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32", num_blocks=3)
    pool.native.memory()[0] = 1
    for bad in ((0, 3), (-1, 0), (3, 0)):
        with pytest.raises(ValueError, match=r"blocks must be in \[0, 3\)"):
            pool.copy([(0, 1), bad])
    assert (pool.native.memory()[1:] == 0xFF).all()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 2), (1, 2)], "block 2 is copied to twice"),
        ([(0, 1), (1, 2)], "block 1 is copied both from and to"),
        ([(1, 2), (0, 1)], "block 1 is copied both from and to"),
        ([(0, 2), (1, 1)], "block 1 is copied both from and to"),
    ],
)
def test_copies_that_depend_on_their_order_are_refused_before_any_is_made(
    pairs: list[tuple[int, int]], message: str
) -> None:
    pool = poisoned_pool(num_kv_heads=1, head_dim=16, dtype="float32", num_blocks=3)
    pool.native.memory()[:] = np.arange(3, dtype=np.uint8)[:, None]
    before = pool.native.memory().copy()
    with pytest.raises(ValueError, match=message):
        pool.copy(pairs)
    np.testing.assert_array_equal(pool.native.memory(), before)


@pytest.mark.parametrize(("num_layers", "num_blocks"), [(1, 2**26), (2**16, 1), (2**14, 2**12)], ids=str)
def test_a_pool_whose_bytes_no_number_counts_is_no_small_one(num_layers: int, num_blocks: int) -> None:
    layers = [(2**31 - 1, 512, 512, 0)] * num_layers
    with pytest.raises(MemoryError):
        _C.KvPool(layers=layers, num_blocks=num_blocks, block_size=16, precision="float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80, 112])
@pytest.mark.parametrize("value_dim", [None, 64])
def test_the_bytes_of_a_token_are_those_of_the_pool(
    dtype: ops.KvDtype, head_dim: int, value_dim: int | None
) -> None:
    pool = poisoned_pool(
        num_layers=3, num_kv_heads=2, head_dim=head_dim, value_dim=value_dim, dtype=dtype, num_blocks=4
    )
    held = pool.native.memory().nbytes
    shape = CacheShape(2, head_dim, value_dim or head_dim)
    assert 3 * ops.kv_bytes_per_token(shape, dtype) * 4 * 16 == held


# Memory that the pool makes resident before it is written.


def resident_bytes(pool: ops.KvPool) -> int:
    """Return how many bytes of the pool are resident."""
    memory, page = pool.native.memory(), mmap.PAGESIZE
    address = memory.ctypes.data
    first = -(-address // page) * page
    num_pages = (address + memory.nbytes - first) // page
    flags = (ctypes.c_ubyte * num_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(num_pages * page), flags) == 0
    return int((np.frombuffer(bytes(flags), np.uint8) & 1).sum()) * page


def make_pool(num_bytes: int) -> ops.KvPool:
    block_bytes = 2 * 2 * 64 * 16 * 2 * 4  # layers, K and V, heads, head size, block size, bfloat16
    shapes = [CacheShape(4, 64, 64)] * 2
    return ops.KvPool(shapes, num_blocks=num_bytes // block_bytes, block_size=16, dtype="bfloat16")


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is asked as Linux has it")
def test_the_first_of_the_pool_is_supplied_and_no_more() -> None:
    pool = make_pool(96 * MIB)
    before = resident_bytes(pool)
    pool.supply(33 * MIB)
    pool.native.wait_for_supply()
    assert before < 4 * MIB
    assert abs(resident_bytes(pool) - 33 * MIB) < 4 * MIB


def test_contents_stay_and_a_small_pool_is_supplied_whole() -> None:
    pool = make_pool(16 * MIB)
    memory = pool.native.memory()
    memory[:] = np.arange(memory.size).reshape(memory.shape) % 251
    expected = memory.copy()
    pool.supply(64 * MIB)
    pool.native.wait_for_supply()
    np.testing.assert_array_equal(memory, expected)


def test_a_supply_that_is_closed_ends_soon() -> None:
    pool = make_pool(4096 * MIB)
    pool.supply(4096 * MIB)
    pool.stop_supply()
    pool.stop_supply()
    assert resident_bytes(pool) < 1024 * MIB
    pool.supply(4096 * MIB)  # without close(): destroying the pool ends the supply


def test_a_process_can_end_while_memory_is_supplied() -> None:
    code = (
        "from tgi_asgi import _C;"
        "pool = _C.KvPool(layers=[(4, 64, 64, 0)] * 2, num_blocks=16384, block_size=16,"
        " precision='bfloat16'); pool.supply(1 << 40)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
