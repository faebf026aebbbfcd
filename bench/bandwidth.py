"""Measure this machine's current memory read bandwidth, with as many threads as it has cores.

    python -m bench.bandwidth

Every memory-bound figure needs this for comparison: virtual machines drift by a factor of two within minutes.
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bench.report import emit, machine, median, table

MIB = 1 << 20
MODEL_MIB = 96  # the default model's weights, which a decode step reads


def read_bandwidth(*, num_threads: int | None = None, mib: int = MODEL_MIB, repeats: int = 15) -> float:
    """Return the median GB/s of passes over `mib` MiB in 2 MiB pages, each thread over its own share.

    A maximum of 64-bit integers is one instruction per vector: numpy's implementation runs at the speed of
    memory, starts no threads of its own and releases the GIL.
    """
    num_threads = num_threads or len(os.sched_getaffinity(0))
    values = memory_in_huge_pages(mib * MIB)
    values[:] = 1  # pages exist only once they are written
    shares = np.array_split(values, num_threads)
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(np.max, shares))  # the first pass starts the threads
        times = [_timed(lambda: list(threads.map(np.max, shares))) for _ in range(repeats)]
    return median((mib * MIB / seconds / 1e9 for seconds in times), 1)


def memory_in_huge_pages(num_bytes: int) -> npt.NDArray[np.int64]:
    """Return zeros of the program's own memory: what other processes could map has small pages."""
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.int64)


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def main() -> None:
    """Print the bandwidth of one thread and of all threads, by the size of the data read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    sizes = (8, 24, MODEL_MIB, 1024)
    cores = len(os.sched_getaffinity(0))
    found = {count: [read_bandwidth(num_threads=count, mib=mib) for mib in sizes] for count in {1, cores}}
    record = {
        "bench": "bandwidth",
        "machine": machine(),
        "gb_per_s": {
            str(count): dict(zip(map(str, sizes), row, strict=True)) for count, row in found.items()
        },
    }
    emit(record, None)
    print(table(["threads", *(f"{mib} MiB" for mib in sizes)], ([n, *row] for n, row in found.items())))


if __name__ == "__main__":
    main()
