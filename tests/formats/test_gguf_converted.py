"""Types of GGUF files that are converted while they are loaded, against the values of the `gguf` package."""

from __future__ import annotations

import dataclasses
import os
import threading
import tracemalloc

import numpy as np
import pytest

from tests.support.gguf_blocks import CONVERTED, random_matrix
from tgi_asgi import _C, ops
from tgi_asgi.formats.codes import Bytes
from tgi_asgi.formats.gguf_converted import BY_NAME
from tgi_asgi.ops.sources import decode


@pytest.mark.parametrize("format", CONVERTED)
def test_weights_are_those_of_the_gguf_package(format: str) -> None:
    matrix = random_matrix(format, 64, 1024, 0.5, np.random.default_rng(1))
    kind = BY_NAME[format]
    source = ops.WeightSource(kind.convert(matrix.data.reshape(-1)), kind.held, (64, 1024))
    ours = decode(source)
    assert float(np.abs(matrix.values).max()) > 0.1
    assert np.array_equal(ours, matrix.values)


def test_two_bits_of_q2_0_stand_for_minus_one_to_two() -> None:
    scale = np.array([0.5], np.float16).view(np.uint8)
    data = np.concatenate([scale, np.full(16, 0b11_10_01_00, np.uint8)])
    kind = BY_NAME["Q2_0"]
    ours = decode(ops.WeightSource(kind.convert(data), kind.held, (1, 64)))
    assert ours.reshape(-1, 4).tolist() == [[-0.5, 0.0, 0.5, 1.0]] * 16


def test_many_blocks_are_converted_part_by_part() -> None:
    matrix = random_matrix("TQ2_0", 3, 256 * 2048, 0.5, np.random.default_rng(1))
    whole = BY_NAME["TQ2_0"].convert(matrix.data.reshape(-1))
    rows = [BY_NAME["TQ2_0"].convert(row) for row in matrix.data]
    assert np.array_equal(whole, np.concatenate(rows))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads have no affinity on this system")
def test_blocks_are_converted_on_all_cores_by_a_thread_that_stays_on_one() -> None:
    kind, seen = BY_NAME["TQ2_0"], list[set[int]]()

    def convert_blocks(blocks: Bytes) -> Bytes:
        seen.append(os.sched_getaffinity(0))
        return kind.convert_blocks(blocks)

    def convert_on_one_core() -> None:
        os.sched_setaffinity(0, _C.usable_cores()[:1])
        dataclasses.replace(kind, convert_blocks=convert_blocks).convert(np.zeros(66 * 10_000, np.uint8))

    thread = threading.Thread(target=convert_on_one_core)
    thread.start()
    thread.join()
    assert seen == [set(_C.usable_cores())] * 3


def test_converting_holds_the_result_once() -> None:
    matrix = random_matrix("NVFP4", 8, 256 * 2048, 0.5, np.random.default_rng(1))
    tracemalloc.start()
    whole = BY_NAME["NVFP4"].convert(matrix.data.reshape(-1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole.nbytes == matrix.values.nbytes * 5 // 32
    assert peak < 1.9 * whole.nbytes  # with the temporary arrays of a million weights
