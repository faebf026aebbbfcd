"""The shards of a model on several devices, with emulated kernels, and gloo instead of NCCL."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from torch import Tensor

from bench import gpu_shards
from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import FP16, PROMPT, SHAPE, assert_matches_reference
from tests.cuda.emulated_shards import MissingDevice, ShardDevice, SilentDevice
from tests.cuda.test_drafts import LIMIT_S, VOCAB, repetitive
from tests.emulation import library
from tests.support.adapters import make_adapter, peft_logprobs
from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.families import CASES
from tests.support.family_files import checkpoint
from tests.support.quantised import save_quantised
from tests.support.random_requests import answers_of
from tests.support.runner_driver import Job, compare, generate, sample_over_a_shared_block
from tests.support.small_engine import serving_with
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.ops.cuda_shards import DeviceGroup
from tgi_asgi.runner.cuda_shards import CudaShards
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import DeviceLost, SlotStart, StepPlan, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.types import Pooling, PoolingKind, SamplingParams

pytestmark = pytest.mark.thorough

SCORED = SamplingParams(temperature=0.0, logprobs=2)
# Of a log-probability, in float16, between two devices and one: 0.008 is measured, because the parts of a
# product are rounded before they are added. From `transformers` two are 0.020 away, one is 0.013. torch's
# products in float16 differ between CPUs.
TOLERANCE, FROM_REFERENCE = 0.02, 0.04
Serve = Callable[..., Any]


def assert_follows(job: Job, base: Path, folder: Path | None) -> None:
    """Check each greedy token and its log-probability against peft's."""
    assert len(job.sampled) == job.num_tokens > 0
    rows = peft_logprobs(base, folder, [*job.prompt_ids, *job.token_ids])[len(job.prompt_ids) - 1 : -1]
    for row, sampled in zip(rows, job.sampled, strict=True):
        assert float(row[sampled.token_id]) > float(row.max()) - FROM_REFERENCE, "not the best token"
        assert sampled.logprob == pytest.approx(float(row[sampled.token_id]), abs=FROM_REFERENCE)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Return a function that loads a model onto a number of devices, and ends them."""
    library.require()

    @asynccontextmanager
    async def serve(
        files: ModelFiles, num_shard: int, device: type[EmulatedDevice] = ShardDevice, **changes: Any
    ) -> AsyncIterator[LoadedModel]:
        monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device(0))
        settings = Settings(
            num_shard=num_shard, dtype="float16", num_threads=1, thread_nice=0, max_batch_size=3,
            max_batch_prefill_tokens=32, max_total_tokens=128, **changes,
        )  # fmt: skip
        loaded = load(settings, files)
        try:
            yield loaded
        finally:
            loaded.runner.close()

    return serve


@pytest.fixture(scope="module")
def reference() -> transformers.PreTrainedModel:
    """A model with 2 heads, 1 KV head, 96 MLP columns (shards get 64 and 32) and 160 ids (96 and 64)."""
    return make_model(**SHAPE)


@pytest.fixture(scope="module")
def tiny(reference: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("model")
    files = save(reference, directory, FP16)
    save_tokenizer(directory)
    return files


async def written(loaded: LoadedModel) -> list[Job]:
    """Continue three prompts, one of them in chunks, and score the second."""
    jobs = [
        Job(PROMPT * 2, 5, SCORED),
        Job(PROMPT[:7], 7, SCORED, wants_prompt_logprobs=2),
        Job([9], 4, SCORED),
    ]
    await generate(loaded.runner, jobs, chunk=30)
    return jobs


async def test_two_devices_write_what_one_does(
    serving: Serve, tiny: ModelFiles, reference: transformers.PreTrainedModel
) -> None:
    async with serving(tiny, 1) as loaded:
        expected = await written(loaded)
    async with serving(tiny, 2) as loaded:
        found = await written(loaded)
        assert loaded.info.num_shards == 2
        steps = await sample_over_a_shared_block(loaded.runner, PROMPT, SCORED)
        assert all(first == second for first, second in steps)
        # The prompt's last token again, from copies of its blocks, which all devices make.
        row = StepRow(2, PROMPT[-1:], len(PROMPT) - 1, [[4, 6]], samples=True)
        starts = [SlotStart(2, SCORED, 0, PROMPT)]
        again = await loaded.runner.submit(StepPlan(10, [row], starts, copies=[(5, 4), (9, 6)]))
        first, last = steps[0][0], again.sampled[0]
        assert first is not None and last is not None and first.token_id == last.token_id
        assert last.logprob == pytest.approx(first.logprob, abs=TOLERANCE)
        processes = list(loaded.shards.others.processes)
    compare(found, expected, TOLERANCE)
    for job in found:
        assert_matches_reference(job, reference, tolerance=FROM_REFERENCE)
    assert [process.returncode for process in processes] == [0]  # ended by itself


async def test_adapters_take_turns_in_the_slots_of_two_devices(
    serving: Serve, tiny: ModelFiles, tmp_path: Path
) -> None:
    """Two adapters and the base in one step; then a third adapter, which replaces one, and that one again."""
    few = ["k_proj", "up_proj", "o_proj"]
    folders = [
        make_adapter(tiny.path, tmp_path / "all", seed=1, r=4),
        make_adapter(tiny.path, tmp_path / "rank 12", seed=2, r=12, lora_alpha=5, use_rslora=True),
        make_adapter(tiny.path, tmp_path / "few", seed=3, r=3, target_modules=few),
    ]
    settings: dict[str, Any] = {"enable_lora": True, "admin_api_key": "admin", "max_loras": 2}
    async with serving(tiny, 2, max_lora_rank=12, **settings) as loaded:
        assert loaded.adapters is not None
        weights = [loaded.adapters.load(folder).weights for folder in folders]
        for step in ((0, 1, None), (2,), (0, 2), (1,)):
            jobs = [
                Job(PROMPT[at or 3 :], 5, SCORED, adapter=None if at is None else weights[at]) for at in step
            ]
            await generate(loaded.runner, jobs, chunk=30)
            for at, job in zip(step, jobs, strict=True):
                assert_follows(job, tiny.path, None if at is None else folders[at])
        with pytest.raises(ModelLoadError, match="rank 13"):
            loaded.adapters.load(make_adapter(tiny.path, tmp_path / "rank 13", seed=4, r=13))
        del weights[1], jobs, job  # dropped on both devices
        gc.collect()
        again = loaded.adapters.load(folders[1])
        job = Job(PROMPT, 5, SCORED, adapter=again.weights)
        await generate(loaded.runner, [job])
        assert_follows(job, tiny.path, folders[1])


@pytest.mark.models
async def test_what_follows_a_partial_sum_sees_what_adapters_add(serving: Serve, tmp_path: Path) -> None:
    """In Gemma 2, a norm comes between each partial sum and the residual."""
    shape = SHAPE | {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": False}
    files = save(make_model("Gemma2", **shape), tmp_path / "base", FP16)
    save_tokenizer(files.path)
    folder = make_adapter(files.path, tmp_path / "adapter", seed=1, target_modules=["o_proj", "down_proj"])
    async with serving(files, 2, enable_lora=True) as loaded:
        assert loaded.adapters is not None
        job = Job(PROMPT, 5, SCORED, adapter=loaded.adapters.load(folder).weights)
        await generate(loaded.runner, [job])
    assert_follows(job, files.path, folder)


async def test_two_devices_pool_what_one_does(serving: Serve, tiny: ModelFiles) -> None:
    """Every shard has the states of all tokens, and shard 0 the logits of the whole vocabulary."""
    kinds = [Pooling(kind) for kind in (PoolingKind.LAST, PoolingKind.MEAN)]
    kinds.append(Pooling(PoolingKind.LOGITS, (7, 159)))  # of the first shard and of the second
    runs = []
    for count in (1, 2):
        async with serving(tiny, count, pooling="last") as loaded:
            assert loaded.info.generates and loaded.info.embedding is not None
            starts = [SlotStart(slot, SCORED, 0, PROMPT[:9]) for slot in range(3)]
            rows = [
                StepRow(slot, PROMPT[:9], 0, [[slot]], samples=True, pooling=kind)
                for slot, kind in enumerate(kinds)
            ]
            runs.append((await loaded.runner.submit(StepPlan(0, rows, starts))).pooled)
    for at in range(3):
        np.testing.assert_allclose(runs[1][at], runs[0][at], atol=0.02)


@pytest.mark.models
async def test_codes_are_cut_and_keys_and_values_of_eight_bits_kept(serving: Serve, tmp_path: Path) -> None:
    """With 3 KV heads, shards get two and one; with 5 groups of MLP columns, three and two."""
    shape = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 1}
    model = make_model(**shape, head_dim=64, intermediate_size=160)
    files = save_quantised(model, tmp_path, "awq")
    save_tokenizer(tmp_path)
    runs = []
    for count in (1, 2):
        async with serving(files, count, kv_cache_dtype="fp8_e4m3fn") as loaded:
            runs.append(await written(loaded))
    compare(runs[1], runs[0], TOLERANCE)


@pytest.mark.models
async def test_a_token_s_bits_do_not_depend_on_the_batch(serving: Serve, tiny: ModelFiles) -> None:
    async with serving(tiny, 2, batch_invariant=True) as loaded:
        alone, *others = [Job(PROMPT, 6, SCORED) for _ in range(3)]
        await generate(loaded.runner, [alone])
        await generate(loaded.runner, [*others, Job([4], 3)], chunk=7)
    assert alone.sampled == others[0].sampled == others[1].sampled


async def test_drafts_change_no_answer(
    serving: Serve, tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices have rows for drafts, too, and take the drafts' tokens from shard 0."""
    monkeypatch.setattr(TokenBudget, "cost_s", property(lambda budget: (1.0, 0.0)))  # drafts are free
    answers, requests = [], repetitive()[:3]
    for speculate in (0, 4):
        async with (
            serving(tiny, 2, speculate=speculate, batch_invariant=True) as loaded,
            serving_with(loaded.runner, VOCAB, Settings(max_batch_prefill_tokens=32)) as engine,
        ):
            answers.append(await answers_of(engine, requests, 3, LIMIT_S))
            stats = engine.stats
    assert answers[1] == answers[0]
    assert 10 < stats.accepted_draft_tokens < stats.draft_tokens


