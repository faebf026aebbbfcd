"""Fixtures of the operators' and kernels' tests: every set of kernels, thread counts, a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tgi_asgi import _C


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch by TGI_TEST_SEED; pytest shows the line when a test fails."""
    seed = int(os.environ.get("TGI_TEST_SEED", "0"))
    print(f"TGI_TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(params=_C.kernel_sets())
def kernel_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each set of kernels that this machine runs."""
    before = _C.kernel_set()
    _C.use_kernel_set(request.param)
    yield request.param
    _C.use_kernel_set(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute alone unless the test asks for a team, and leave the process as it was.

    So does torch, of which references are made, as in a server: where other processes are busy its threads
    wait for each other, and small products take ten times as long.
    """
    before, of_torch = _C.num_threads(), torch.get_num_threads()
    _C.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    _C.set_num_threads(before)
    torch.set_num_threads(of_torch)
