"""The CUDA runner on emulated kernels: everything in a step except products, which torch computes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import (
    FP16,
    PROMPT,
    SHAPE,
    assert_matches_reference,
    logprobs_of,
    make_device,
    make_runner,
    require_emulation,
    save_with_tokenizer,
    spec_of_steps,
)
from tests.support.checkpoints import load_model, make_model, save, save_gguf
from tests.support.kv import plain_limits, plain_size
from tests.support.letters import letters_grammar
from tests.support.quantised import save_quantised
from tests.support.runner_driver import GREEDY, Job, generate, sample_over_a_shared_block
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Model
from tgi_asgi.ops import cuda_sample_state
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_buffers import StepShape
from tgi_asgi.runner.inputs import PlanError
from tgi_asgi.runner.kv import KvSize
from tgi_asgi.runner.load import load
from tgi_asgi.runner.plan import DeviceLost, SlotStart, StepPlan, StepResult, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.types import SamplingParams


@pytest.fixture(scope="module")
def reference() -> transformers.PreTrainedModel:
    return make_model(**SHAPE)


@pytest.fixture(scope="module")
def model(reference: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Model:
    files = save(reference, tmp_path_factory.mktemp("model"), FP16)
    return load_model(files, Repacking(FP16), max_positions=256)


@pytest.fixture
def device() -> EmulatedDevice:
    return make_device()


@pytest.fixture
def runner(model: Model, device: EmulatedDevice) -> Iterator[CudaRunner]:
    def choose(free_bytes: int) -> KvSize:
        assert free_bytes == 1 << 30
        return plain_size(40, "float16")

    runner = CudaRunner(
        model,
        device,
        choose,
        spec_of_steps(plain_limits(max_sequences=5, max_tokens=64, max_context=256)),
    )
    yield runner
    runner.close()


async def test_sequences_in_one_batch_follow_the_reference(
    runner: CudaRunner, reference: transformers.PreTrainedModel, device: EmulatedDevice
) -> None:
    wanted = SamplingParams(temperature=0.0, logprobs=2)
    jobs = [Job(PROMPT[:n], m, wanted) for n, m in ((18, 6), (1, 9), (17, 3))]
    await generate(runner, jobs, chunk=20)
    for job in jobs:
        ids = [*job.prompt_ids, *job.token_ids]
        expected = logprobs_of(reference, ids)
        for index, sampled in enumerate(job.sampled):
            row = expected[len(job.prompt_ids) - 1 + index]
            assert sampled.is_finite
            assert float(row[sampled.token_id]) > float(row.max()) - 0.02, "not the best token"
            assert sampled.logprob == pytest.approx(float(row[sampled.token_id]), abs=0.02)
            assert sampled.top is not None and len(sampled.top) == 2
    assert [len(job.sampled) for job in jobs] == [6, 9, 3]
    assert device.captured == 2 * (4 + 1), "the buckets up to 5 are 1, 2, 4 and 5; a prompt's is of 64 tokens"
    assert device.replayed > 8


async def test_a_seeded_sequence_samples_the_same_alone_in_a_batch_and_in_chunks(runner: CudaRunner) -> None:
    seeded = SamplingParams(temperature=1.5, seed=5, top_p=0.95)
    alone, batched, others = Job(PROMPT, 8, seeded), Job(PROMPT, 8, seeded), [Job([7, 8, 9], 12), Job([4], 3)]
    await generate(runner, [alone])
    await generate(runner, [batched, *others], chunk=7)
    assert len(set(alone.token_ids)) > 3
    assert batched.token_ids == alone.token_ids


async def test_prompt_log_probabilities_follow_the_reference(
    runner: CudaRunner, reference: transformers.PreTrainedModel
) -> None:
    job = Job(PROMPT, 1, GREEDY, wants_prompt_logprobs=1)
    await generate(runner, [job], chunk=7)
    expected = logprobs_of(reference, PROMPT)
    assert job.prompt_logprobs[0] == (None, [])
    for index, (logprob, top) in enumerate(job.prompt_logprobs[1:]):
        assert logprob == pytest.approx(float(expected[index, PROMPT[index + 1]]), abs=0.02)
        assert len(top) == 1
    assert job.token_ids[0] == int(expected[-1].argmax())
    assert runner._scorer._token_logprobs is cuda_sample_state.token_logprobs, "where the logits are"


async def test_chunks_of_a_prompt_are_as_long_as_a_gpu_takes_for_a_token(runner: CudaRunner) -> None:
    assert runner.traits.min_chunk == 512


async def test_of_block_tables_only_what_is_new_goes_up(
    model: Model, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's tables hold data of earlier, longer sequences, which changes nothing."""
    runner = make_runner(model, device, max_context=640)
    sizes: list[tuple[int, int]] = []
    copy = runner._steps.copy

    def note(shape: StepShape, staged: torch.Tensor) -> Any:
        sizes.append((shape.num_entries, shape.num_bytes))
        return copy(shape, staged)

    monkeypatch.setattr(runner._steps, "copy", note)
    try:
        short = [Job(PROMPT, 3, SamplingParams(temperature=0.0, logprobs=0)) for _ in range(2)]
        await generate(runner, [short[0]])
        most = max(num_bytes for _, num_bytes in sizes)
        sizes.clear()
        await generate(runner, [Job(PROMPT * 20, 5)], chunk=60)
        of_chunks, of_decodes = sizes[:6], sizes[6:]
        # 60 tokens are in four or five blocks. The event loop, which writes steps that need no Python, knows
        # nothing of what the launcher sends for the first chunk, and sends it again.
        assert sorted(entries for entries, _ in of_chunks) == [4, 4, 4, 5, 5, 8]
        assert of_decodes == [(1, of_decodes[0][1])] * 4 and of_decodes[0][1] < 256
        sizes.clear()
        await generate(runner, [short[1]])
        assert max(num_bytes for _, num_bytes in sizes) == most < 1536, (
            "64 tokens, of 20 bytes each, among them"
        )
        assert short[0].sampled == short[1].sampled
        assert runner._steps._tables.shape == (2, 40) and bool(runner._steps._tables[:, 2:].any())
    finally:
        runner.close()