def _flip(group: DeviceGroup, part: Tensor, out: Tensor, gather: Any = DeviceGroup.all_gather) -> None:
    gather(group, part, out)
    out.copy_(out.flip(0))


@pytest.mark.models
@pytest.mark.parametrize("fault", ["a shard that adds nothing", "shards in another order"])
async def test_a_fault_shows(
    serving: Serve, tiny: ModelFiles, reference: transformers.PreTrainedModel, fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    is_silent = fault == "a shard that adds nothing"
    if not is_silent:
        monkeypatch.setattr(DeviceGroup, "all_gather", _flip)
    async with serving(tiny, 2, SilentDevice if is_silent else ShardDevice) as loaded:
        job = Job(PROMPT, 2, SCORED)
        await generate(loaded.runner, [job])
    with pytest.raises(AssertionError):
        assert_matches_reference(job, reference)


async def test_a_shard_that_dies_fails_the_step_and_all_after_it(serving: Serve, tiny: ModelFiles) -> None:
    async with serving(tiny, 2) as loaded:
        assert isinstance(loaded.shards, CudaShards)
        reported: list[str] = []
        loaded.shards.others.watch(reported.append)
        (process,) = loaded.shards.others.processes
        process.kill()
        process.wait()
        for _ in range(2):
            with pytest.raises(DeviceLost):
                await generate(loaded.runner, [Job([1, 2, 3], 20)])
    assert reported == ["shard 1 of the model has ended"]


async def test_what_devices_cannot_share_is_refused_by_name(
    serving: Serve, tiny: ModelFiles, tmp_path: Path
) -> None:
    wide = save(make_model(**SHAPE | {"intermediate_size": 24}), tmp_path, FP16)
    save_tokenizer(tmp_path)
    for files, count, message in (
        (tiny, 3, "--num-shard 3 asks for 3 GPUs, and 2 can be seen"),
        (wide, 2, "a shard would have 12 columns of the MLP"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            async with serving(files, count):
                pass


async def test_what_keeps_a_model_from_being_shared_is_named(serving: Serve) -> None:
    """Latent attention has no GPU kernels, so that the code of transformers would compute it."""
    (case,) = (case for case in CASES if case.name == "deepseek_v3")
    with pytest.raises(ModelLoadError, match=r"--num-shard 2: .* needs latent attention, .* is not split"):
        async with serving(checkpoint(case), 2):
            pass


@pytest.mark.models
async def test_a_device_that_cannot_load_ends_the_start_with_its_reason(
    serving: Serve, tiny: ModelFiles
) -> None:
    with pytest.raises(ModelLoadError, match="shard 1: there is no GPU 1"):
        async with serving(tiny, 2, MissingDevice):
            pass


@pytest.mark.models
def test_the_check_of_two_gpus_sees_that_they_agree_and_that_they_do_not() -> None:
    library.require()
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"num_hidden_layers": 1, "vocab_size": 256}
    rows: list[dict[str, Any]] = []
    for device in (ShardDevice, SilentDevice):
        gpu_shards.check(device, lambda name, row: rows.append(row), **shape)
    assert [(row["op"], row["ok"], row["cases"]) for row in rows] == [
        ("two shards", True, 91), ("two shards", False, 91)
    ]  # fmt: skip
