"""The sampling state on the device, and which parts of it are uploaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.emulation import bindings, library
from tgi_asgi import ops
from tgi_asgi.ops.cuda_sample_state import CudaSampleState, token_logprobs
from tgi_asgi.types import SamplingParams

VOCAB = 5000
PENALISED = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2)


class Largest(TorchDispatchMode):
    """Records the size in bytes of the largest tensor read other than those that exist already."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known, self.num_bytes = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in args:
            if isinstance(given, Tensor) and given.untyped_storage().data_ptr() not in self._known:
                self.num_bytes = max(self.num_bytes, given.untyped_storage().nbytes())
        return func(*args, **(kwargs or {}))


def test_counts_go_up_of_the_tokens_that_occur_and_are_zeroed_where_they_lie() -> None:
    library.require()
    bindings.install()
    state = CudaSampleState(3, VOCAB, torch.device("cpu"))
    histories: list[dict[str, Any]] = [
        {"prompt_ids": [1, 2, 2, 4999], "output_ids": [7, 7, 2]},
        {"prompt_ids": [5]},
        {"prompt_ids": [], "output_ids": [0]},
    ]
    for history in histories:
        with Largest({state._counts.untyped_storage().data_ptr()}) as largest:
            state.start(1, PENALISED, choice=0, **history)
        assert 0 < largest.num_bytes < VOCAB * 4, "of a vocabulary nothing goes up"
        expected = torch.zeros(VOCAB, dtype=torch.int32)
        expected[history["prompt_ids"]] = 1
        for token in history.get("output_ids", ()):
            expected[token] += 2
        assert torch.equal(state._counts[1], expected)
        assert not state._counts[[0, 2]].any()


@pytest.mark.parametrize("name", ["top_p", "min_p", "typical_p"])
def test_a_share_that_would_leave_no_token_never_reaches_the_device(name: str) -> None:
    library.require()
    bindings.install()
    state = CudaSampleState(1, VOCAB, torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"{name} 1\.5"):
        state.start(0, SamplingParams(**{name: 1.5}), choice=0, prompt_ids=[1])  # type: ignore[arg-type]
    assert not state.records.any()


def test_tokens_are_scored_where_their_logits_are() -> None:
    library.require()
    bindings.install()
    logits, ids = torch.randn(5, 300) * 4, np.random.default_rng(0).integers(300, size=5, dtype=np.int32)
    found, expected = token_logprobs(logits, ids, 4), ops.token_logprobs(logits.numpy(), ids, 4)
    assert np.array_equal(found.top_ids, expected.top_ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("token", "num_top"), [(300, 0), (-1, 2), (3, 301)])
def test_a_token_that_is_none_is_refused(token: int, num_top: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 300\)"):
        token_logprobs(torch.randn(1, 300), np.array([token], np.int32), num_top)
