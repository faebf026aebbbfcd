"""A model's recorded program: against float64, and the same bits however a batch is composed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_same_bits
from tests.reference.decoder import decoder_logits
from tests.support.eager_ops import sample, samples_of
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import record
from tgi_asgi.models.layer_spec import LayerSpec, RopeSpec
from tgi_asgi.types import SamplingParams

ROPE = RopeSpec(64, 10000.0)
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=199,
    hidden_size=256,
    intermediate_size=512,
    num_heads=8,  # groups of four, so that tiles of six rows cut through tokens
    num_kv_heads=2,
    head_dim=64,
    context_length=1024,
    norm_eps=1e-5,
    layers=(LayerSpec(ROPE, None, 0.125),) * 2,
    has_qkv_bias=True,
)
# No size is a multiple of 32, part of a head is rotated, and the last layer sees 20 positions, unrotated.
ODD = replace(
    CONFIG,
    hidden_size=200,
    intermediate_size=300,
    num_heads=6,
    head_dim=24,
    layers=(LayerSpec(RopeSpec(12, 10000.0), None, 0.2), LayerSpec(None, 20, 0.3)),
    embedding_factor=1.5,
    residual_factor=0.7,
    logits_scale=0.5,
)
NUM_BLOCKS = 160
MAX_TOKENS = 700
ALL = slice(None)  # of a tensor's first dimension


class RandomWeights:
    """Random weights for any name and shape; the same name yields the same values."""

    num_bytes, is_gguf = 0, False

    def __init__(self, format: str) -> None:
        self._format = format

    def __contains__(self, name: object) -> bool:
        return name != "rope_freqs.weight"

    def get(self, name: str, shape: tuple[int, ...], part: slice = ALL) -> ops.WeightSource:
        assert part == ALL, "no test's model has experts"
        seed = sum(name.encode())
        if len(shape) == 1:
            values = np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)
            return ops.WeightSource(values.view(np.uint8), "F32", shape)
        return random_weight(self._format, shape[0], shape[1], seed)

    def decoded_values(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return decoded_values(self.get(name, shape))

    def unread(self) -> list[str]:
        return []

    def stored(self) -> dict[str, tuple[str, int]]:
        return {}

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
    """A program with its cache, which gives each sequence its own blocks, in any order."""

    def __init__(
        self,
        config: ModelConfig,
        weights: str | RandomWeights,
        packing: ops.Packing,
        dtype: ops.KvDtype,
        prompt_lens: dict[int, int] | None = None,  # by sequence; later tokens were sampled
    ) -> None:
        if isinstance(weights, str):
            weights = RandomWeights(weights)
        model = Decoder(config, weights, packing, max_positions=1024)
        self.prompt_lens = prompt_lens or {}
        pool = ops.KvPool(
            config.caches,
            num_blocks=NUM_BLOCKS,
            block_size=16,
            dtype=dtype,
        )
        # The cache's contents before it is written must not matter, so it starts as NaN, including int8
        # scales.
        pool.native.memory()[:] = 0x7F if dtype == "int8" else 0xFF
        limits = ops.StepLimits(
            max_tokens=MAX_TOKENS, max_sequences=32, max_rows=32, max_context=config.context_length
        )
        self.program = ops.CpuProgram(record(model, pool.layers), limits)
        self.tables: dict[int, list[int]] = {}
        self.free = list(range(NUM_BLOCKS))

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute the pieces as one batch; return the logits of all their tokens."""
        batch = self.batch(pieces)
        self.program.run(batch, ())
        rows = np.array_split(np.arange(len(batch.ids)), -(-len(batch.ids) // 32))
        logits = [self.program.run_head(part.tolist()).copy() for part in rows]
        return torch.from_numpy(np.concatenate(logits))

    def sample(self, pieces: Sequence[Piece], rows: Sequence[int]) -> ops.SampleResult:
        """Compute the pieces as one batch and sample greedily after some of its rows."""
        state = _greedy(len(rows))
        return self.program.run_and_sample(self.batch(pieces), rows, range(len(rows)), state, None)

    def batch(self, pieces: Sequence[Piece]) -> ops.FlatRows:
        """Make a batch of the pieces, allocating new blocks as needed."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        num_generated = 0
        for piece in pieces:
            table = self.tables.setdefault(piece.sequence, [])
            while len(table) * 16 < piece.stop:
                table.append(self.free.pop())
            span = range(piece.start, piece.stop)
            ids += tokens_of(piece.sequence)[piece.start : piece.stop]
            positions += span
            slots += [table[position // 16] * 16 + position % 16 for position in span]
            starts.append(len(ids))
            if piece.start >= self.prompt_lens.get(piece.sequence, piece.stop):
                num_generated = len(ids)
        return ops.FlatRows(
            ids=ids, positions=positions, slots=slots, query_start=starts,
            context_len=[piece.stop for piece in pieces], block_table=self._block_table(pieces),
            num_generated=num_generated,
        )  # fmt: skip

    def _block_table(self, pieces: Sequence[Piece]) -> np.ndarray[Any, np.dtype[np.int32]]:
        widest = max(len(self.tables[piece.sequence]) for piece in pieces)
        table = np.full((len(pieces), widest), -1, np.int32)
        for row, piece in zip(table, pieces, strict=True):
            blocks = self.tables[piece.sequence]
            row[: len(blocks)] = blocks
        return table


def _greedy(num_slots: int) -> ops.SampleState:
    """Return slots whose samples report the log-probabilities of all tokens."""
    state = ops.SampleState(num_slots, CONFIG.vocab_size)
    for slot in range(num_slots):
        sampling = SamplingParams(temperature=0.0, logprobs=CONFIG.vocab_size)
        state.start(slot, sampling, choice=0, prompt_ids=[0])
    return state


def recorded_cache(
    format: str, *, is_exact: bool, config: ModelConfig = CONFIG, kv_dtype: ops.KvDtype | None = None
) -> Cache:
    dtype = kv_dtype or ("float32" if is_exact else "bfloat16")
    return Cache(config, format, ops.Packing(is_exact=is_exact), dtype)


@pytest.mark.parametrize(
    ("format", "config"),
    [
        pytest.param("F32", CONFIG, id="F32"),
        pytest.param("Q4_1", CONFIG, id="Q4_1"),
        pytest.param("F32", replace(CONFIG, has_qk_norm=True), id="F32-norms"),
        pytest.param("Q4_1", replace(CONFIG, has_qk_norm=True), id="Q4_1-norms"),
        pytest.param("F32", ODD, id="F32-odd"),
        pytest.param("BF16", replace(ODD, has_qk_norm=True, has_tied_embeddings=True), id="BF16-odd-norms"),
    ],
)
def test_an_exact_step_is_what_float64_computes(format: str, config: ModelConfig, kernel_set: str) -> None:
    weights = RandomWeights(format)
    expected = {n: decoder_logits(config, weights, tokens_of(n, 41)) for n in (0, 1)}
    exact = recorded_cache(format, is_exact=True, config=config)
    steps = [[Piece(0, 0, 19)], [Piece(1, 0, 40), Piece(0, 19, 20)], [Piece(0, 20, 21), Piece(1, 40, 41)]]
    for pieces in steps:
        found = exact.run(pieces)
        wanted = torch.cat([expected[piece.sequence][piece.start : piece.stop] for piece in pieces])
        assert torch.isfinite(found).all()
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("kv_dtype", "limit"), [("bfloat16", 0.06), ("int8", 0.07)])
def test_a_fast_step_is_close_to_the_exact_one(kv_dtype: ops.KvDtype, limit: float, kernel_set: str) -> None:
    exact = recorded_cache("Q8_0", is_exact=True)
    fast = recorded_cache("Q8_0", is_exact=False, kv_dtype=kv_dtype)
    pieces = [Piece(0, 0, 33), Piece(1, 0, 7)]
    expected, found = exact.run(pieces), fast.run(pieces)
    error = (found - expected).double().norm() / expected.double().norm()
    message = "the error must come from int8 activations and the cache's rounding alone"
    assert 0.01 < error < limit, f"{error}: {message}"


# Contexts on both sides of a chunk of 256 and of a block of 16; the last piece is alone in its step.
WHOLE = [Piece(0, 0, 300), Piece(1, 0, 17), Piece(2, 0, 256), Piece(3, 0, 1)]
CHUNKED = [
    [Piece(0, 0, 5), Piece(2, 0, 100)],
    [Piece(1, 0, 16), Piece(0, 5, 250), Piece(3, 0, 1)],
    [Piece(2, 100, 255), Piece(0, 250, 257), Piece(1, 16, 17)],
    [Piece(0, 257, 299)],
    [Piece(2, 255, 256), Piece(0, 299, 300)],
]

# Pieces that read what others of the same step write, listed before or after them.
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
    """Return the logits by (sequence, position)."""
    found: dict[tuple[int, int], Tensor] = {}
    for pieces, logits in results:
        places = [
            (piece.sequence, position) for piece in pieces for position in range(piece.start, piece.stop)
        ]
        found.update(zip(places, logits, strict=True))
    return found


@pytest.mark.parametrize(
    ("format", "is_exact", "config", "kv_dtype"),
    [
        pytest.param("Q4_1", False, CONFIG, "bfloat16", id="Q4_1"),
        pytest.param("Q4_1", False, replace(CONFIG, has_qk_norm=True), "bfloat16", id="Q4_1-norms"),
        pytest.param("Q4_1", False, CONFIG, "int8", id="Q4_1-int8"),
        pytest.param("Q4_1", False, replace(CONFIG, has_qk_norm=True), "int8", id="Q4_1-norms-int8"),
        pytest.param("Q8_0", True, CONFIG, "float32", id="Q8_0-exact"),
        pytest.param("BF16", False, CONFIG, "bfloat16", id="BF16"),
        pytest.param("Q6_K", False, CONFIG, "bfloat16", id="Q6_K"),
        pytest.param("BF16", False, replace(ODD, has_qk_norm=True), "bfloat16", id="BF16-odd"),
        pytest.param("F32", True, ODD, "float32", id="F32-odd-exact"),
    ],
)
def test_chunks_batches_and_block_tables_change_no_bit(
    format: str, is_exact: bool, config: ModelConfig, kv_dtype: ops.KvDtype
) -> None:
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


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Restore the test module's number of threads."""
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("context", [290, 700])
def test_a_context_split_over_threads_changes_no_bit(context: int, kv_dtype: ops.KvDtype) -> None:
    results = []
    for threads in (1, 2, 3, 5):
        _C.set_num_threads(threads)
        cache = recorded_cache("Q4_1", is_exact=False, kv_dtype=kv_dtype)
        cache.run([Piece(0, 0, context - 1)])
        results.append(cache.run([Piece(0, context - 1, context), Piece(1, 0, 2)]))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize(
    ("rows", "threads"),
    [
        pytest.param([0, 1, 2], 2, id="the first"),  # already in place
        pytest.param([0, 1, 44, 351], 1, id="last tokens"),  # of each piece: 352 tokens in all
        pytest.param([0, 1, 44, 351], 5, id="last tokens, many threads"),
        pytest.param([351], 1, id="one"),
        pytest.param([351], 2, id="one, two threads"),
        pytest.param([1, 44, 20, 351], 1, id="not ascending"),
        pytest.param([1, 44, 20, 351], 5, id="not ascending, many threads"),
        pytest.param([10, 20, 350], 2, id="inside pieces"),
    ],
)
def test_sampling_computes_of_its_rows_what_a_whole_step_does(
    rows: list[int], threads: int, config: ModelConfig
) -> None:
    _C.set_num_threads(threads)
    format = "Q4_1" if config is CONFIG else "BF16"
    sampled, whole = (recorded_cache(format, is_exact=False, config=config) for _ in range(2))
    prompts = [Piece(0, 0, 300), Piece(1, 0, 3), Piece(2, 0, 7)]
    later = [Piece(0, 300, 301), Piece(1, 3, 4), Piece(2, 7, 50), Piece(3, 0, 307)]
    for pieces, wanted in ((prompts, [299, 309]), (later, rows)):
        found = samples_of(sampled.sample(pieces, wanted))
        logits = whole.run(pieces)[wanted].contiguous()
        expected = sample(logits, _greedy(len(wanted)), range(len(wanted)))
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert_same_bits(getattr(found, name), getattr(expected, name))


def test_after_sampling_there_are_no_logits_of_other_rows() -> None:
    cache = recorded_cache("Q4_1", is_exact=False)
    cache.sample([Piece(0, 0, 20)], [19])
    with pytest.raises(ValueError, match="`run_head` is of a step that `run` has computed"):
        cache.program.run_head([3])
    cache.sample([Piece(0, 20, 21)], [0])  # all of its tokens
    with pytest.raises(ValueError, match="`run_head` is of a step that `run` has computed"):
        cache.program.run_head([0])


def test_a_step_that_was_refused_leaves_the_logits_of_the_one_before() -> None:
    cache = recorded_cache("Q4_1", is_exact=False)
    with pytest.raises(ValueError, match="`run_head` is of a step that `run` has computed"):
        cache.program.run_head([])
    expected = cache.run([Piece(0, 0, 2)])
    longer = cache.batch([Piece(0, 2, 7)])
    for refused in (cache.program.run, cache.program.profile):
        with pytest.raises(ValueError, match=r"`rows`\[0\] must be in \[0, 5\), got 5"):
            refused(longer, [5])
    with pytest.raises(ValueError, match=r"`rows`\[0\] must be in \[0, 2\), got 4"):
        cache.program.run_head([4])
    assert_same_bits(torch.from_numpy(cache.program.run_head([0, 1])), expected)


def test_steps_alternate_sizes_without_a_trace() -> None:
    cache, alone = (recorded_cache("Q4_1", is_exact=False) for _ in range(2))
    expected = alone.run([Piece(1, 0, 3)])
    cache.run([Piece(0, 0, 600)])
    assert_same_bits(cache.run([Piece(1, 0, 3)]), expected)


ONE_TOKEN: dict[str, Any] = {
    "ids": [1], "positions": [0], "slots": [0], "query_start": [0, 1], "context_len": [1],
    "block_table": np.zeros((1, 1), np.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [199]}, "`ids`"),
        ({"ids": [-1]}, "`ids`"),
        ({"positions": [1024]}, "`positions`"),
        ({"slots": [NUM_BLOCKS * 16]}, "`slots`"),
        ({"context_len": [17]}, "`context_len`"),
        ({"context_len": [0]}, "`context_len`"),
        ({"query_start": [0, 2]}, "`query_start`"),
        (
            {"query_start": [0, 0, 1], "context_len": [1, 1], "block_table": np.zeros((2, 1), np.int32)},
            "ascend",
        ),
        ({"block_table": np.full((1, 1), NUM_BLOCKS, np.int32)}, "`block_table`"),
        ({"num_generated": 2}, "`num_generated`"),
        ({"num_generated": -1}, "`num_generated`"),
    ],
)
def test_what_is_out_of_range_is_refused_before_anything_is_computed(
    change: dict[str, Any], message: str
) -> None:
    cache = recorded_cache("Q4_1", is_exact=False)
    expected = cache.program.run(ops.FlatRows(**ONE_TOKEN), [0]).copy()
    with pytest.raises(ValueError, match=message):
        cache.program.run(ops.FlatRows(**{**ONE_TOKEN, **change}), [0])
    assert cache.program.run(ops.FlatRows(**ONE_TOKEN), [0]).tobytes() == expected.tobytes()


