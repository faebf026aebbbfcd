"""LoRA adapters on the CUDA runner with emulated kernels, against `peft` in float32."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import FP16, PROMPT, SHAPE, make_device, make_runner, save_with_tokenizer
from tests.support.adapters import ALL_PRODUCTS, make_adapter, peft_logprobs, write_adapter
from tests.support.checkpoints import load_model, make_model, save, save_gguf
from tests.support.driving import GREEDY, Job, generate
from tests.support.quantised import save_quantised
from tgi_asgi import ops
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.ops.cuda_adapters import CudaAdapterLayout
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix
from tgi_asgi.runner import cuda_load
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_steps import StepLimits, graph_shapes
from tgi_asgi.runner.inputs import PlanError
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

SETTINGS = Settings(
    thread_nice=0, num_threads=1, max_batch_size=4, max_batch_prefill_tokens=64, max_total_tokens=128,
    dtype="float16", enable_lora=True, max_lora_rank=12, max_loras=2,
)  # fmt: skip
LIMITS = StepLimits(block_size=16, max_batch_size=4, max_step_tokens=68, max_context=128)
SCORED = SamplingParams(temperature=0.0, logprobs=1)
TOLERANCE = 0.03  # of a log-probability, in float16


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    device = make_device()
    monkeypatch.setattr(cuda_load, "find_device", lambda: device)
    return device


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    save_with_tokenizer(make_model(**SHAPE), path)
    return path


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(base, root / "all", seed=1, r=4),
        make_adapter(base, root / "rank 12", seed=2, r=12, lora_alpha=5, use_rslora=True),
        make_adapter(base, root / "few", seed=3, r=3, target_modules=["k_proj", "up_proj", "o_proj"]),
    ]


def files_of(base: Path) -> ModelFiles:
    return ModelFiles("tiny", None, "directory", base)


@contextmanager
def serving(files: ModelFiles, **changes: Any) -> Iterator[LoadedModel]:
    loaded = load(replace(SETTINGS, **changes), files, lambda stage, done, total: None)
    try:
        yield loaded
    finally:
        loaded.runner.close()


def weights_of(loaded: LoadedModel, folder: Path) -> Any:
    assert loaded.adapters is not None
    return loaded.adapters.load(folder).weights


def assert_follows(job: Job, base: Path, folder: Path | None, tolerance: float = TOLERANCE) -> None:
    """Check each greedy token and its log-probability against peft's."""
    assert len(job.sampled) == job.num_tokens > 0
    rows = peft_logprobs(base, folder, [*job.prompt_ids, *job.token_ids])[len(job.prompt_ids) - 1 : -1]
    for row, sampled in zip(rows, job.sampled, strict=True):
        assert float(row[sampled.token_id]) > float(row.max()) - tolerance, "not the best token"
        assert sampled.logprob == pytest.approx(float(row[sampled.token_id]), abs=tolerance)


async def test_rows_of_several_adapters_and_of_none_follow_peft(
    base: Path, folders: list[Path], device: EmulatedDevice
) -> None:
    with serving(files_of(base)) as loaded:
        one, two = (weights_of(loaded, folder) for folder in folders[:2])
        jobs = [
            Job(PROMPT, 6, SCORED, adapter=one),
            Job(PROMPT[2:], 5, SCORED, adapter=two),
            Job(PROMPT, 7, SCORED),
        ]
        await generate(loaded.runner, jobs, chunk=20)
        for job, folder in zip(jobs, [*folders[:2], None], strict=True):
            assert_follows(job, base, folder)
        assert len({tuple(job.token_ids[:5]) for job in jobs}) == 3, "the adapters change the text"
    # Of each shape two graphs up to the logits, with and without adapters, and one that samples.
    assert device.captured == 3 * len(graph_shapes(LIMITS, has_mixed=True))
    assert device.replayed > 8


