"""LoRA adapters on the CUDA runner with emulated kernels, against `peft` in float32."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_runner import FP16, PROMPT, SHAPE, make_device, make_runner, save_with_tokenizer
from tests.support.adapters import ALL_PRODUCTS, make_adapter, peft_logprobs, write_adapter
from tests.support.checkpoints import load_model, make_model, save, save_gguf
from tests.support.kv import plain_limits
from tests.support.quantised import save_quantised
from tests.support.runner_driver import GREEDY, Job, generate
from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models import adapters
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.decoder import Decoder
from tgi_asgi.models.family import Model
from tgi_asgi.ops.cuda_adapters import CudaAdapterLayout
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix, Repacking
from tgi_asgi.runner import cuda_adapters
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_steps import graph_shapes
from tgi_asgi.runner.inputs import PlanError
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.runner.plan import SlotStart, StepPlan, StepRow
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

pytestmark = pytest.mark.thorough

SETTINGS = Settings(
    thread_nice=0, num_threads=1, max_batch_size=4, max_batch_prefill_tokens=64, max_total_tokens=128,
    dtype="float16", enable_lora=True, admin_api_key="admin", max_lora_rank=12, max_loras=2,
)  # fmt: skip
LIMITS = plain_limits(max_sequences=4, max_tokens=68, max_context=128)
SCORED = SamplingParams(temperature=0.0, logprobs=1)
TOLERANCE = 0.03  # of a log-probability, in float16


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    device = make_device()
    monkeypatch.setattr("tgi_asgi.runner.load.find_device", lambda: device)
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
    loaded = load(replace(SETTINGS, **changes), files)
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


async def assert_served(
    model: Model, base: Path, folders: list[Path], device: EmulatedDevice, *, tolerance: float = TOLERANCE
) -> None:
    """Run rows with each adapter and without in one batch, and compare them with peft's."""
    loader = AdapterLoader(cuda_adapters.make_adapter_layout(model, SETTINGS, device, FP16))
    for folder in folders:
        runner = make_runner(model, device, adapters=loader.layout)
        try:
            jobs = [Job(PROMPT, 5, SCORED, adapter=loader.load(folder).weights), Job(PROMPT, 5, SCORED)]
            await generate(runner, jobs, chunk=20)
        finally:
            runner.close()
        for job, adapter in zip(jobs, (folder, None), strict=True):
            assert_follows(job, base, adapter, tolerance)


@pytest.mark.parametrize("kind", ["gguf", "awq", "gptq with act-order"])
async def test_bases_of_codes_take_adapters(
    kind: str, folders: list[Path], tmp_path: Path, device: EmulatedDevice
) -> None:
    """GGUF also has the rows of queries and keys in another order, act-order the columns of codes."""
    base = make_model(**SHAPE)
    if kind == "gguf":
        files = save_gguf(base, tmp_path / "served.gguf", "Q8_0")
    elif kind == "awq":
        files = save_quantised(base, tmp_path / "served", "awq")
    else:
        files = save_quantised(base, tmp_path / "served", "gptq", has_order=True, is_centred=True)
    save(base, tmp_path / "base")  # what the codes mean
    model = load_model(files, Repacking(FP16), max_positions=256)
    assert isinstance(model, Decoder)
    assert isinstance(model.layers[0].qkv.made.matrix, CudaQuantMatrix)
    # At one position with AWQ transformers in float16 is off by up to 0.3, at the others by 0.03.
    await assert_served(model, tmp_path / "base", folders[:1], device, tolerance=0.1)