async def test_blocks_are_copied_before_rows_run(runner: CudaRunner) -> None:
    first = StepRow(0, PROMPT[:16], 0, [[3]], samples=False)
    await runner.submit(StepPlan(0, [first], [SlotStart(0, GREEDY, 0, PROMPT)]))
    answers = []
    for step, block in ((1, 3), (2, 9)):
        rest = StepRow(0, PROMPT[16:], 16, [[block, 20 + block]], samples=True)
        starts = [SlotStart(0, GREEDY, 0, PROMPT)]
        result = await runner.submit(StepPlan(step, [rest], starts, [(3, 9)] if block == 9 else []))
        answers.append(result.sampled[0])
    assert answers[0] == answers[1]


async def test_a_row_may_read_what_another_of_its_step_writes(runner: CudaRunner) -> None:
    """Prompts that share a block, planned together: one computes it, the other has it in its table."""
    steps = await sample_over_a_shared_block(runner, PROMPT, GREEDY)
    job = Job(PROMPT, 4, GREEDY)
    await generate(runner, [job])
    assert [first for first, _ in steps] == [second for _, second in steps] == job.sampled


async def test_a_plan_out_of_bounds_fails_alone(runner: CudaRunner) -> None:
    bad = StepRow(0, [160], 0, [[0]], samples=True)
    with pytest.raises(PlanError):
        await runner.submit(StepPlan(0, [bad], [SlotStart(0, GREEDY, 0, [1])]))
    job = Job(PROMPT, 2)
    await generate(runner, [job])
    assert len(job.sampled) == 2


async def test_a_row_that_may_have_drafts_is_refused_by_a_runner_that_makes_none(runner: CudaRunner) -> None:
    assert runner.traits.drafts is None
    floating = StepRow(0, None, 2, [[0]], samples=True, stop=5, num_drafts=2)
    with pytest.raises(PlanError, match="drafts"):
        await runner.submit(StepPlan(0, [floating], [SlotStart(0, GREEDY, 0, [5, 6, 7])]))