@pytest.mark.parametrize("kind", ["gguf", "awq"])
async def test_bases_of_codes_take_adapters(
    kind: str, folders: list[Path], tmp_path: Path, device: EmulatedDevice
) -> None:
    """GGUF also has the rows of queries and keys in another order."""
    base = make_model(**SHAPE)
    if kind == "gguf":
        files = save_gguf(base, tmp_path / "served.gguf", "Q8_0")
    else:
        files = save_quantised(base, tmp_path / "served", "awq")
    save(base, tmp_path / "base")  # what the codes mean
    model = load_model(files, ops.Repacking(FP16), max_positions=256)
    assert isinstance(model, Decoder)
    assert isinstance(model.layers[0].qkv.made.matrix, CudaQuantMatrix)
    loader = AdapterLoader(cuda_load.make_adapter_layout(model, SETTINGS, device, FP16))
    runner = make_runner(model, device, adapters=loader.layout)
    try:
        jobs = [Job(PROMPT, 5, SCORED, adapter=loader.load(folder).weights) for folder in folders[:2]]
        await generate(runner, jobs, chunk=20)
    finally:
        runner.close()
    for job, folder in zip(jobs, folders, strict=False):
        # At one of these positions transformers in float16 is off by up to 0.3, at the others by 0.03.
        assert_follows(job, tmp_path / "base", folder, tolerance=0.1)


@pytest.mark.parametrize("kind", ["Cohere", "Nemotron"])
async def test_families_with_other_products_take_adapters(
    kind: str, tmp_path: Path, device: EmulatedDevice
) -> None:
    """Cohere rotates neighbours, whose rows are moved apart; Nemotron's MLP has no gate."""
    base = make_model(kind, **SHAPE, **({"logit_scale": 0.5} if kind == "Cohere" else {"head_dim": 64}))
    files = save(base, tmp_path / "base")
    products = [name for name in ALL_PRODUCTS if kind == "Cohere" or name != "gate_proj"]
    folder = make_adapter(tmp_path / "base", tmp_path / "adapter", seed=1, target_modules=products)
    model = load_model(files, ops.Repacking(FP16), max_positions=256)
    loader = AdapterLoader(cuda_load.make_adapter_layout(model, SETTINGS, device, FP16))
    runner = make_runner(model, device, adapters=loader.layout)
    try:
        jobs = [Job(PROMPT, 5, SCORED, adapter=loader.load(folder).weights), Job(PROMPT, 5, SCORED)]
        await generate(runner, jobs, chunk=20)
    finally:
        runner.close()
    for job, at in zip(jobs, (folder, None), strict=True):
        assert_follows(job, tmp_path / "base", at)


async def test_prompts_are_scored_with_their_adapter(
    base: Path, folders: list[Path], device: EmulatedDevice
) -> None:
    with serving(files_of(base)) as loaded:
        job = Job(PROMPT, 1, GREEDY, wants_prompt_logprobs=1, adapter=weights_of(loaded, folders[0]))
        await generate(loaded.runner, [job, Job(PROMPT, 1)], chunk=7)
    expected = peft_logprobs(base, folders[0], PROMPT)
    for index, (logprob, _) in enumerate(job.prompt_logprobs[1:]):
        assert logprob == pytest.approx(float(expected[index, PROMPT[index + 1]]), abs=TOLERANCE)


async def test_rows_without_an_adapter_keep_their_bits(
    base: Path, folders: list[Path], device: EmulatedDevice
) -> None:
    with serving(files_of(base), batch_invariant=True) as loaded:
        alone, beside = Job(PROMPT, 8, SCORED), Job(PROMPT, 8, SCORED)
        await generate(loaded.runner, [alone])
        others = [Job(PROMPT[at:], 6, SCORED, adapter=weights_of(loaded, folders[at])) for at in range(2)]
        adapted = Job(PROMPT, 6, SCORED, adapter=others[0].adapter)
        await generate(loaded.runner, [adapted])
        await generate(loaded.runner, [others[0], beside, others[1]], chunk=20)
    assert [sampled.logprob for sampled in beside.sampled] == [sampled.logprob for sampled in alone.sampled]
    assert [each.logprob for each in others[0].sampled] == [each.logprob for each in adapted.sampled]


