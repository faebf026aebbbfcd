"""Fixtures of the operators' and kernels' tests: every instruction set, thread counts, a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import tgi_asgi.ops  # noqa: F401  (registers torch.ops.tgi)
from tgi_asgi import _C


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch by TGI_TEST_SEED; pytest shows the line when a test fails."""
    seed = int(os.environ.get("TGI_TEST_SEED", "0"))
    print(f"TGI_TEST_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each instruction set that this machine has."""
    if request.param not in _C.supported_isas():
        pytest.skip(f"this machine does not run {request.param}")
    before = _C.isa()
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute alone unless the test asks for a team, and leave the process as it was."""
    before = _C.num_threads()
    _C.set_num_threads(1)
    yield
    _C.set_num_threads(before)
