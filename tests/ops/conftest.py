"""Fixtures for the tests of operators and kernels: every kernel set, thread counts, a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tgi_asgi import _C


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch from TGI_TEST_SEED; pytest shows the printed line when a test fails."""
    seed = int(os.environ.get("TGI_TEST_SEED", "0"))
    print(f"TGI_TEST_SEED={seed}")
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes 1 ms, for other devices


PLAIN = ("portable", "amx_model")  # they compute in plain C++, and their tests take as long as all others'


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.thorough if name in PLAIN else ()) for name in _C.kernel_sets()
    ]
)
def kernel_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each kernel set that this machine supports."""
    before = _C.kernel_set()
    _C.use_kernel_set(request.param)
    yield request.param
    _C.use_kernel_set(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread unless the test asks for a team, and restore the process's settings.

    The same applies to torch, which computes the references: if other processes are busy, its threads wait
    for each other and small products take ten times as long. A server also limits torch to one thread.
    """
    before, of_torch = _C.num_threads(), torch.get_num_threads()
    _C.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    _C.set_num_threads(before)
    torch.set_num_threads(of_torch)
