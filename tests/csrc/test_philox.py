"""Random numbers: Philox's published answers verify the reference, and the reference verifies the kernel."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.philox import philox, sample_token
from tgi_asgi import ops
from tgi_asgi.types import SamplingParams

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_authors_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert philox(counter, key) == expected


@pytest.mark.parametrize("vocab", [1, 3, 17, 129, 1000])
@pytest.mark.parametrize(("seed", "choice", "position"), [(0, 0, 1), (2**63 - 1, 3, 5), (1 << 40, 127, 9000)])
def test_samples_are_the_references(
    kernel_set: str, vocab: int, seed: int, choice: int, position: int
) -> None:
    state = ops.SampleState(1, vocab)
    state.start(0, SamplingParams(seed=seed), choice=choice, prompt_ids=[0] * position)
    for step in range(4):
        logits = np.random.default_rng(step).standard_normal((1, vocab), np.float32) * 3
        token = int(ops.sample(logits, state, [0]).token_ids[0])
        scores = (logits[0] - logits.max()).tolist()
        assert token == sample_token(scores, seed, choice, position + step)