def test_rows_and_sizes_are_held_to_what_was_recorded() -> None:
    cache = recorded_cache("Q4_1", is_exact=False)
    with pytest.raises(ValueError, match="`rows`"):
        cache.program.run(ops.FlatRows(**ONE_TOKEN), [1])
    with pytest.raises(ValueError, match="`rows` must have at most 32 elements"):
        cache.program.run(ops.FlatRows(**ONE_TOKEN), [0] * 33)
    with pytest.raises(ValueError, match=f"`ids` must have at most {MAX_TOKENS} elements"):
        cache.program.run(cache.batch([Piece(0, 0, 500), Piece(1, 0, 500)]), [0])
    with pytest.raises(TypeError):
        ops.FlatRows(**{**ONE_TOKEN, "ids": [1.5]})


def test_a_program_is_for_the_threads_that_it_was_recorded_with(num_threads: None) -> None:
    _C.set_num_threads(1)
    cache = recorded_cache("Q4_1", is_exact=False)
    _C.set_num_threads(2)
    with pytest.raises(ValueError, match="recorded for 1 threads, not 2"):
        cache.program.run(ops.FlatRows(**ONE_TOKEN), [0])


@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize(("quantise", "limit"), [("Q8_0", 0.02), ("Q4_0", 0.3)])
def test_float_weights_are_quantised_as_they_are_loaded(
    quantise: str, limit: float, config: ModelConfig
) -> None:
    packing = ops.Packing(is_exact=True, quantise=quantise)
    model = Decoder(config, RandomWeights("BF16"), packing, max_positions=1024)
    assert model.layers[0].down.made.matrix.format == quantise
    assert model.embedding.made.matrix.format == "Q8_0", "a vocabulary must keep at least eight bits"
    pieces = [Piece(0, 0, 9)]
    expected = recorded_cache("BF16", is_exact=True, config=config).run(pieces)
    found = Cache(config, "BF16", packing, "float32").run(pieces)
    assert 1e-5 < (found - expected).double().norm() / expected.double().norm() < limit


def test_what_the_file_has_quantised_stays_as_it_is() -> None:
    packing = ops.Packing(is_exact=False, quantise="Q4_0")
    model = Decoder(CONFIG, RandomWeights("Q6_K"), packing, max_positions=16)
    assert model.layers[0].down.made.matrix.format == "Q6_K"
