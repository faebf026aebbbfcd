"""The recorded step: against the eager operators, and the same bits however a batch is put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_same_bits
from tests.support.blocks import random_weight
from tgi_asgi import _C, ops
from tgi_asgi.models.batch import Batch
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.llama import Llama
from tgi_asgi.ops.packed import PackedMatrix
from tgi_asgi.runner.program import EagerStep, RecordedStep, Step, can_record, make_step
from tgi_asgi.types import SamplingParams

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=199,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=8,  # groups of four: tiles of six rows cut through tokens
    num_kv_heads=2,
    head_dim=64,
    context_length=1024,
    norm_eps=1e-5,
    rope_theta=10000.0,
    has_qkv_bias=True,
)
Make = Callable[[Llama, list[ops.KvLayer]], Step]
NUM_BLOCKS = 160
MAX_TOKENS = 700


class RandomWeights:
    """Weights of any name and shape, the same for the same name."""

    num_bytes = 0

    def __init__(self, format: str) -> None:
        self._format = format

    def __contains__(self, name: object) -> bool:
        return name != "rope_freqs.weight"

    def get(self, name: str, shape: tuple[int, ...]) -> ops.WeightSource:
        seed = sum(name.encode())
        if len(shape) == 1:
            values = np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)
            return ops.WeightSource(values.view(np.uint8), "F32", shape)
        return random_weight(self._format, shape[0], shape[1], seed)

    def close(self) -> None:
        pass


@dataclass
class Piece:
    """Tokens [start, stop) of a sequence, to be computed in one step."""

    sequence: int
    start: int
    stop: int


def tokens_of(sequence: int, length: int = 700) -> list[int]:
    rng = np.random.default_rng(1000 + sequence)
    return list(map(int, rng.integers(0, CONFIG.vocab_size, length)))


class Cache:
    """A step with its cache: gives each sequence blocks of its own, in any order."""

    def __init__(
        self, make: Callable[[Llama, list[ops.KvLayer]], Step], model: Llama, dtype: torch.dtype
    ) -> None:
        kv = ops.allocate_kv(CONFIG.num_layers, NUM_BLOCKS, CONFIG.num_kv_heads, CONFIG.head_dim, 16, dtype)
        for layer in kv:  # what a cache holds before it is written must not matter
            layer.pool.fill_(127 if dtype is torch.int8 else float("nan"))  # 0x7F7F as a scale: NaN, too
        self.step = make(model, kv)
        self.tables: dict[int, list[int]] = {}
        self.free = list(range(NUM_BLOCKS))

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute the pieces as one batch; return the logits of all their tokens."""
        batch = self.batch(pieces)
        x, _ = self.step.run(batch, _int([]))
        rows = torch.arange(len(batch.ids), dtype=torch.int32)
        return torch.cat([self.step.logits(x, part) for part in rows.split(32)])

    def draw(self, pieces: Sequence[Piece], rows: Sequence[int]) -> ops.SampleResult:
        """Compute the pieces as one batch and draw, greedily, after rows of it."""
        state = _greedy(len(rows))
        return self.step.draw(self.batch(pieces), _int(rows), _int(range(len(rows))), state, None)

    def batch(self, pieces: Sequence[Piece]) -> Batch:
        """Make a batch of the pieces; new blocks are taken as they need them."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for piece in pieces:
            table = self.tables.setdefault(piece.sequence, [])
            while len(table) * 16 < piece.stop:
                table.append(self.free.pop())
            span = range(piece.start, piece.stop)
            ids += tokens_of(piece.sequence)[piece.start : piece.stop]
            positions += span
            slots += [table[position // 16] * 16 + position % 16 for position in span]
            starts.append(len(ids))
        tables = ops.AttentionTables(
            _int(starts), _int([piece.stop for piece in pieces]), self._block_table(pieces)
        )
        return Batch(_int(ids), _int(positions), torch.tensor(slots), tables)

    def _block_table(self, pieces: Sequence[Piece]) -> Tensor:
        widest = max(len(self.tables[piece.sequence]) for piece in pieces)
        table = torch.full((len(pieces), widest), -1, dtype=torch.int32)
        for row, piece in zip(table, pieces, strict=True):
            blocks = self.tables[piece.sequence]
            row[: len(blocks)] = _int(blocks)
        return table


def _int(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _greedy(num_slots: int) -> ops.SampleState:
    """Return slots whose draws have the log-probabilities of all tokens."""
    state = ops.SampleState(num_slots, CONFIG.vocab_size)
    for slot in range(num_slots):
        sampling = SamplingParams(temperature=0.0, logprobs=CONFIG.vocab_size)
        state.start(slot, sampling, choice=0, prompt_ids=[0])
    return state


def recorded(model: Llama, kv: list[ops.KvLayer]) -> Step:
    return RecordedStep(model, kv, max_tokens=MAX_TOKENS, max_rows=32, max_context=CONFIG.context_length)


def recorded_cache(
    format: str, *, is_exact: bool, config: ModelConfig = CONFIG, kv_dtype: torch.dtype | None = None
) -> Cache:
    model = Llama(config, RandomWeights(format), ops.Packing(is_exact=is_exact), max_positions=1024)
    return Cache(recorded, model, kv_dtype or (torch.float32 if is_exact else torch.bfloat16))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> object:
    if request.param not in _C.supported_isas():
        pytest.skip(f"this machine does not run {request.param}")
    before = _C.isa()
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(before)


@pytest.mark.parametrize("has_qk_norm", [False, True])
@pytest.mark.parametrize("format", ["F32", "Q4_1"])
def test_an_exact_step_computes_what_the_eager_operators_do(format: str, has_qk_norm: bool, isa: str) -> None:
    config = replace(CONFIG, has_qk_norm=has_qk_norm)
    eager_model = Llama(config, RandomWeights(format), torch.float32, max_positions=1024)
    eager = Cache(EagerStep, eager_model, torch.float32)
    exact = recorded_cache(format, is_exact=True, config=config)
    steps = [[Piece(0, 0, 19)], [Piece(1, 0, 40), Piece(0, 19, 20)], [Piece(0, 20, 21), Piece(1, 40, 41)]]
    for pieces in steps:
        expected, found = eager.run(pieces), exact.run(pieces)
        assert torch.isfinite(found).all()
        assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_a_fast_step_is_close_to_the_exact_one(kv_dtype: torch.dtype, isa: str) -> None:
    exact = recorded_cache("Q8_0", is_exact=True)
    fast = recorded_cache("Q8_0", is_exact=False, kv_dtype=kv_dtype)
    pieces = [Piece(0, 0, 33), Piece(1, 0, 7)]
    expected, found = exact.run(pieces), fast.run(pieces)
    error = (found - expected).double().norm() / expected.double().norm()
    assert 1e-6 < error < 0.05, f"{error}: eight bits and the cache's type, no more"


# Contexts on both sides of a chunk of 256 and of a block of 16; the last piece is alone in its step.
WHOLE = [Piece(0, 0, 300), Piece(1, 0, 17), Piece(2, 0, 256), Piece(3, 0, 1)]
CHUNKED = [
    [Piece(0, 0, 5), Piece(2, 0, 100)],
    [Piece(1, 0, 16), Piece(0, 5, 250), Piece(3, 0, 1)],
    [Piece(2, 100, 255), Piece(0, 250, 257), Piece(1, 16, 17)],
    [Piece(0, 257, 299)],
    [Piece(2, 255, 256), Piece(0, 299, 300)],
]

# Pieces that read what others of the same step write, before or behind them.
TOGETHER = [
    Piece(0, 256, 257),
    Piece(2, 0, 96),
    Piece(0, 0, 256),
    Piece(1, 16, 17),
    Piece(0, 257, 300),
    Piece(1, 0, 16),
    Piece(2, 96, 256),
    Piece(3, 0, 1),
]


def by_token(results: Sequence[tuple[Sequence[Piece], Tensor]]) -> dict[tuple[int, int], Tensor]:
    """Logits by (sequence, position)."""
    found: dict[tuple[int, int], Tensor] = {}
    for pieces, logits in results:
        places = [
            (piece.sequence, position) for piece in pieces for position in range(piece.start, piece.stop)
        ]
        found.update(zip(places, logits, strict=True))
    return found


@pytest.mark.parametrize(
    ("format", "is_exact", "has_qk_norm", "kv_dtype"),
    [
        ("Q4_1", False, False, torch.bfloat16),
        ("Q4_1", False, True, torch.bfloat16),
        ("Q4_1", False, False, torch.int8),
        ("Q4_1", False, True, torch.int8),
        ("Q8_0", True, False, torch.float32),
        ("BF16", False, False, torch.bfloat16),
        ("Q6_K", False, False, torch.bfloat16),
    ],
)
def test_chunks_batches_and_block_tables_change_no_bit(
    format: str, is_exact: bool, has_qk_norm: bool, kv_dtype: torch.dtype
) -> None:
    config = replace(CONFIG, has_qk_norm=has_qk_norm)
    whole, chunked, together, shuffled = (
        recorded_cache(format, is_exact=is_exact, config=config, kv_dtype=kv_dtype) for _ in range(4)
    )
    expected = by_token([(WHOLE, whole.run(WHOLE))])
    found = by_token([(pieces, chunked.run(pieces)) for pieces in CHUNKED])
    at_once = by_token([(TOGETHER, together.run(TOGETHER))])
    shuffled.free = list(map(int, np.random.default_rng(0).permutation(NUM_BLOCKS)))
    alone = by_token([([piece], shuffled.run([piece])) for piece in reversed(WHOLE)])
    assert found.keys() == alone.keys() == at_once.keys() == expected.keys()
    for place, logits in expected.items():
        assert torch.isfinite(logits).all()
        assert_same_bits(found[place], logits)
        assert_same_bits(alone[place], logits)
        assert_same_bits(at_once[place], logits)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("context", [290, 700])
def test_a_context_split_over_threads_changes_no_bit(context: int, kv_dtype: torch.dtype) -> None:
    before, results = _C.num_threads(), []
    for threads in (1, 2, 3, 5):
        _C.set_num_threads(threads)
        cache = recorded_cache("Q4_1", is_exact=False, kv_dtype=kv_dtype)
        cache.run([Piece(0, 0, context - 1)])
        results.append(cache.run([Piece(0, context - 1, context), Piece(1, 0, 2)]))
    _C.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([0, 1, 2], id="the first"),  # where they are already
        pytest.param([0, 1, 44, 351], id="last tokens"),  # of each piece: 352 tokens in all
        pytest.param([351], id="one"),
        pytest.param([1, 44, 20, 351], id="not ascending"),
        pytest.param([10, 20, 350], id="inside pieces"),
    ],
)
def test_a_draw_computes_of_its_rows_what_a_whole_step_does(rows: list[int], threads: int) -> None:
    before = _C.num_threads()
    _C.set_num_threads(threads)
    drawn, whole = (recorded_cache("Q4_1", is_exact=False) for _ in range(2))
    prompts = [Piece(0, 0, 300), Piece(1, 0, 3), Piece(2, 0, 7)]
    later = [Piece(0, 300, 301), Piece(1, 3, 4), Piece(2, 7, 50), Piece(3, 0, 307)]
    for pieces, wanted in ((prompts, [299, 309]), (later, rows)):
        found = drawn.draw(pieces, wanted)
        logits = whole.run(pieces)[wanted].contiguous()
        slots = _int(range(len(wanted)))
        expected = ops.sample(logits, _greedy(len(wanted)), slots)
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert_same_bits(getattr(found, name), getattr(expected, name))
    _C.set_num_threads(before)


def test_after_a_draw_there_are_no_logits_of_other_rows() -> None:
    cache = recorded_cache("Q4_1", is_exact=False)
    cache.draw([Piece(0, 0, 20)], [19])
    with pytest.raises(RuntimeError, match="`draw` has kept only what it drew after"):
        cache.step.logits(torch.empty(0), _int([3]))
    cache.draw([Piece(0, 20, 21)], [0])  # all of its tokens
    assert cache.step.logits(torch.empty(0), _int([0])).shape == (1, CONFIG.vocab_size)


def test_steps_alternate_sizes_without_a_trace() -> None:
    cache, alone = (recorded_cache("Q4_1", is_exact=False) for _ in range(2))
    expected = alone.run([Piece(1, 0, 3)])
    cache.run([Piece(0, 0, 600)])
    assert_same_bits(cache.run([Piece(1, 0, 3)]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": _int([199])}, "`ids`"),
        ({"positions": _int([1024])}, "`positions`"),
        ({"slots": torch.tensor([NUM_BLOCKS * 16])}, "`slots`"),
        ({"ids": torch.tensor([1])}, "`ids` must be Int"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_computed(
    change: dict[str, Any], message: str
) -> None:
    cache = recorded_cache("Q4_1", is_exact=False)
    tables = ops.AttentionTables(_int([0, 1]), _int([1]), _int([0]).reshape(1, 1))
    good = Batch(_int([1]), _int([0]), torch.tensor([0]), tables)
    cache.step.run(good, _int([0]))
    with pytest.raises(RuntimeError, match=message):
        cache.step.run(replace(good, **change), _int([0]))
    with pytest.raises(RuntimeError, match="`rows`"):
        cache.step.run(good, _int([1]))
    long = replace(tables, context_len=_int([17]))
    with pytest.raises(RuntimeError, match="`context_len`"):
        cache.step.run(replace(good, tables=long), _int([0]))
    outside = replace(tables, block_table=_int([NUM_BLOCKS]).reshape(1, 1))
    with pytest.raises(RuntimeError, match="`block_table`"):
        cache.step.run(replace(good, tables=outside), _int([0]))


def test_models_whose_shapes_the_kernels_do_not_have_run_eagerly() -> None:
    assert can_record(CONFIG)
    small = replace(CONFIG, head_dim=16)
    assert not can_record(small)
    model = Llama(small, RandomWeights("F32"), torch.float32, max_positions=64)
    kv = ops.allocate_kv(2, 4, 2, 16, 16, torch.float32)
    assert isinstance(make_step(model, kv, max_tokens=8, max_rows=2, max_context=64), EagerStep)


@pytest.mark.parametrize(("quantise", "limit"), [("Q8_0", 0.02), ("Q4_0", 0.3)])
def test_float_weights_are_quantised_as_they_are_loaded(quantise: str, limit: float) -> None:
    weights = RandomWeights("BF16")
    model = Llama(CONFIG, weights, ops.Packing(is_exact=True, quantise=quantise), max_positions=1024)
    down = model.layers[0].down.matrix
    assert isinstance(down, PackedMatrix)
    assert down.formats == (quantise,)
    pieces = [Piece(0, 0, 9)]
    expected = recorded_cache("BF16", is_exact=True).run(pieces)
    found = Cache(recorded, model, torch.float32).run(pieces)
    assert 1e-5 < (found - expected).double().norm() / expected.double().norm() < limit


def test_a_vocabulary_is_never_quantised_below_eight_bits() -> None:
    packing = ops.Packing(is_exact=False, quantise="Q4_0")
    assert packing.format_of("BF16", 49152, 576) == "Q8_0"
    assert packing.format_of("BF16", 3072, 576) == "Q4_0"
    assert packing.format_of("Q6_K", 3072, 576) == "Q6_K", "what the file quantised stays as it is"
    assert packing.format_of("F32", 64, 48) == "F32", "blocks of 32 do not fit"