async def test_a_step_that_never_came_to_the_device_takes_no_memory_of_those_in_flight(
    runner: CudaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    copy = runner._steps.copy

    def note(shape: StepShape, staged: torch.Tensor) -> Any:
        taken.append(staged.data_ptr())
        return copy(shape, staged)

    monkeypatch.setattr(runner._steps, "copy", note)
    chunk = StepRow(0, [5, 6], 0, [[0]], samples=False)
    misplaced = StepRow(1, None, 2, [[1]], samples=True)  # a decode after a prompt
    starts = [SlotStart(0, GREEDY, 0, [5, 6, 7]), SlotStart(1, GREEDY, 0, [5])]
    await runner.submit(StepPlan(0, [chunk], starts))
    with pytest.raises(PlanError):
        await runner.submit(StepPlan(1, [chunk, misplaced]))
    await runner.submit(StepPlan(2, [chunk]))
    first, behind = taken
    assert first != behind


async def test_only_steps_of_a_grammar_wait_for_the_tokens_before_them(
    runner: CudaRunner, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar of a sequence that has ended, whose slot nobody uses again, holds up no other sequence."""
    waited: list[bool] = []
    start_grammars = runner._start_grammars

    def note(plan: StepPlan, waits: bool) -> None:
        waited.append(waits)
        start_grammars(plan, waits)

    monkeypatch.setattr(runner, "_start_grammars", note)
    grammar = letters_grammar(sources.regex("[a-z]{9}"), 160)
    starts = [SlotStart(0, GREEDY, 0, [5]), SlotStart(1, GREEDY, 0, [6], grammar=grammar)]
    prompts = [StepRow(0, [5], 0, [[0]], samples=True), StepRow(1, [6], 0, [[1]], samples=True)]
    plain, constrained = (StepRow(slot, None, 1, [[slot]], samples=True) for slot in (0, 1))
    plans = [
        StepPlan(0, prompts, starts),
        StepPlan(1, [constrained]),
        StepPlan(2, [plain]),
        StepPlan(3, [StepRow(2, [7, 8], 0, [[2]], samples=False)], [SlotStart(2, GREEDY, 0, [7, 8, 9])]),
        StepPlan(4, [StepRow(1, [7], 0, [[1]], samples=True)], [SlotStart(1, GREEDY, 0, [7])]),
        StepPlan(5, [StepRow(1, None, 1, [[1]], samples=True)]),
    ]
    for plan in plans:
        await runner.submit(plan)
    assert waited == [True, True, False, True], "the third and the last need no Python at all"


async def test_a_lost_device_fails_this_step_and_all_after_it(
    runner: CudaRunner, device: EmulatedDevice
) -> None:
    require_emulation("a real one is not lost because an exception says so")
    device.failure = RuntimeError("CUDA error: an illegal memory access was encountered")

    def submit(step: int) -> asyncio.Future[StepResult]:
        row = StepRow(0, [5], 0, [[0]], samples=True)
        return runner.submit(StepPlan(step, [row], [SlotStart(0, GREEDY, 0, [5])]))

    with pytest.raises(DeviceLost):
        await submit(0)
    device.failure = None
    with pytest.raises(DeviceLost):
        await submit(1)


async def test_a_third_step_in_flight_is_refused_and_so_is_one_after_the_end(runner: CudaRunner) -> None:
    plans = [StepPlan(step, []) for step in range(3)]
    futures = [runner.submit(plan) for plan in plans[:2]]
    with pytest.raises(RuntimeError, match="2 steps are in flight"):
        runner.submit(plans[2])
    assert [result.step_id for result in await asyncio.gather(*futures)] == [0, 1]
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(plans[2])


def test_what_preparing_raises_is_raised_to_who_makes_the_runner(
    model: Model, device: EmulatedDevice
) -> None:
    def choose(free_bytes: int) -> KvSize:
        raise MemoryError("no room for a block")

    with pytest.raises(MemoryError, match="no room"):
        CudaRunner(
            model,
            device,
            choose,
            spec_of_steps(plain_limits(max_sequences=2, max_tokens=8, max_context=64)),
        )


async def test_a_model_is_loaded_onto_the_device_that_is_there(
    tmp_path: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    files = save_with_tokenizer(make_model(**shape), tmp_path)
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    settings = Settings(
        thread_nice=0, num_threads=1, max_batch_size=2, max_batch_prefill_tokens=64, max_total_tokens=128
    )
    loaded = load(settings, files)
    try:
        assert (loaded.info.device, loaded.info.dtype) == ("cuda", "bfloat16")
        assert loaded.info.kv_tokens == 2 * 128
        job = Job(PROMPT, 3)
        await generate(loaded.runner, [job])
        assert all(sampled.is_finite for sampled in job.sampled)
    finally:
        loaded.runner.close()


@pytest.mark.parametrize(
    ("recipe", "options", "num_bytes"),
    [
        ("awq", {}, 256 * 128 * (4 + 64 / 32) / 8),  # codes, and a float32 scale and offset per group of 32
        ("gptq", {"group": 128, "is_centred": True}, 256 * 128 * (4 + 64 / 128) / 8),
        ("gptq", {"has_order": True, "is_centred": True}, 256 * 128 * (4 + 64 / 32) / 8 + 128 * 8),
        ("fp8", {"kind": "block"}, 256 * 128 * (8 + 32 / 32) / 8),
        ("fp8", {"kind": "tensor"}, 256 * 128 * (8 + 32 / 128) / 8),
    ],
)
async def test_codes_of_a_checkpoint_are_multiplied_as_they_are(
    tmp_path: Path, device: EmulatedDevice, recipe: str, options: dict[str, Any], num_bytes: float
) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    reference = make_model(**shape, num_hidden_layers=2)
    model = load_model(
        save_quantised(reference, tmp_path, recipe, **options), Repacking(FP16), max_positions=256
    )
    assert isinstance(model, Decoder)
    assert [layer.qkv.made.matrix.nbytes for layer in model.layers] == [num_bytes] * 2
    runner = make_runner(model, device)
    try:
        job = Job(PROMPT * 3, 3, SamplingParams(temperature=0.0, logprobs=0))
        await generate(runner, [job], chunk=50)  # some steps use the codes, others the decoded matrix
    finally:
        runner.close()
    assert_matches_reference(job, reference)


async def test_a_sequence_may_grow_beyond_a_sliding_window(tmp_path: Path, device: EmulatedDevice) -> None:
    reference = make_model(
        "Mistral", num_attention_heads=2, num_key_value_heads=1, head_dim=64, sliding_window=9
    )
    model = load_model(save(reference, tmp_path, FP16), Repacking(FP16), max_positions=256)
    assert {layer.window for layer in model.config.layers} == {9}
    runner = make_runner(model, device)
    try:
        jobs = [Job(PROMPT[:length], 30, SamplingParams(temperature=0.0, logprobs=0)) for length in (18, 3)]
        await generate(runner, jobs, chunk=11)
    finally:
        runner.close()
    for job in jobs:
        assert_matches_reference(job, reference)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_sliding_window_bounds_no_sequence(
    tmp_path: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    reference = make_model("Mistral", sliding_window=40, max_position_embeddings=128, **shape)
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device if is_there else None)
    settings = Settings(thread_nice=0, num_threads=1, max_batch_size=2, max_batch_prefill_tokens=64)
    loaded = load(settings, save_with_tokenizer(reference, tmp_path))
    loaded.runner.close()
    assert loaded.info.max_total_tokens == 128


async def test_queries_and_keys_of_qwen3_are_normalised(tmp_path: Path, device: EmulatedDevice) -> None:
    reference = make_model("Qwen3", num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    model = load_model(save(reference, tmp_path, FP16), Repacking(FP16), max_positions=256)
    runner = make_runner(model, device)
    try:
        job = Job(PROMPT, 4, SamplingParams(temperature=0.0, logprobs=0))
        await generate(runner, [job], chunk=11)
    finally:
        runner.close()
    assert_matches_reference(job, reference)


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"head_dim": 32}, "auto", "do not support head size 32"),
        ({}, "float32", "--dtype float32 is not supported on a GPU"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused_with_a_way_out(
    tmp_path: Path,
    device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, int],
    dtype: str,
    message: str,
) -> None:
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    files = save_with_tokenizer(make_model(**shape | changes), tmp_path)
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
    with pytest.raises(ModelLoadError, match=f"{message}.*CUDA_VISIBLE_DEVICES="):
        settings = Settings(thread_nice=0, num_threads=1, dtype=dtype, model_impl="native")
        load(settings, files)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
async def test_quantised_weights_are_multiplied_as_the_file_has_them(
    tmp_path: Path, device: EmulatedDevice, kind: str
) -> None:
    """The reference's own weights are those that the file's blocks decode to."""
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    reference = make_model(**shape, tie_word_embeddings=True)
    model = load_model(save_gguf(reference, tmp_path / "tiny.gguf", kind), Repacking(FP16), max_positions=256)
    assert isinstance(model, Decoder)
    assert model.layers[0].qkv.made.matrix.nbytes < 2 * 256 * 128 * 9 / 8
    runner = make_runner(model, device)
    try:
        jobs = [Job(PROMPT * 3, 3, SamplingParams(temperature=0.0, logprobs=0)), Job(PROMPT[:5], 4)]
        await generate(runner, jobs, chunk=50)  # some steps use the codes, others the decoded matrix
    finally:
        runner.close()
    assert_matches_reference(jobs[0], reference)