@pytest.mark.parametrize("kind", ["Cohere", "Nemotron", "Granite", "Olmo2", "Phi3"])
async def test_families_with_other_products_take_adapters(
    kind: str, tmp_path: Path, device: EmulatedDevice
) -> None:
    """Cohere rotates neighbours, whose rows are moved apart; Nemotron's MLP has no gate; Granite scales what
    it adds to the residual; OLMo 2 normalises products before that; Phi 3 has fused products.
    """
    changes: dict[str, dict[str, Any]] = {
        "Cohere": {"logit_scale": 0.5}, "Nemotron": {"head_dim": 64}, "Granite": {"residual_multiplier": 0.4},
        "Phi3": {"pad_token_id": 0},
    }  # fmt: skip
    lacking = {"Nemotron": ["gate_proj"], "Phi3": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]}
    products = [name for name in ALL_PRODUCTS if name not in lacking.get(kind, [])]
    products += ["qkv_proj", "gate_up_proj"] * (kind == "Phi3")
    files = save(make_model(kind, **SHAPE, **changes.get(kind, {})), tmp_path / "base")
    folder = make_adapter(tmp_path / "base", tmp_path / "adapter", seed=1, target_modules=products)
    model = load_model(files, Repacking(FP16), max_positions=256)
    await assert_served(model, tmp_path / "base", [folder], device)


async def test_prompts_are_scored_with_their_adapter(
    base: Path, folders: list[Path], device: EmulatedDevice
) -> None:
    with serving(files_of(base)) as loaded:
        job = Job(PROMPT, 1, GREEDY, wants_prompt_logprobs=1, adapter=weights_of(loaded, folders[0]))
        await generate(loaded.runner, [job, Job(PROMPT, 1)], chunk=7)
    expected = peft_logprobs(base, folders[0], PROMPT)
    assert len(job.prompt_logprobs) == len(PROMPT)
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
    copied: list[int] = []
    copy = torch.Tensor.copy_

    def counting(to: torch.Tensor, values: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied.extend([values.numel()] * (to.data_ptr() == pool))
        return copy(to, values, non_blocking)

    with serving(files_of(base), max_loras=1) as loaded:
        assert loaded.adapters is not None
        weights = [weights_of(loaded, folder) for folder in folders]
        pool = loaded.adapters.layout.pool.data_ptr()
        monkeypatch.setattr(torch.Tensor, "copy_", counting)
        for at in (0, 1, 2, 1):
            job = Job(PROMPT, 4, SCORED, adapter=weights[at])
            await generate(loaded.runner, [job])
            assert_follows(job, base, folders[at])
    assert copied == [weights[at].values.numel() for at in (0, 1, 2, 1)], "one copy a turn, of what it has"
    assert copied[2] < copied[0] < copied[1]


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
        shrinking = write_adapter(tmp_path / "shrinking", {q_proj: (128, 128)})
        with pytest.MonkeyPatch.context() as patched, pytest.raises(ModelLoadError, match="too large"):
            patched.setattr(adapters, "_floats", lambda *given: np.full(given[1].shape, 1e5, np.float32))
            weights_of(loaded, shrinking)


@pytest.mark.parametrize(
    ("changes", "num_slots"),
    [
        ({"max_loras": 5, "admin_api_key": "k"}, 5),
        ({"max_loras": 5, "admin_api_key": "k", "max_cpu_loras": 3}, 3),
        ({"max_loras": 5, "admin_api_key": None, "lora_adapters": ("a=/a", "b=/b")}, 2),
        ({"max_loras": 1, "admin_api_key": None, "lora_adapters": ("a=/a", "b=/b")}, 1),
    ],
)
def test_there_are_as_many_slots_as_adapters_can_be(
    base: Path, device: EmulatedDevice, changes: dict[str, Any], num_slots: int
) -> None:
    model = load_model(files_of(base), Repacking(FP16), max_positions=256)
    layout = cuda_adapters.make_adapter_layout(model, replace(SETTINGS, **changes), device, FP16)
    assert len(layout.pool) == num_slots


def test_slots_that_do_not_fit_are_refused_with_their_settings(
    base: Path, device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = load_model(files_of(base), Repacking(FP16), max_positions=256)
    monkeypatch.setattr(cuda_adapters, "CudaAdapterLayout", full)
    with pytest.raises(ModelLoadError, match="lower --max-loras or --max-lora-rank"):
        cuda_adapters.make_adapter_layout(model, SETTINGS, device, FP16)


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
        assert torch.equal(layout.pool[taken, : three.values.numel()].cpu(), three.values.cpu())
        assert torch.equal(layout.places[taken].cpu(), three.places.cpu())