async def test_adapters_take_turns_in_few_slots(
    base: Path, folders: list[Path], device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three adapters, one slot: each is copied when its turn comes, and not while it is there."""
    ranks: list[int] = []
    fill = torch.Tensor.fill_

    def counting(tensor: torch.Tensor, value: Any) -> torch.Tensor:
        if tensor.dim() == 0 and tensor.dtype is torch.int32:
            ranks.append(value)
        return fill(tensor, value)

    with serving(files_of(base), max_loras=1) as loaded:
        weights = [weights_of(loaded, folder) for folder in folders]
        monkeypatch.setattr(torch.Tensor, "fill_", counting)
        for at in (0, 1, 2, 1):
            job = Job(PROMPT, 4, SCORED, adapter=weights[at])
            await generate(loaded.runner, [job])
            assert_follows(job, base, folders[at])
    assert ranks == [8, 16, 8, 16], "one copy a turn, with the rank in whole vectors"


async def test_an_unloaded_adapter_leaves_the_memory(
    base: Path, folders: list[Path], device: EmulatedDevice
) -> None:
    with serving(files_of(base)) as loaded:
        job = Job(PROMPT, 2, SCORED, adapter=weights_of(loaded, folders[0]))
        await generate(loaded.runner, [job])
        watched = weakref.ref(job.adapter)
        del job
        await generate(loaded.runner, [Job(PROMPT, 1)])  # the threads no longer hold the last step
        gc.collect()
        assert watched() is None
        job = Job(PROMPT, 3, SCORED, adapter=weights_of(loaded, folders[1]))
        await generate(loaded.runner, [job])
        assert_follows(job, base, folders[1])


async def test_more_adapters_than_slots_fail_their_step_alone(
    base: Path, folders: list[Path], device: EmulatedDevice
) -> None:
    with serving(files_of(base)) as loaded:
        weights = [weights_of(loaded, folder) for folder in folders]
        rows = [
            StepRow(slot, PROMPT, 0, [[2 * slot, 2 * slot + 1]], True, adapter=adapter)
            for slot, adapter in enumerate(weights)
        ]
        starts = [SlotStart(slot, GREEDY, 0, PROMPT) for slot in range(len(rows))]
        with pytest.raises(ValueError, match="3 adapters, the device 2 slots"):
            await loaded.runner.submit(StepPlan(0, rows, starts))
        result = await loaded.runner.submit(StepPlan(1, rows[:2], starts[:2]))
        assert all(sampled is not None and sampled.is_finite for sampled in result.sampled)


async def test_a_row_with_an_adapter_needs_slots(base: Path, device: EmulatedDevice) -> None:
    with serving(files_of(base), enable_lora=False) as loaded:
        assert isinstance(loaded.runner, CudaRunner)
        assert loaded.adapters is None
        row = StepRow(0, PROMPT, 0, [[0, 1]], True, adapter=object())
        with pytest.raises(PlanError, match="adapter"):
            await loaded.runner.submit(StepPlan(0, [row], [SlotStart(0, GREEDY, 0, PROMPT)]))


def test_what_an_adapter_cannot_change_is_refused(base: Path, tmp_path: Path, device: EmulatedDevice) -> None:
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    with serving(files_of(base)) as loaded:
        large = write_adapter(tmp_path / "rank", {q_proj: (128, 128)}, rank=13)
        with pytest.raises(ModelLoadError, match="rank 13; --max-lora-rank allows 12"):
            weights_of(loaded, large)
        strong = write_adapter(tmp_path / "strong", {q_proj: (128, 128)}, lora_alpha=4e7)
        with pytest.raises(ModelLoadError, match=r"too large for torch\.float16"):
            weights_of(loaded, strong)


def test_the_slot_used_longest_ago_is_taken(base: Path, folders: list[Path], device: EmulatedDevice) -> None:
    with serving(files_of(base)) as loaded:
        assert loaded.adapters is not None
        layout = loaded.adapters.layout
        assert isinstance(layout, CudaAdapterLayout)
        one, two, three = (weights_of(loaded, folder) for folder in folders)
        assert layout.place([one]) != layout.place([two])
        (slot,) = layout.place([one])
        (taken,) = layout.place([three])
        assert taken != slot, "the slot of `two`, which was not used since"
        assert layout.place([three, one]) == [taken, slot]
        assert torch.equal(layout.pool[taken], three.values)
        assert layout.ranks.tolist()[taken] == 8
