"""Prompts in bfloat16, generated tokens in int8: each has its own bits, whatever shares its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_same_bits
from tests.runner.test_program import (
    ALL,
    CHUNKED,
    CONFIG,
    ODD,
    TOGETHER,
    WHOLE,
    Cache,
    Piece,
    RandomWeights,
    _greedy,
    by_token,
)
from tests.support.eager_ops import sample, samples_of
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.ops.tensors import from_tensor

BY_KIND = ops.Packing(is_exact=False, has_float_prompts=True)
FAST = ops.Packing(is_exact=False)
PROMPT_LENS = {0: 258, 1: 9, 2: 256, 3: 1}  # of the pieces, some with generated tokens and some without


class MixedWeights(RandomWeights):
    """Weights of several formats, chosen by parts of their names."""

    def __init__(self, format: str, others: dict[str, str]) -> None:
        super().__init__(format)
        self._others = others

    def get(self, name: str, shape: tuple[int, ...], part: slice = ALL) -> ops.WeightSource:
        for word, format in self._others.items():
            if word in name and len(shape) == 2:
                return random_weight(format, shape[0], shape[1], sum(name.encode()))
        return super().get(name, shape, part)


class Bfloat16Weights(RandomWeights):
    """The same weights decoded to bfloat16, except the vocabulary."""

    def get(self, name: str, shape: tuple[int, ...], part: slice = ALL) -> ops.WeightSource:
        source = super().get(name, shape, part)
        if len(shape) == 1 or "embed_tokens" in name or "lm_head" in name:
            return source
        return from_tensor(decoded_values(source).bfloat16())


def by_kind(pieces: Sequence[Piece]) -> list[Piece]:
    """Cut pieces where their prompts end; pieces of generated tokens come first."""
    prompts, sampled = [], []
    for piece in pieces:
        end = PROMPT_LENS[piece.sequence]
        if piece.start < end:
            prompts.append(Piece(piece.sequence, piece.start, min(piece.stop, end)))
        if piece.stop > end:
            sampled.append(Piece(piece.sequence, max(piece.start, end), piece.stop))
    return sampled + prompts


def run(cache: Cache, *steps: Sequence[Piece]) -> dict[tuple[int, int], Tensor]:
    """Return the logits by (sequence, position)."""
    return by_token([(pieces, cache.run(pieces)) for pieces in map(by_kind, steps)])


def made(weights: str | RandomWeights = "Q4_1", config: ModelConfig = CONFIG) -> Cache:
    return Cache(config, weights, BY_KIND, "bfloat16", PROMPT_LENS)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the process's number of threads."""
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


def assert_alike(found: dict[tuple[int, int], Tensor], expected: dict[tuple[int, int], Tensor]) -> None:
    assert found.keys() == expected.keys()
    for place, logits in expected.items():
        assert torch.isfinite(logits).all()
        assert_same_bits(found[place], logits)


@pytest.mark.parametrize(
    ("format", "config"),
    [
        ("Q4_1", CONFIG),
        ("Q8_0", CONFIG),
        ("Q6_K", CONFIG),
        ("Q4_1", replace(CONFIG, intermediate_size=1184)),
        ("Q4_K", replace(CONFIG, intermediate_size=1280)),
    ],
    ids=["Q4_1", "Q8_0", "Q6_K", "Q4_1 wide", "Q4_K wide"],
)
def test_tokens_of_a_prompt_have_the_bits_of_the_decoded_model(
    format: str, config: ModelConfig, kernel_set: str
) -> None:
    pieces = [Piece(0, 0, 70), Piece(1, 0, 3)]
    decoded = Cache(config, Bfloat16Weights(format), FAST, "bfloat16")
    assert_same_bits(made(format, config).run(pieces), decoded.run(pieces))


def test_tokens_that_were_sampled_have_the_bits_of_int8(kernel_set: str) -> None:
    pieces = [Piece(0, 0, 40), Piece(1, 0, 3)]
    cache = Cache(CONFIG, "Q4_1", BY_KIND, "bfloat16", prompt_lens={0: 0, 1: 0})
    plain = Cache(CONFIG, "Q4_1", FAST, "bfloat16")
    expected = plain.run(pieces)
    assert_same_bits(cache.run(pieces), expected)
    assert not torch.equal(made().run(pieces), expected)


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        pytest.param("Q4_1", CONFIG, id="Q4_1"),
        pytest.param("Q6_K", replace(CONFIG, has_qk_norm=True), id="Q6_K-norms"),
        pytest.param(MixedWeights("Q4_K", {"down_proj": "BF16"}), CONFIG, id="coded gates"),
        pytest.param(MixedWeights("BF16", {"down_proj": "Q4_K"}), CONFIG, id="coded down"),
        pytest.param(MixedWeights("Q8_0", {"gate_proj": "F16", "k_proj": "Q5_0"}), CONFIG, id="mixed parts"),
        pytest.param("BF16", ODD, id="no codes"),
    ],
)
def test_chunks_batches_and_threads_change_no_bit(weights: str | RandomWeights, config: ModelConfig) -> None:
    expected = run(made(weights, config), WHOLE)
    for threads in (1, 3):
        _C.set_num_threads(threads)
        assert_alike(run(made(weights, config), *CHUNKED), expected)
        assert_alike(run(made(weights, config), TOGETHER), expected)
        assert_alike(run(made(weights, config), *([piece] for piece in reversed(WHOLE))), expected)


def test_tiles_of_any_size_keep_kinds_apart(kernel_set: str) -> None:
    expected = run(made(), *([piece] for piece in WHOLE))
    assert_alike(run(made(), TOGETHER), expected)
    assert_alike(run(made(), *CHUNKED), expected)


@pytest.mark.parametrize(
    ("rows", "num_threads"),
    [([41, 42, 46], 1), ([41, 42, 46], 5), ([0, 43, 353], 2), ([0, 43, 353], 5), ([5, 41], 2), ([353, 0], 1)],
)
def test_sampling_computes_of_its_rows_what_a_whole_step_does(rows: list[int], num_threads: int) -> None:
    _C.set_num_threads(num_threads)
    sampled, whole = made(), made()
    first = [Piece(0, 0, 202), Piece(1, 0, 9), Piece(3, 0, 1)]
    # 42 sampled tokens, then 312 prompt tokens.
    later = by_kind([Piece(1, 9, 50), Piece(3, 1, 2), Piece(2, 0, 256), Piece(0, 202, 258)])
    for pieces, wanted in ((first, [201]), (later, rows)):
        found = samples_of(sampled.sample(pieces, wanted))
        logits = whole.run(pieces)[wanted].contiguous()
        expected = sample(logits, _greedy(len(wanted)), range(len(wanted)))
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert_same_bits(getattr(found, name), getattr(expected, name))
